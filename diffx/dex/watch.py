"""What the branch does while it is trained: lambda, its share of the heads' output, its gradients; and whether it is on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffx.dex.attach import Adapted
from diffx.dex.layer import DexProjection

_ON = 0.01  # a branch that changes the chosen heads' output by less than this share is off


class Watch:
    """Reads the branches of an adapted model for the log: as ``fit`` wants its probe, and, for the gradients, as it is told each step.

    Args:
        adapted: the model.

    Attributes:
        ratios: ||lambda O W_D|| / ||O|| of each layer, when it was last looked at.
    """

    def __init__(self, adapted: Adapted):
        self._adapted, self._branches, self._model = adapted, adapted.branches, adapted.model
        self._gradients: dict[str, Tensor] = {}
        self._hooked = False
        self.ratios: list[float] = []

    def set_step(self, step: int) -> None:
        """Give lambda(t) its t, before the step or the evaluation; and keep gradients from now on."""
        self._adapted.set_step(step)
        if not self._hooked:  # not earlier: sharding makes new parameters
            self._hooked = True
            for layer, branch in enumerate(self._branches):
                for name, parameter in (("w_d", branch.w_d), ("lambda", branch.lambda_learn)):
                    if parameter is not None:
                        parameter.register_post_accumulate_grad_hook(self._keep(f"dex/grad_norm/{name}/{layer:02d}"))

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._gradients[name] = parameter.grad.norm()  # of all micro-batches so far: the last one's is the step's

        return hook

    @torch.no_grad()
    def __call__(self, forward: Callable[[], object]) -> dict[str, float]:
        """Run the model once and give, for each layer, ``dex/lambda``, ``dex/ratio``, ``dex/cos``, and the last step's gradient norms.

        ``dex/ratio`` is ||lambda O W_D|| / ||O|| and ``dex/cos`` the cosine of O and lambda O W_D, over the outputs O of the chosen heads.
        """
        if not self._branches:
            return {}
        found: dict[str, Tensor] = {}
        handles = [branch.register_forward_pre_hook(_reader(found, layer)) for layer, branch in enumerate(self._branches)]
        training = self._model.training
        self._model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                forward()
        finally:
            self._model.train(training)
            for handle in handles:
                handle.remove()
        gradients = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in self._gradients.items()}
        found |= gradients
        names = sorted(found)
        values = dict(zip(names, torch.stack([found[name].float().reshape(()) for name in names]).tolist(), strict=True))  # device sync
        self.ratios = [values[name] for name in names if name.startswith("dex/ratio/")]
        return values

    def verdict(self) -> str:
        """Say in words whether the branch is on: whether it changes what the chosen heads give."""
        on = [layer for layer, ratio in enumerate(self.ratios) if ratio >= _ON]
        changed = f"it changes the chosen heads' output by {sum(self.ratios) / max(len(self.ratios), 1):.2%} on average"
        if not on:
            others = any(name.rpartition(".")[2] not in ("w_d", "lambda_learn") for name in self._adapted.trained())
            meaning = (
                "what was gained came from the other trained weights alone" if others else "the model is the pretrained one, in effect"
            )
            return f"the branch is OFF at the end ({changed}): {meaning}"
        if len(on) == len(self.ratios):
            return f"the branch is ON in every layer at the end ({changed})"
        return f"the branch is ON in {len(on)} of {len(self.ratios)} layers at the end ({changed})"


def _reader(found: dict[str, Tensor], layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(branch: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(branch, DexProjection)
        o = args[0].unflatten(-1, (branch.num_heads, branch.width))  # (B, T, H, d_v)
        lam = branch.lambda_value()
        change = branch.sign * branch.change(o)[..., branch.heads, :].float()
        o = o[..., branch.heads, :].float()
        size = o.norm()
        found[f"dex/lambda/{layer:02d}"] = lam
        found[f"dex/ratio/{layer:02d}"] = change.norm() / size
        found[f"dex/cos/{layer:02d}"] = (o * change).sum() / (size * change.norm()).clamp(min=1e-30)

    return hook
