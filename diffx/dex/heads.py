"""Selection of the heads that get the differential step, stored in ``heads.json``.

Notation: B batch, T tokens, H heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffx.config import UserError
from diffx.config.bridge import from_plain
from diffx.config.dex import CRITERIA, DexConfig
from diffx.dex.layout import Layer, evaluating, names_heads_of
from diffx.errors import reason
from diffx.files import read_json, write_json
from diffx.hub.attention import observing
from diffx.models.view import AttentionView

_ROWS = 256  # rows of a map that are computed at once


@dataclass(frozen=True)
class Plan:
    """The chosen heads of one model, the content of ``heads.json``.

    Attributes:
        base: SHA-256 of the model's weights, or its commit.
        criterion: the criterion of the choice.
        settings: k, calibration tokens, their hash, and the seed.
        num_heads: H of each layer.
        scores: of each head of each layer; empty for a criterion without scores.
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


def load_plan(path: Path, base: str, layers: Sequence[Layer]) -> Plan:
    """Read a ``heads.json``.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    refused = f"dex.heads={path} cannot be used"
    try:
        plan = from_plain(Plan, read_json(path))
        if plan.scores and [len(row) for row in plan.scores] != plan.num_heads:
            raise ValueError("its scores are not one number a head")
        if plan.criterion not in (*CRITERIA, "none"):
            raise ValueError(f"its criterion is {plan.criterion!r}")
    except ValueError as error:
        raise UserError(
            f"{refused}: {reason(error)}; it must be the heads.json of a run"
        ) from error
    if plan.base != base:
        raise UserError(
            f"{refused}: it is of another model ({plan.base[:12]}, not {base[:12]}); give one of "
            "this model, or a criterion"
        )
    num_heads = [layer.num_heads for layer in layers]
    if plan.num_heads != num_heads or not names_heads_of(layers, plan.heads):
        raise UserError(
            f"{refused}: it names layers or heads that the model does not have; choose others"
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

    The entropy and importance criteria use ``batches``, calibration tokens (B, T) each. ``base``
    and ``text`` are the SHA-256 of weights and calibration text. ``progress`` is called with the
    number of batches read, after each.

    Raises:
        UserError: a layer has fewer than k or 2 heads, or attention cannot be observed.
    """
    num_heads = [layer.num_heads for layer in layers]
    fewest, criterion = min(num_heads), config.heads
    if config.k is not None and config.k > fewest:
        raise UserError(
            f"dex.k={config.k} cannot be used: the model has {fewest} heads a layer; give no more"
        )
    if fewest == 1 and config.k is None and criterion != "all":
        raise UserError(
            "dex.k=null cannot be used: the model has layers of one head, of which half is none; "
            "give dex.k=1"
        )
    scores: list[list[float]] = []
    if criterion.startswith("entropy"):
        try:
            scores = entropies(model, layers, _counted(batches, progress))
        except UserError as error:  # its message names a checkpoint and a suite
            raise UserError(
                f"dex.heads={criterion} cannot be used: the attention of {type(model).__name__} "
                "cannot be observed; accepted here: importance_low, random, all"
            ) from error
    elif criterion == "importance_low":
        scores = importances(model, layers, _counted(batches, progress))
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for number, count in enumerate(num_heads):
        k = count if criterion == "all" else config.k or count // 2
        order = torch.arange(count)
        if criterion == "random":
            order = torch.randperm(count, generator=generator)
        elif scores:
            descending = criterion == "entropy_high"
            order = torch.tensor(scores[number]).argsort(descending=descending, stable=True)
        heads.append(sorted(order[:k].tolist()))
    tokens = sum(batch.numel() for batch in batches) if scores else 0
    settings = {"k": config.k, "tokens": tokens, "text": text if scores else "", "seed": seed}
    return Plan(base, criterion, settings, num_heads, scores, heads)


@torch.no_grad()
def entropies(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> list[list[float]]:
    """Mean entropy in nats of the attention of every head, over all query positions."""
    sums = [torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers]
    index: dict[int, int] = {}  # from a layer of the model to its index in `layers`

    def add(number: int, view: AttentionView) -> None:
        total, length = torch.zeros(view.num_heads, device=view.q.device), view.q.shape[1]
        for head in range(view.num_heads):
            for start in range(0, length, _ROWS):
                p = view.head_map(head, start, min(start + _ROWS, length))  # (B, rows, T)
                total[head] += torch.special.entr(p).sum()
        sums[index.setdefault(number, len(index))] += total.cpu()  # device sync: once per layer

    tokens = 0
    with evaluating(model), observing(model, attention=add):
        for batch in batches:
            model(input_ids=batch)
            tokens += batch.numel()
    return [(total / tokens).tolist() for total in sums]


def importances(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> list[list[float]]:
    """Mean over sequences of |dLoss/dgate|, with a gate of 1 on every head (arXiv 1905.10650)."""
    shapes = [(layer.num_heads, 1) for layer in layers]
    gates = [torch.ones(shape, device=model.device, requires_grad=True) for shape in shapes]
    sums = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    with evaluating(model), ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for layer, gate in zip(layers, gates, strict=True):
            hook = partial(_multiply, gate, layer.width)
            output = model.get_submodule(layer.output)
            stack.enter_context(output.register_forward_pre_hook(hook))
        sequences = 0
        for batch in batches:
            sequences += len(batch)
            for row in batch:  # absolute gradients are averaged over sequences
                logits = model(input_ids=row[None]).logits[0, :-1]
                loss = F.cross_entropy(logits.float(), row[1:])
                for total, gradient in zip(sums, torch.autograd.grad(loss, gates), strict=True):
                    total += gradient.abs().cpu()
    return [(total[:, 0] / sequences).tolist() for total in sums]


def _counted(batches: Sequence[Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(done)


def _multiply(gate: Tensor, width: int, _: nn.Module, args: tuple[Tensor, ...]) -> Any:
    o = args[0].unflatten(-1, (-1, width)) * gate.to(args[0].dtype)  # (B, T, H, d_v)
    return (o.flatten(-2), *args[1:])


def draw_heads(plan: Plan, path: Path) -> None:
    """Draw a heat map of the scores, layers by heads, with chosen heads framed."""
    layers, widest = len(plan.heads), max(plan.num_heads)
    values = torch.full((layers, widest), torch.nan)
    for layer, count in enumerate(plan.num_heads):
        values[layer, :count] = torch.tensor(plan.scores[layer]) if plan.scores else 0.0
    canvas = Figure(figsize=(1.6 + 0.42 * widest, 1.4 + 0.3 * layers), layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(values.numpy(), aspect="auto", cmap="viridis")
    for layer, chosen in enumerate(plan.heads):
        axes.scatter(chosen, [layer] * len(chosen), 260, "none", marker="s", edgecolors="#D55E00")
    if plan.scores:
        entropy = plan.criterion.startswith("entropy")
        label = "mean attention entropy (nats)" if entropy else "importance |dLoss/dgate|"
        canvas.colorbar(image, ax=axes, label=label)
    axes.set(xlabel="head", ylabel="layer", xticks=range(widest), yticks=range(layers))
    axes.set_title(f"{plan.criterion}: chosen heads framed", loc="left", fontweight="bold")
    canvas.savefig(path, dpi=150)
