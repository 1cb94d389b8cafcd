"""Statistics of the branches during training, and whether they have an effect."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffx.dex.attach import Adapted
from diffx.dex.layer import DexProjection

_ON = 0.01  # a branch is on if it changes the output of the chosen heads by this share


class Watch:
    """The probe of ``fit`` for the branches of an adapted model.

    Args:
        adapted: the model.

    Attributes:
        ratios: ||lambda O W_D|| / ||O|| of each layer, at the last call.
    """

    def __init__(self, adapted: Adapted):
        self._adapted, self._branches, self._model = adapted, adapted.branches, adapted.model
        self._gradients: dict[str, Tensor] = {}
        self._hooked = False
        self.ratios: list[float] = []

    def set_step(self, step: int) -> None:
        """Set t of lambda(t), before a step or an evaluation; record gradient norms from now on."""
        self._adapted.set_step(step)
        if not self._hooked:  # not earlier: sharding creates new parameters
            self._hooked = True
            for layer, branch in enumerate(self._branches):
                for name, parameter in (("w_d", branch.w_d), ("lambda", branch.lambda_learn)):
                    if parameter is not None:
                        parameter.register_post_accumulate_grad_hook(
                            self._keep(f"dex/grad_norm/{name}/{layer:02d}")
                        )

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._gradients[name] = parameter.grad.norm()  # summed over the micro-batches so far

        return hook

    @torch.no_grad()
    def __call__(self, forward: Callable[[], object]) -> dict[str, float]:
        """Run the model once and return statistics of each layer.

        They are ``dex/lambda``, ``dex/ratio`` (||lambda O W_D|| / ||O||), ``dex/cos`` (the cosine
        of O and lambda O W_D), where O is the output of the chosen heads, and the gradient norms of
        the last step.
        """
        if not self._branches:
            return {}
        statistics: dict[str, Tensor] = {}
        handles = [
            branch.register_forward_pre_hook(_reader(statistics, layer))
            for layer, branch in enumerate(self._branches)
        ]
        training = self._model.training
        self._model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                forward()
        finally:
            self._model.train(training)
            for handle in handles:
                handle.remove()
        statistics |= {
            name: getattr(value, "full_tensor", lambda v=value: v)()
            for name, value in self._gradients.items()
        }
        names = sorted(statistics)
        # device sync
        values = dict(
            zip(
                names,
                torch.stack([statistics[name].float().reshape(()) for name in names]).tolist(),
                strict=True,
            )
        )
        self.ratios = [values[name] for name in names if name.startswith("dex/ratio/")]
        return values

    def verdict(self) -> str:
        """A sentence on whether the branch changes the output of the chosen heads."""
        on = [layer for layer, ratio in enumerate(self.ratios) if ratio >= _ON]
        mean = sum(self.ratios) / max(len(self.ratios), 1)
        changed = f"it changes the chosen heads' output by {mean:.2%} on average"
        if not on:
            others = any(
                name.rpartition(".")[2] not in ("w_d", "lambda_learn")
                for name in self._adapted.trained()
            )
            meaning = (
                "what was gained came from the other trained weights alone"
                if others
                else "the model is the pretrained one, in effect"
            )
            return f"the branch is OFF at the end ({changed}): {meaning}"
        if len(on) == len(self.ratios):
            return f"the branch is ON in every layer at the end ({changed})"
        return f"the branch is ON in {len(on)} of {len(self.ratios)} layers at the end ({changed})"


def _reader(
    statistics: dict[str, Tensor], layer: int
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(branch: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(branch, DexProjection)
        o = args[0].unflatten(-1, (branch.num_heads, branch.width))  # (B, T, H, d_v)
        lam = branch.lambda_value()
        change = branch.sign * branch.change(o)[..., branch.heads, :].float()
        o = o[..., branch.heads, :].float()
        size = o.norm()
        statistics[f"dex/lambda/{layer:02d}"] = lam
        statistics[f"dex/ratio/{layer:02d}"] = change.norm() / size
        statistics[f"dex/cos/{layer:02d}"] = (o * change).sum() / (size * change.norm()).clamp(
            min=1e-30
        )

    return hook
