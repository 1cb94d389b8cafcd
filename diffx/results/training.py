"""Every figure of a comparison of runs, computed from groups of runs that differ in their seed."""

from dataclasses import replace

import numpy as np

from diffx.console import figure
from diffx.results import verdict
from diffx.results.curves import PowerLaw, fit_power_law, tokens_at_equal_loss
from diffx.results.runs import BASE, CONTROL, SHAPE_KEYS, Fields, Group, as_word, base_groups
from diffx.results.statistics import paired_difference


def analyse(groups: list[Group]) -> Fields:
    """Compute every figure and sentence of the comparison, JSON-able.

    Losses are in nats a token. Adaptations have the pretrained model as their first group, and
    ``noise_floor``, the median over variants of the standard deviation of the final loss over seeds
    (None with one seed each).
    """
    groups, warnings = _leave_out_unfinished(groups)
    warnings += _warnings(groups)
    bases = base_groups(groups)
    groups = [*{base.label: base for base in bases.values()}.values(), *groups]
    baselines = [_baseline(group, groups) for group in groups]
    pairs = zip(groups, baselines, strict=True)
    rows = [_figures(group, base, bases.get(group.label)) for group, base in pairs]
    report: Fields = {"groups": rows, "scaling": None}
    if bases:
        losses = [row["val/loss"] for row in rows if row["kind"] not in (BASE, verdict.MIRROR)]
        spreads = [loss["std"] for loss in losses if loss["std"] is not None]
        report["noise_floor"] = noise = float(np.median(spreads)) if spreads else None
        sentences, faults = verdict.on_adaptations(rows, noise)
        warnings += faults
    else:
        report["scaling"] = _scaling(groups)
        labels = dict.fromkeys(base.label for base in baselines if base)
        sentences = verdict.on_training(list(labels), rows, report["scaling"])
    return report | {"warnings": warnings, "sentences": sentences}


def _leave_out_unfinished(groups: list[Group]) -> tuple[list[Group], list[str]]:
    """Drop the unfinished runs of a group that has finished ones: their last loss is not final."""
    kept, warnings = [], []
    for group in groups:
        finished = [run for run in group.runs if run.finished]
        fate = "left out" if finished else "used as far as it got"
        for run in (run for run in group.runs if not run.finished):
            at = f"step {run.metrics[-1]['step']} of {run.job.train.num_steps}"
            warnings.append(f"{run.path} is still going or was stopped ({at}): it is {fate}")
        kept.append(replace(group, runs=finished or group.runs))
    return kept, warnings


def _baseline(group: Group, groups: list[Group]) -> Group | None:
    """The transformer or ``attn_only``, else the first architecture given.

    Of several such groups, the one with the group's shape and recipe.
    """
    kinds = [g.kind for g in groups]
    baseline = next((kind for kind in ("transformer", CONTROL) if kind in kinds), kinds[0])
    candidates = [g for g in groups if g.kind == baseline]
    if len(candidates) == 1 or len({*kinds}) == 1:
        return candidates[0]
    return next((g for g in candidates if g.common == group.common), None)


def _figures(group: Group, base: Group | None, pretrained: Group | None) -> Fields:
    adapted = "dex.variant" in group.settings
    final = group.final("val/loss")
    speeds = [run.curve("train/tokens_per_second")[1] for run in group.runs]
    medians = [np.median(speed) for speed in speeds if speed.size]
    rival = None if base is group else base
    branches = (run.summary.get("branch") for run in group.runs)
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
        "difference": _difference(final, rival),
        "difference_to_base": _difference(final, pretrained),
        "branch": next(filter(None, branches), None),
        # An adaptation starts from the base's loss and not from chance.
        "tokens_at_equal_loss": _equal_loss(group, rival) if rival and not adapted else None,
        "curve": _curve(*group.curves()),
        "difference_curve": _difference_curve(group, rival),
    }


def _difference(final: dict[int, float], base: Group | None) -> Fields | None:
    return paired_difference(final, base.final("val/loss"))._asdict() if base else None


def _curve(tokens: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    """Mean and range over the runs, of values (runs, n) at tokens (n,)."""
    lines = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    return {name: line.tolist() for name, line in {"tokens": tokens, **lines}.items()}


def _difference_curve(group: Group, base: Group | None) -> dict[str, list[float]] | None:
    """The group's validation curves minus the baseline's by seed; None without shared seeds."""
    if base is None or group.kind == BASE:
        return None
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    grid = tokens[(tokens >= base_tokens[0]) & (tokens <= base_tokens[-1])]
    base_curves = dict(zip((run.job.seed for run in base.runs), base_losses, strict=True))
    gaps = [
        np.interp(grid, tokens, row) - np.interp(grid, base_tokens, base_curves[run.job.seed])
        for run, row in zip(group.runs, losses, strict=True)
        if run.job.seed in base_curves
    ]
    return _curve(grid, np.stack(gaps)) if gaps and grid.size else None


def _spread(by_seed: dict[int, float]) -> Fields | None:
    if not by_seed:
        return None
    values = list(by_seed.values())
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "by_seed": by_seed}


def _equal_loss(group: Group, base: Group) -> Fields | None:
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    equal = tokens_at_equal_loss((tokens, losses.mean(0)), (base_tokens, base_losses.mean(0)))
    if equal is None:
        return None
    sentence = verdict.on_equal_loss(group.label, base.label, equal)
    return equal._asdict() | {"ratio": equal.ratio, "sentence": sentence}


def _scaling(groups: list[Group]) -> Fields | None:
    """Power laws of the architectures that were run in three sizes or more, if two of them were.

    N is the number of parameters that are no embedding.
    """
    laws: dict[str, tuple[PowerLaw, list[int]]] = {}
    fits = []
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        points = {
            g.parameters["rest"]: float(np.mean(list(g.final("val/loss").values())))
            for g in of_kind
            if g.parameters
        }
        if len(points) == len(of_kind) >= 3:
            sizes = sorted(points)
            losses = [points[size] for size in sizes]
            law = fit_power_law(sizes, losses)
            laws[kind] = law, sizes
            sentence = verdict.on_power_law(kind, law, len(sizes))
            fit = {"kind": kind, "parameters": sizes, "losses": losses}
            fits.append(fit | law._asdict() | {"sentence": sentence})
    if len(laws) < 2:
        return None
    base = "transformer" if "transformer" in laws else next(iter(laws))
    base_law, base_sizes = laws.pop(base)
    largest, loss = base_sizes[-1], base_law.loss(base_sizes[-1])
    pairs = []
    for kind, (law, sizes) in laws.items():
        needed = law.parameters(loss)
        pair: Fields = {"kind": kind, "baseline": base, "loss": loss, "ratio": None}
        if np.isfinite(needed):
            pair |= {"parameters": needed, "baseline_parameters": largest}
            pair["extrapolated"] = not sizes[0] <= needed <= sizes[-1]
            pair["ratio"] = needed / largest
        pairs.append(pair | {"sentence": verdict.on_parameters(pair, largest, sizes)})
    return {"laws": fits, "equal_loss": pairs}


def _warnings(groups: list[Group]) -> list[str]:
    lines = [
        f"{group.label} ran a seed more than once: each seed counts once, by its mean"
        for group in groups
        if len(group.final("val/loss")) < len(group.runs)
    ]
    runs = [run for group in groups for run in group.runs]
    for name, key in (("data", "sha256"), ("tokenizers", "tokenizer")):
        if len({str(run.data.get(key)) for run in runs}) > 1:
            differs = f"different {name} (`{key}` in data.json differs)"
            lines.append(f"not comparable: the runs used {differs}")
    lengths = {run.curve("val/loss")[0][-1] for run in runs}
    if len(lengths) > 1:
        counts = " and ".join(figure(length) for length in sorted(lengths))
        lines.append(f"not comparable: final losses are at different token counts, {counts}")
    settings = [group.common for group in groups]
    for key in dict.fromkeys(key for s in settings for key in s if key not in SHAPE_KEYS):
        values = dict.fromkeys(as_word(s.get(key)) for s in settings)
        if len(values) > 1:
            lines.append(f"not the same recipe: {key} is {' and '.join(values)}")
    return lines
