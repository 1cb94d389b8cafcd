"""Every figure of a comparison of runs, worked out of groups of runs that differ in their seed."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from diffx.console import figure
from diffx.results import verdict
from diffx.results.curves import tokens_at_equal_loss
from diffx.results.runs import BASE, CONTROL, SHAPE_KEYS, Group, as_word, base_groups
from diffx.results.scaling import PowerLaw, fit_power_law
from diffx.results.statistics import paired_difference

Laws = dict[str, tuple[list[int], list[float], PowerLaw]]  # of an architecture: N, losses, fit


def analyse(groups: list[Group]) -> dict[str, Any]:
    """Work out every figure and sentence of the comparison, JSON-able.

    Losses are in nats a token; ``difference`` and ``tokens_at_equal_loss`` are against the group's
    baseline. Adaptations have the pretrained model as a group of its own, first,
    ``difference_to_base``, and ``noise_floor``.
    """
    groups, warnings = _leave_out_unfinished(groups)
    warnings += _warnings(groups)
    bases = base_groups(groups)
    groups = [*{base.label: base for base in bases.values()}.values(), *groups]
    baselines = [_baseline(group, groups) for group in groups]
    rows = [
        _figures(group, base, bases.get(group.label))
        for group, base in zip(groups, baselines, strict=True)
    ]
    report: dict[str, Any] = {"groups": rows, "scaling": None}
    if bases:
        report["noise_floor"] = noise = noise_floor(rows)
        sentences, faults = verdict.on_adaptations(rows, noise)
        return {**report, "warnings": warnings + faults, "sentences": sentences}
    report["scaling"] = _scaling(groups)
    labels = dict.fromkeys(base.label for base in baselines if base is not None)
    sentences = verdict.on_training(list(labels), rows, report["scaling"])
    return {**report, "warnings": warnings, "sentences": sentences}


def noise_floor(rows: list[dict[str, Any]]) -> float | None:
    """The median over variants of the standard deviation of the final loss over seeds, in nats.

    None with one seed each.
    """
    losses = [row["val/loss"] for row in rows if row["kind"] not in (BASE, verdict.MIRROR)]
    spreads = [loss["std"] for loss in losses if loss["std"] is not None]
    return float(np.median(spreads)) if spreads else None


def _leave_out_unfinished(groups: list[Group]) -> tuple[list[Group], list[str]]:
    """Drop the unfinished runs of a group that has finished ones: their last loss is not final."""
    kept, warnings = [], []
    for group in groups:
        finished = [run for run in group.runs if run.finished]
        for run in group.runs:
            if not run.finished:
                fate = "left out" if finished else "used as far as it got"
                at = f"step {run.metrics[-1]['step']} of {run.job.train.num_steps}"
                state = "is still going or was stopped"
                warnings.append(f"{run.path} {state} ({at}): it is {fate}")
        kept.append(replace(group, runs=finished or group.runs))
    return kept, warnings


def _baseline(group: Group, groups: list[Group]) -> Group | None:
    """The transformer or ``attn_only``, else the first architecture given.

    Of several such groups, the one with the group's shape and recipe.
    """
    kinds = [g.kind for g in groups]
    baseline = next((kind for kind in ("transformer", CONTROL) if kind in kinds), kinds[0])
    candidates = [g for g in groups if g.kind == baseline]
    if len(candidates) == 1 or len(set(kinds)) == 1:
        return candidates[0]
    return next((g for g in candidates if g.common == group.common), None)


def _figures(group: Group, base: Group | None, pretrained: Group | None) -> dict[str, Any]:
    adapted = "dex.variant" in group.settings
    final = group.final("val/loss")
    speeds = [run.curve("train/tokens_per_second")[1] for run in group.runs]
    medians = [np.median(speed) for speed in speeds if speed.size]
    difference = difference_curve = equal = to_base = None
    if base is not None and base is not group:
        difference = asdict(paired_difference(final, base.final("val/loss")))
        difference_curve = None if group.kind == BASE else _difference_curve(group, base)
        # An adaptation starts from the base's loss and not from chance.
        equal = None if adapted else _equal_loss(group, base)
    if pretrained:
        to_base = asdict(paired_difference(final, pretrained.final("val/loss")))
    branches = (run.summary["branch"] for run in group.runs if run.summary.get("branch"))
    last = max(run.curve("val/loss")[0][-1] for run in group.runs)
    return {
        "label": group.label,
        "kind": group.kind,
        "adapted": adapted,
        "runs": [str(run.path) for run in group.runs],
        "seeds": list(final),
        "parameters": group.parameters,
        "tokens": 0.0 if group.kind == BASE else last,
        "val/loss": _spread(final),
        "val/bpb": _spread(group.final("val/bpb")),
        "tokens_per_second": float(np.mean(medians)) if medians else None,
        "baseline": base.label if base else None,
        "difference": difference,
        "difference_to_base": to_base,
        "branch": next(branches, None),
        "tokens_at_equal_loss": equal,
        "curve": _curve(*group.curves()),
        "difference_curve": difference_curve,
    }


def _curve(tokens: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    """Mean and range over the runs, of values (runs, n) at tokens (n,)."""
    spread = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {"tokens": tokens.tolist()} | {name: line.tolist() for name, line in spread.items()}


def _difference_curve(group: Group, base: Group) -> dict[str, list[float]] | None:
    """The group's validation curves minus the baseline's by seed; None without shared seeds."""
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    grid = tokens[(tokens >= base_tokens[0]) & (tokens <= base_tokens[-1])]
    base_at = {
        run.job.seed: np.interp(grid, base_tokens, row)
        for run, row in zip(base.runs, base_losses, strict=True)
    }
    gaps = [
        np.interp(grid, tokens, row) - base_at[run.job.seed]
        for run, row in zip(group.runs, losses, strict=True)
        if run.job.seed in base_at
    ]
    return _curve(grid, np.stack(gaps)) if gaps and grid.size else None


def _spread(by_seed: dict[int, float]) -> dict[str, Any] | None:
    if not by_seed:
        return None
    values = list(by_seed.values())
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "by_seed": by_seed}


def _equal_loss(group: Group, base: Group) -> dict[str, Any] | None:
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    curve, base_curve = (tokens, losses.mean(0)), (base_tokens, base_losses.mean(0))
    equal = tokens_at_equal_loss(curve, base_curve)
    if equal is None:
        return None
    sentence = verdict.on_equal_loss(group.label, base.label, equal)
    return {**asdict(equal), "ratio": equal.ratio, "sentence": sentence}


def _scaling(groups: list[Group]) -> dict[str, Any] | None:
    """Power laws of the architectures that were run in three sizes or more, if two of them were.

    N is the number of parameters that are no embedding.
    """
    laws: Laws = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        points = sorted(
            (g.parameters["rest"], float(np.mean(list(g.final("val/loss").values()))))
            for g in of_kind
            if g.parameters
        )
        sizes, losses = [n for n, _ in points], [loss for _, loss in points]
        if len(points) == len(of_kind) and len(set(sizes)) == len(sizes) >= 3:
            laws[kind] = (sizes, losses, fit_power_law(sizes, losses))
    if len(laws) < 2:
        return None
    base = "transformer" if "transformer" in laws else next(iter(laws))
    fits = [
        {
            "kind": kind,
            "parameters": sizes,
            "losses": losses,
            **asdict(law),
            "sentence": verdict.on_power_law(kind, law, len(sizes)),
        }
        for kind, (sizes, losses, law) in laws.items()
    ]
    pairs = [_equal_parameters(kind, base, laws) for kind in laws if kind != base]
    return {"laws": fits, "equal_loss": pairs}


def _equal_parameters(kind: str, base: str, laws: Laws) -> dict[str, Any]:
    """The parameters that an architecture needs for the loss of the baseline's largest size."""
    sizes, _, law = laws[kind]
    largest, base_law = laws[base][0][-1], laws[base][2]
    loss = base_law.loss(largest)
    needed = law.parameters(loss)
    pair: dict[str, Any] = {"kind": kind, "baseline": base, "loss": loss, "ratio": None}
    if np.isfinite(needed):
        extrapolated = not sizes[0] <= needed <= sizes[-1]
        pair |= {"parameters": needed, "baseline_parameters": largest, "extrapolated": extrapolated}
        pair["ratio"] = needed / largest
    return pair | {"sentence": verdict.on_parameters(pair, largest, sizes)}


def _warnings(groups: list[Group]) -> list[str]:
    """What makes the runs less comparable than the table looks."""
    runs = [run for group in groups for run in group.runs]
    lines = []
    for group in groups:
        if len(group.final("val/loss")) < len(group.runs):
            mean = "each seed counts once, by its mean"
            lines.append(f"{group.label} ran a seed more than once: {mean}")
    for what, key in (("data", "sha256"), ("tokenizers", "tokenizer")):
        if len({str(run.data.get(key)) for run in runs}) > 1:
            differs = f"`{key}` in data.json differs"
            lines.append(f"not comparable: the runs used different {what} ({differs})")
    lengths = {run.curve("val/loss")[0][-1] for run in runs}
    if len(lengths) > 1:
        counts = _list(figure(n) for n in sorted(lengths))
        lines.append(f"not comparable: final losses are at different token counts, {counts}")
    settings = [group.common for group in groups]
    for key in dict.fromkeys(key for s in settings for key in s):
        values = list(dict.fromkeys(as_word(s.get(key)) for s in settings))
        if key not in SHAPE_KEYS and len(values) > 1:
            lines.append(f"not the same recipe: {key} is {_list(values)}")
    return lines


def _list(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
