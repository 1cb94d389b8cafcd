"""Initial weights of all architectures."""

import hashlib

import torch

from diffx.models.decoder import Decoder

LAMBDA_STD = 0.1
LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Set every parameter, by normal distributions with mean 0 and these standard deviations.

    s is init_std of the config, or 1/sqrt(hidden_size) if that is null.

    - o_proj, down_proj: s, divided by sqrt(2·num_layers) with scale_residual_init
    - lambda_q1, lambda_k1, lambda_q2, lambda_k2 (DIFF V1): 0.1
    - gains of norms: no draw, all are 1; weights of PolyNorm 1/3, its bias 0
    - sinks: no draw, all are 0
    - all other parameters: s

    Each tensor has a random stream seeded with the seed and the parameter's name, drawn on the CPU
    in fp32. So a seed gives the same weights on every device, and tensors with the same name and
    shape are equal in all architectures.
    """
    config = model.config
    depth = 2 * config.num_layers if config.scale_residual_init else 1
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        if name.endswith(("sinks", "act_fn.weight", "act_fn.bias")):
            parameter.fill_(1 / 3 if name.endswith("weight") else 0.0)
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = config.weight_std / depth**0.5
        elif name.endswith(LAMBDAS):
            std = LAMBDA_STD
        else:
            std = config.weight_std
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
