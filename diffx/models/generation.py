"""Text generation with a KV cache.

Notation: T tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from diffx.models.cache import KVCache
from diffx.models.decoder import Decoder


def generate(
    model: Decoder,
    input_ids: Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eot_id: int | None = None,
) -> Iterator[int]:
    """Continue a prompt and yield each token as it is drawn.

    Args:
        model: the language model.
        input_ids: the prompt (1, T), T at least 1.
        max_tokens: the largest number of tokens.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens; 0 is all.
        top_p: draw among the fewest most likely tokens whose probabilities (after ``top_k``) sum to
            p; 1 is all.
        seed: seed of the draws, which are made on the CPU and so are equal on every device.
        eot_id: the token that ends the text; it is not yielded.

    Raises:
        ValueError: the prompt is not one sequence of at least one token.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: it must be (1, T) with T at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    weight = model.output_weight
    cache = KVCache(model.config, 1, input_ids.shape[1] + max_tokens, weight.device, weight.dtype)
    for _ in range(max_tokens):
        with torch.inference_mode():  # not around the yield, where code of the caller runs
            hidden = model.forward_hidden(input_ids, cache=cache)[0, -1]  # (D,)
            # Read again: the parameter of a sharded model is whole only after its forward pass.
            logits = F.linear(hidden, model.output_weight)
            token = sample(logits, temperature, top_k, top_p, generator)
        if token == eot_id:
            return
        yield token
        input_ids = torch.tensor([[token]], device=input_ids.device)


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token from logits (V,); see ``generate`` for the settings."""
    values, tokens = logits.float().cpu().sort(descending=True, stable=True)  # device sync
    if temperature == 0:
        return int(tokens[0])
    if top_k:
        values = values[:top_k]
    probabilities = ((values - values[0]) / temperature).softmax(0)
    mass_before = probabilities.cumsum(0) - probabilities  # of the tokens that are more likely
    probabilities[mass_before >= top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
