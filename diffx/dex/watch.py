"""Statistics of the branches during training, and whether they have an effect."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffx.dex.attach import Adapted
from diffx.dex.layer import DexProjection
from diffx.dex.layout import evaluating

_ON = 0.01  # a branch is on if it changes the output of the chosen heads by this share


class Watch:
    """The probe of ``fit`` for the branches of an adapted model."""

    def __init__(self, adapted: Adapted):
        self._adapted, self._hooked = adapted, False
        self._gradients: dict[str, Tensor] = {}
        self.ratios: list[float] = []  # ||lambda O W_D|| / ||O|| of each layer, at the last call

    def set_step(self, step: int) -> None:
        """Set t of lambda(t), before a step or an evaluation; record gradient norms from now on."""
        self._adapted.set_step(step)
        if self._hooked:
            return
        self._hooked = True  # not earlier: sharding creates new parameters
        for layer, branch in enumerate(self._adapted.branches):
            for name, parameter in (("w_d", branch.w_d), ("lambda", branch.lambda_learn)):
                if parameter is not None:
                    keep = partial(self._keep, f"dex/grad_norm/{name}/{layer:02d}")
                    parameter.register_post_accumulate_grad_hook(keep)

    def _keep(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradients[name] = parameter.grad.norm()  # summed over the micro-batches so far

    @torch.no_grad()
    def __call__(self, forward: Callable[[], object]) -> dict[str, float]:
        """Run the model once and return statistics of each layer.

        They are ``dex/lambda``, ``dex/ratio`` (||lambda O W_D|| / ||O||) and ``dex/cos`` (the
        cosine of O and lambda O W_D) in the chosen heads, and the gradient norms of the last step.
        """
        if not self._adapted.branches:
            return {}
        statistics: dict[str, Any] = {}
        with ExitStack() as stack:
            for layer, branch in enumerate(self._adapted.branches):
                read = partial(_read, statistics, layer)
                stack.enter_context(branch.register_forward_pre_hook(read))
            stack.enter_context(evaluating(self._adapted.model))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            forward()
        for name, norm in self._gradients.items():
            statistics[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        names = sorted(statistics)
        stacked = torch.stack([statistics[name].float().reshape(()) for name in names])
        values = dict(zip(names, stacked.tolist(), strict=True))  # device sync
        self.ratios = [values[name] for name in names if name.startswith("dex/ratio/")]
        return values

    def verdict(self) -> str:
        """A sentence on whether the branch changes the output of the chosen heads."""
        layers, on = len(self.ratios), sum(ratio >= _ON for ratio in self.ratios)
        mean = sum(self.ratios) / max(layers, 1)
        changed = f"at the end (it changes the chosen heads' output by {mean:.2%} on average)"
        if on:
            where = "every layer" if on == layers else f"{on} of {layers} layers"
            return f"the branch is ON in {where} {changed}"
        meaning = "the model is the pretrained one, in effect"
        if any(not name.endswith((".w_d", ".lambda_learn")) for name in self._adapted.trained()):
            meaning = "what was gained came from the other trained weights alone"
        return f"the branch is OFF {changed}: {meaning}"


def _read(
    statistics: dict[str, Tensor], layer: int, branch: DexProjection, args: tuple[Tensor, ...]
) -> None:
    o = args[0].unflatten(-1, (branch.num_heads, branch.width))  # (B, T, H, d_v)
    change = branch.sign * branch.change(o)[..., branch.heads, :].float()
    o = o[..., branch.heads, :].float()
    size, changed = o.norm(), change.norm()
    statistics[f"dex/lambda/{layer:02d}"] = branch.lambda_value()
    statistics[f"dex/ratio/{layer:02d}"] = changed / size
    statistics[f"dex/cos/{layer:02d}"] = (o * change).sum() / (size * changed).clamp(min=1e-30)
