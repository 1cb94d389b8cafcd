"""What DIFF's layers do, read by hooks in a forward pass of its own: the model knows nothing of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def diff_statistics(model: nn.Module, blocks: nn.ModuleList, forward: Callable[[], object]) -> dict[str, float]:
    """Measure each layer's lambda and the RMS of its context before the norm.

    Args:
        model: the model that ``forward`` runs.
        blocks: its decoder blocks; those without differential attention are passed over.
        forward: runs the model on a few tokens. It runs eagerly, since hooks would break a compiled block.

    Returns:
        ``diff/lambda/<layer>``: V1's lambda (mean over heads), V2's mean sigmoid over tokens and heads.
        ``diff/context_rms/<layer>``: root mean square of A1 V - lambda A2 V.
    """
    found: dict[str, torch.Tensor] = {}
    handles = []
    for index, block in enumerate(blocks):
        attention: Any = block.self_attn
        if hasattr(attention, "lambda_proj"):  # V2: the context goes straight to the output projection
            handles.append(attention.lambda_proj.register_forward_hook(_sigmoid_into(found, f"diff/lambda/{index:02d}")))
            handles.append(attention.o_proj.register_forward_pre_hook(_rms_into(found, f"diff/context_rms/{index:02d}")))
        elif hasattr(attention, "lambda_value"):  # V1: the context enters the norm (an identity where it is off)
            handles.append(attention.register_forward_pre_hook(_lambda_into(found, f"diff/lambda/{index:02d}")))
            handles.append(attention.sublayer_norm.register_forward_pre_hook(_rms_into(found, f"diff/context_rms/{index:02d}")))
    if not handles:
        return {}
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    names = sorted(found)
    return dict(zip(names, torch.stack([found[name].float() for name in names]).tolist(), strict=True))  # device sync: one for all layers


def _lambda_into(found: dict[str, torch.Tensor], name: str):
    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        found[name] = module.lambda_value().mean()  # in the forward pass, where sharded parameters are whole

    return hook


def _rms_into(found: dict[str, torch.Tensor], name: str):
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found[name] = args[0].float().pow(2).mean().sqrt()

    return hook


def _sigmoid_into(found: dict[str, torch.Tensor], name: str):
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found[name] = output.float().sigmoid().mean()

    return hook
