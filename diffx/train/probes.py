"""Statistics of each layer's attention, read by hooks in a separate forward pass."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffx.dex.layout import evaluating


@torch.no_grad()
def attention_statistics(
    model: nn.Module, blocks: Iterable[Any], forward: Callable[[], object]
) -> dict[str, float]:
    """Measure each layer's lambda and the RMS of its context.

    Args:
        model: the model that ``forward`` runs on a few tokens.
        blocks: its decoder blocks; ``self_attn`` of each is a ``diffx.models.attention.Attention``.
        forward: runs the model.

    Returns:
        ``diff/lambda/<layer>``: mean lambda over heads (and tokens); absent for a layer without.
        ``attention/context_rms/<layer>``: root mean square of the weighted values, after the
        subtraction and before any norm.
    """
    values: dict[str, Tensor] = {}

    def read_lambda(module: Any, args: tuple[Tensor, ...]) -> None:
        lam = module.lambda_value(args[0])  # sharded parameters are whole in the forward pass
        if lam is not None:
            values[f"diff/lambda/{module.layer:02d}"] = lam.float().mean()

    def read_context(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values[f"attention/context_rms/{layer:02d}"] = args[0].float().pow(2).mean().sqrt()

    with ExitStack() as stack:
        for block in blocks:
            attention = block.self_attn
            context = attention.get_submodule(attention.context_module)
            read = partial(read_context, attention.layer)
            for module, hook in ((attention, read_lambda), (context, read)):
                stack.callback(module.register_forward_pre_hook(hook).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks break compiled blocks
        forward()
    names = sorted(values)
    # Device sync: one for all layers.
    means = torch.stack([values[name] for name in names]).tolist()
    return dict(zip(names, means, strict=True))
