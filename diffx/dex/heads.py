"""Selection of the heads that get the differential step, stored in ``heads.json``.

Notation: B batch, T tokens, H heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffx.config import UserError
from diffx.config.dex import CRITERIA, DexConfig
from diffx.dex.layout import Layer
from diffx.errors import reason
from diffx.files import read_json, write_json
from diffx.hub.attention import observing
from diffx.models.view import AttentionView

_ROWS = 256  # rows of a map that are computed at once


@dataclass(frozen=True)
class Plan:
    """The chosen heads of one model.

    Attributes:
        base: SHA-256 of the model's weights, or its commit.
        criterion: the criterion of the choice.
        settings: k, calibration tokens, their hash, and the seed.
        num_heads: H of each layer.
        scores: the score of each head of each layer; empty for a criterion without scores.
        heads: the chosen heads of each layer, ascending.
    """

    base: str
    criterion: str
    settings: dict[str, Any]
    num_heads: list[int]
    scores: list[list[float]]
    heads: list[list[int]]

    def save(self, path: Path) -> None:
        """Write ``heads.json``."""
        write_json(path, asdict(self))


_FIELDS = {
    "base": str,
    "criterion": str,
    "settings": dict,
    "num_heads": list,
    "scores": list,
    "heads": list,
}


def load_plan(path: Path, base: str, layers: Sequence[Layer]) -> Plan:
    """Read a ``heads.json``.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    refused = f"dex.heads={path} cannot be used"
    try:
        plan = Plan(**read_json(path, _FIELDS))
        known, chosen = plan.base, [{int(head) for head in heads} for heads in plan.heads]
        shapes = [len(row) for row in plan.scores], [] if plan.scores == [] else plan.num_heads
        if shapes[0] != shapes[1] or not all(
            isinstance(score, int | float) for row in plan.scores for score in row
        ):
            raise ValueError("its scores are not one number a head")
        if plan.criterion not in (*CRITERIA, "none"):
            raise ValueError(f"its criterion is {plan.criterion!r}")
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"{refused}: {reason(error)}; it must be the heads.json of a run"
        ) from error
    if known != base:
        raise UserError(
            f"{refused}: it is of another model ({known[:12]}, not {base[:12]}); give one of this "
            "model, or a criterion"
        )
    if (
        plan.num_heads != [layer.num_heads for layer in layers]
        or len(chosen) != len(layers)
        or not all(
            heads <= set(range(layer.num_heads))
            for heads, layer in zip(chosen, layers, strict=True)
        )
    ):
        raise UserError(
            f"{refused}: it names layers or heads that the model does not have; choose heads anew"
        )
    return plan


def choose_heads(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    config: DexConfig,
    batches: Sequence[Tensor],
    base: str,
    seed: int,
    text: str = "",
    progress: Callable[[int], None] = lambda done: None,
) -> Plan:
    """Choose k heads in every layer.

    Args:
        model: the pretrained model.
        layers: its attention layers.
        config: the criterion and k.
        batches: calibration tokens, (B, T) each; used by the entropy and importance criteria.
        base: SHA-256 of the model's weights.
        seed: seed of the ``random`` criterion.
        text: SHA-256 of the calibration text.
        progress: called with the number of batches read, after each.

    Raises:
        UserError: a layer has fewer heads than k or only one, or the attention of the model cannot
            be observed.
    """
    num_heads = [layer.num_heads for layer in layers]
    most, criterion = min(num_heads), config.heads
    if config.k is not None and config.k > most:
        raise UserError(
            f"dex.k={config.k} cannot be used: the model has {most} heads a layer; give at most "
            "that many"
        )
    if most == 1 and config.k is None and criterion != "all":
        raise UserError(
            "dex.k=null cannot be used: the model has layers of one head, of which half is none; "
            "give dex.k=1"
        )
    assert criterion in CRITERIA
    scores: list[list[float]] = []
    if criterion.startswith("entropy"):
        try:
            scores = entropies(model, layers, _counted(batches, progress))
        except UserError as error:  # its message names a checkpoint and a suite
            raise UserError(
                f"dex.heads={criterion} cannot be used: what {type(model).__name__} attends to "
                "cannot be seen; accepted here: "
                "importance_low, random, all"
            ) from error
    elif criterion == "importance_low":
        scores = importances(model, layers, _counted(batches, progress))
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for number, count in enumerate(num_heads):
        k = count if criterion == "all" else config.k if config.k is not None else count // 2
        if criterion == "random":
            chosen = torch.randperm(count, generator=generator)[:k]
        elif scores:
            chosen = torch.tensor(scores[number]).argsort(
                descending=criterion == "entropy_high", stable=True
            )[:k]
        else:
            chosen = torch.arange(k)
        heads.append(sorted(chosen.tolist()))
    tokens = sum(batch.numel() for batch in batches) if scores else 0
    return Plan(
        base,
        criterion,
        {"k": config.k, "tokens": tokens, "text": text if scores else "", "seed": seed},
        num_heads,
        scores,
        heads,
    )


@torch.no_grad()
def entropies(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> list[list[float]]:
    """Mean entropy in nats of the attention of every head, over all query positions."""
    sums = [torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers]
    index: dict[int, int] = {}  # from a layer of the model to its index in `layers`

    def add(number: int, view: AttentionView) -> None:
        total = torch.zeros(view.num_heads, device=view.q.device)
        for head in range(view.num_heads):
            for start in range(0, view.q.shape[1], _ROWS):
                p = view.head_map(head, start, min(start + _ROWS, view.q.shape[1]))  # (B, rows, T)
                total[head] += torch.special.entr(p).sum()
        sums[index.setdefault(number, len(index))] += total.cpu()  # device sync: once per layer

    tokens = 0
    with _evaluating(model), observing(model, attention=add):
        for batch in batches:
            model(input_ids=batch)
            tokens += batch.numel()
    return [(total / tokens).tolist() for total in sums]


def importances(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> list[list[float]]:
    """Mean over sequences of |dLoss/dgate|, with a gate of 1 on every head (arXiv 1905.10650)."""
    gates = [
        torch.ones(layer.num_heads, 1, device=model.device, requires_grad=True) for layer in layers
    ]
    sums = [torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers]
    with _evaluating(model), ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        for layer, gate in zip(layers, gates, strict=True):
            output = model.get_submodule(layer.output)
            stack.enter_context(output.register_forward_pre_hook(_gated(gate, layer.width)))
        sequences = 0
        for batch in batches:
            sequences += len(batch)
            for row in batch:  # absolute gradients are averaged over sequences
                logits = model(input_ids=row[None]).logits[0, :-1]
                loss = F.cross_entropy(logits.float(), row[1:])
                for total, gradient in zip(sums, torch.autograd.grad(loss, gates), strict=True):
                    total += gradient[:, 0].abs().cpu()
    return [(total / sequences).tolist() for total in sums]


def _counted(batches: Sequence[Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(done)


def _gated(gate: Tensor, width: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        o = args[0].unflatten(-1, (-1, width)) * gate.to(args[0].dtype)  # (B, T, H, d_v)
        return (o.flatten(-2), *args[1:])

    return hook


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def draw_heads(plan: Plan, path: Path) -> None:
    """Draw a heat map of the scores, layers by heads, with chosen heads framed."""
    widest = max(plan.num_heads)
    values = torch.full((len(plan.heads), widest), torch.nan)
    for layer, count in enumerate(plan.num_heads):
        values[layer, :count] = torch.tensor(plan.scores[layer]) if plan.scores else 0.0
    canvas = Figure(
        figsize=(1.6 + 0.42 * widest, 1.4 + 0.3 * len(plan.heads)), layout="constrained"
    )
    axes = canvas.subplots()
    image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis")
    for layer, chosen in enumerate(plan.heads):
        for head in chosen:
            axes.add_patch(
                Rectangle(
                    (head - 0.44, layer - 0.42),
                    0.88,
                    0.84,
                    fill=False,
                    edgecolor="#D55E00",
                    linewidth=1.6,
                )
            )
    names = {"e": "mean attention entropy (nats)", "i": "importance |dLoss/dgate|"}
    if plan.scores:
        canvas.colorbar(image, ax=axes, label=names[plan.criterion[0]])
    axes.set(xlabel="head", ylabel="layer", xticks=range(widest), yticks=range(len(plan.heads)))
    axes.set_title(
        f"{plan.criterion}: chosen heads framed", loc="left", fontsize=11, fontweight="bold"
    )
    canvas.savefig(path, dpi=150)
