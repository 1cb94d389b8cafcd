"""Statistics of each layer's attention, read by hooks in a separate forward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def attention_statistics(
    model: nn.Module, blocks: Iterable[Any], forward: Callable[[], object]
) -> dict[str, float]:
    """Measure each layer's lambda and the RMS of its context.

    Args:
        model: the model that ``forward`` runs.
        blocks: its decoder blocks; ``self_attn`` of each is a ``diffx.models.attention.Attention``.
        forward: runs the model on a few tokens, eagerly: hooks would break a compiled block.

    Returns:
        ``diff/lambda/<layer>``: mean lambda over heads (and tokens); absent for a layer without.
        ``attention/context_rms/<layer>``: root mean square of the weighted values, after the
        subtraction and before any norm.
    """
    values: dict[str, torch.Tensor] = {}

    def read_lambda(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        lam = module.lambda_value(args[0])  # sharded parameters are whole in the forward pass
        if lam is not None:
            values[f"diff/lambda/{module.layer:02d}"] = lam.float().mean()

    def read_context(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            values[f"attention/context_rms/{layer:02d}"] = args[0].float().pow(2).mean().sqrt()

        return hook

    handles = []
    for block in blocks:
        attention = block.self_attn
        handles.append(attention.register_forward_pre_hook(read_lambda))
        context = attention.get_submodule(attention.context_module)
        handles.append(context.register_forward_pre_hook(read_context(attention.layer)))
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    names = sorted(values)
    # Device sync: one for all layers.
    means = torch.stack([values[name] for name in names]).tolist()
    return dict(zip(names, means, strict=True))
