"""Initial weights of every architecture, in one place."""

import hashlib

import torch

from diffx.models.decoder import Decoder

LAMBDA_STD = 0.1


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Set every parameter. All matrices and vectors are drawn from normal distributions with mean 0 and these deviations.

    s is the config's init_std, or 1/sqrt(hidden_size) if that is null.

    | parameter                                            | standard deviation                                       |
    |------------------------------------------------------|----------------------------------------------------------|
    | embed_tokens, lm_head                                | s                                                        |
    | q_proj, k_proj, v_proj, gate_proj, up_proj           | s                                                        |
    | lambda_proj (DIFF V2)                                | s                                                        |
    | o_proj, down_proj                                    | s, over sqrt(2·num_layers) if scale_residual_init        |
    | lambda_q1, lambda_k1, lambda_q2, lambda_k2 (DIFF V1) | 0.1                                                      |
    | gains of all norms                                   | set to 1                                                 |

    Each tensor has a random stream of its own, made of the seed and the parameter's name and drawn on the CPU in fp32.
    So a seed gives the same weights on every device, and tensors that two architectures share in name and shape are equal.
    """
    config = model.config
    residual_std = config.weight_std / (2 * config.num_layers) ** 0.5 if config.scale_residual_init else config.weight_std
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            continue
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std = residual_std
        elif name.endswith(("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")):
            std = LAMBDA_STD
        else:
            std = config.weight_std
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
