"""Selection of the heads that get the differential step, stored in ``heads.json``.

Notation: B batch, T tokens, H heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffx.config import UserError
from diffx.config.bridge import from_plain
from diffx.config.checks import refuse
from diffx.config.dex import DexConfig
from diffx.dex.layout import Layer, check_heads, evaluating
from diffx.errors import reason
from diffx.files import read_json, write_json
from diffx.hub.attention import observing
from diffx.models.view import AttentionView

_ROWS = 256  # rows of a map that are computed at once


@dataclass(frozen=True)
class Plan:
    """The chosen heads of a model: the content of ``heads.json``."""

    base: str  # SHA-256 of the model's weights, or its commit
    criterion: str
    settings: dict[str, Any]  # k, calibration tokens, their hash, and the seed
    num_heads: list[int]  # of each layer
    scores: list[list[float]]  # of each head of each layer; empty if the criterion has none
    heads: list[list[int]]  # the chosen ones of each layer, ascending

    def save(self, path: Path) -> None:
        """Write ``heads.json``."""
        write_json(path, asdict(self))


def load_plan(path: Path, base: str, layers: Sequence[Layer]) -> Plan:
    """Read a ``heads.json``.

    Raises:
        UserError: it cannot be read, or belongs to another model.
    """
    setting = f"dex.heads={path}"
    try:
        plan = from_plain(Plan, read_json(path))
    except UserError as error:
        accepted = "it must be the heads.json of a run"
        raise UserError(f"{setting} cannot be used: {reason(error)}; {accepted}") from error
    other = f"it is of another model ({plan.base[:12]}, not {base[:12]})"
    refuse(plan.base != base, setting, f"{other}; give one of this model, or a criterion")
    check_heads(setting, layers, plan.heads)
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
    """Choose k heads in every layer; entropy and importance are those on ``batches``, (B, T) each.

    ``base`` and ``text`` are the SHA-256 of weights and batches; ``progress`` gets the number of
    batches read.

    Raises:
        UserError: a layer has fewer than k or 2 heads, or attention cannot be observed.
    """
    num_heads = [layer.num_heads for layer in layers]
    fewest, criterion, k = min(num_heads), config.heads, config.k
    accepted = f"the model has {fewest} heads a layer; give no more"
    refuse(k is not None and k > fewest, f"dex.k={k}", accepted)
    none_chosen = fewest == 1 and k is None and criterion != "all"
    refuse(none_chosen, "dex.k=null", "half of one head is none; give dex.k=1")
    scores: list[list[float]] = []
    if criterion.startswith("entropy"):
        try:
            scores = entropies(model, layers, _counted(batches, progress))
        except UserError as error:  # its message names a checkpoint and a suite
            why = f"the attention of {type(model).__name__} cannot be observed; accepted here"
            raise UserError(
                f"dex.heads={criterion} cannot be used: {why}: importance_low, random, all"
            ) from error
    elif criterion == "importance_low":
        scores = importances(model, layers, _counted(batches, progress))
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for number, count in enumerate(num_heads):
        order = torch.randperm(count, generator=generator)
        if scores:
            descending = criterion == "entropy_high"
            order = torch.tensor(scores[number]).argsort(descending=descending, stable=True)
        chosen = count if criterion == "all" else k or count // 2
        heads.append(sorted(order[:chosen].tolist()))
    tokens = sum(batch.numel() for batch in batches) if scores else 0
    settings = {"k": k, "tokens": tokens, "text": text if scores else "", "seed": seed}
    return Plan(base, criterion, settings, num_heads, scores, heads)


@torch.no_grad()
def entropies(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Iterable[Tensor]
) -> list[list[float]]:
    """Mean entropy in nats of the attention of every head, over all query positions."""
    sums = [torch.zeros(layer.num_heads, dtype=torch.float64) for layer in layers]
    index: dict[int, int] = {}  # in `layers`, of a layer of the model

    def add(number: int, view: AttentionView) -> None:
        total, length = torch.zeros(view.num_heads, device=view.q.device), view.q.shape[1]
        for head, start in product(range(view.num_heads), range(0, length, _ROWS)):
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
    counts, device = [layer.num_heads for layer in layers], model.device
    gates = [torch.ones(count, device=device, requires_grad=True) for count in counts]
    sums = [torch.zeros(count, dtype=torch.float64) for count in counts]
    with evaluating(model), ExitStack() as stack:
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for layer, gate in zip(layers, gates, strict=True):
            hook = partial(_multiply, gate, layer.width)
            output = model.get_submodule(layer.output)
            stack.enter_context(output.register_forward_pre_hook(hook))
        sequences = 0
        for row in (row for batch in batches for row in batch):  # since the gradients are absolute
            sequences += 1
            logits = model(input_ids=row[None]).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), row[1:])
            for total, gradient in zip(sums, torch.autograd.grad(loss, gates), strict=True):
                total += gradient.abs().cpu()
    return [(total / sequences).tolist() for total in sums]


def _counted(batches: Sequence[Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
    for done, batch in enumerate(batches, 1):
        yield batch
        progress(done)


def _multiply(gate: Tensor, width: int, _: nn.Module, args: tuple[Tensor, ...]) -> Any:
    o = args[0].unflatten(-1, (-1, width)) * gate[:, None].to(args[0].dtype)  # (B, T, H, d_v)
    return (o.flatten(-2), *args[1:])


def draw_heads(plan: Plan, path: Path) -> None:
    """Draw a heat map of the scores, layers by heads, with chosen heads framed."""
    scores = plan.scores or [[0.0] * count for count in plan.num_heads]
    values = np.array(list(zip_longest(*scores, fillvalue=np.nan))).T
    layers, widest = values.shape
    canvas = Figure(figsize=(1.6 + 0.42 * widest, 1.4 + 0.3 * layers), layout="constrained")
    axes = canvas.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    for layer, chosen in enumerate(plan.heads):
        axes.scatter(chosen, [layer] * len(chosen), 260, "none", marker="s", edgecolors="#D55E00")
    if plan.scores:
        entropy = plan.criterion.startswith("entropy")
        label = "mean attention entropy (nats)" if entropy else "importance |dLoss/dgate|"
        canvas.colorbar(image, ax=axes, label=label)
    axes.set(xlabel="head", ylabel="layer", xticks=range(widest), yticks=range(layers))
    axes.set_title(f"{plan.criterion}: chosen heads framed", loc="left", fontweight="bold")
    canvas.savefig(path, dpi=150)
