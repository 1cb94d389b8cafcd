"""Every figure and sentence of a comparison, worked out of groups of runs."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from diffx.console import figure
from diffx.results.adaptations import CONTROL, noise_floor, read_adaptations
from diffx.results.curves import tokens_at_equal_loss
from diffx.results.runs import BASE, SHAPE_KEYS, Group, as_word, base_groups
from diffx.results.scaling import PowerLaw, fit_power_law
from diffx.results.statistics import paired_difference


def analyse(groups: list[Group]) -> dict[str, Any]:
    """Work out every figure of the comparison, JSON-able: groups, scaling, warnings and sentences.

    Losses are in nats a token; ``difference`` and ``tokens_at_equal_loss`` are against the group's baseline. Adaptations have the
    pretrained model as a group of its own, first, ``difference_to_base``, and ``noise_floor``.
    """
    groups, warnings = _leave_out_unfinished(groups)
    warnings += _warnings(groups)
    bases = base_groups(groups)
    groups = [*{base.label: base for base in bases.values()}.values(), *groups]
    baselines = [_baseline(group, groups) for group in groups]
    rows = [_figures(group, base, bases.get(group.label)) for group, base in zip(groups, baselines, strict=True)]
    if bases:
        noise = noise_floor(rows)
        sentences, faults = read_adaptations(rows, noise)
        return {"groups": rows, "scaling": None, "noise_floor": noise, "warnings": warnings + faults, "sentences": sentences}
    scaling = _scaling(groups)
    sentences = [_verdict(base, rows) for base in dict.fromkeys(b.label for b in baselines if b is not None)]
    sentences += [row["tokens_at_equal_loss"]["sentence"] for row in rows if row["tokens_at_equal_loss"]]
    if any(row["tokens_at_equal_loss"] for row in rows):
        sentences.append(
            "(Read off the mean validation curves; where the learning rate decays, a curve's middle lies above the end of a shorter run.)"
        )
    if scaling:
        sentences += [law["sentence"] for law in scaling["laws"]] + [pair["sentence"] for pair in scaling["equal_loss"]]
    return {"groups": rows, "scaling": scaling, "warnings": warnings, "sentences": [s for s in sentences if s]}


def _leave_out_unfinished(groups: list[Group]) -> tuple[list[Group], list[str]]:
    """Drop a group's unfinished runs if it has finished ones: their last loss is not a final one."""
    kept, warnings = [], []
    for group in groups:
        finished = [run for run in group.runs if run.finished]
        for run in group.runs:
            if not run.finished:
                fate = "left out" if finished else "used as far as it got"
                at = f"step {run.metrics[-1]['step']} of {run.job.train.num_steps}"
                warnings.append(f"{run.path} is still going or was stopped ({at}): it is {fate}")
        kept.append(replace(group, runs=finished or group.runs))
    return kept, warnings


def _baseline(group: Group, groups: list[Group]) -> Group | None:
    """The transformer or ``attn_only`` (else the first architecture given); of several, the one with the group's shape and recipe."""
    kinds = [g.kind for g in groups]
    pool = [g for g in groups if g.kind == next((kind for kind in ("transformer", CONTROL) if kind in kinds), kinds[0])]
    if len(pool) == 1 or len(set(kinds)) == 1:
        return pool[0]
    return next((g for g in pool if g.common == group.common), None)


def _figures(group: Group, base: Group | None, pretrained: Group | None) -> dict[str, Any]:
    adapted = "dex.variant" in group.settings
    tokens, losses = group.curves()
    final, bpb = group.final("val/loss"), group.final("val/bpb")
    speeds = [np.median(run.curve("train/tokens_per_second")[1]) for run in group.runs if run.curve("train/tokens_per_second")[1].size]
    difference = difference_curve = equal = None
    if base is not None and base is not group:
        difference = asdict(paired_difference(final, base.final("val/loss")))
        difference_curve = None if group.kind == BASE else _difference_curve(group, base)
        equal = None if adapted else _equal_loss(group, base)  # an adaptation starts from the base's loss and not from chance
    return {
        "label": group.label,
        "kind": group.kind,
        "adapted": adapted,
        "runs": [str(run.path) for run in group.runs],
        "seeds": list(final),
        "parameters": group.parameters,
        "tokens": 0.0 if group.kind == BASE else max(run.curve("val/loss")[0][-1] for run in group.runs),
        "val/loss": _spread(final),
        "val/bpb": _spread(bpb),
        "tokens_per_second": float(np.mean(speeds)) if speeds else None,
        "baseline": base.label if base else None,
        "difference": difference,
        "difference_to_base": asdict(paired_difference(final, pretrained.final("val/loss"))) if pretrained else None,
        "branch": next((run.summary["branch"] for run in group.runs if run.summary.get("branch")), None),
        "tokens_at_equal_loss": equal,
        "curve": _curve(tokens, losses),
        "difference_curve": difference_curve,
    }


def _curve(tokens: np.ndarray, values: np.ndarray) -> dict[str, list[float]]:
    """Mean and range over the runs, of values (runs, n) at tokens (n,)."""
    return {"tokens": tokens.tolist(), "mean": values.mean(0).tolist(), "low": values.min(0).tolist(), "high": values.max(0).tolist()}


def _difference_curve(group: Group, base: Group) -> dict[str, list[float]] | None:
    """The group's validation curves minus the baseline's, seed by seed; None if they share no seed."""
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    grid = tokens[(tokens >= base_tokens[0]) & (tokens <= base_tokens[-1])]
    theirs = {run.job.seed: np.interp(grid, base_tokens, row) for run, row in zip(base.runs, base_losses, strict=True)}
    pairs = [(run.job.seed, row) for run, row in zip(group.runs, losses, strict=True) if run.job.seed in theirs]
    return _curve(grid, np.stack([np.interp(grid, tokens, row) - theirs[seed] for seed, row in pairs])) if pairs and grid.size else None


def _spread(by_seed: dict[int, float]) -> dict[str, Any] | None:
    if not by_seed:
        return None
    values = list(by_seed.values())
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None, "by_seed": by_seed}


def _equal_loss(group: Group, base: Group) -> dict[str, Any] | None:
    (tokens, losses), (base_tokens, base_losses) = group.curves(), base.curves()
    equal = tokens_at_equal_loss((tokens, losses.mean(0)), (base_tokens, base_losses.mean(0)))
    if equal is None:
        return None
    ours, theirs = figure(equal.tokens), figure(equal.baseline_tokens)
    if equal.better:
        sentence = f"{group.label} reaches {base.label}'s final loss of {equal.loss:.4f} with {ours} tokens instead of {theirs}"
    else:
        sentence = f"{base.label} reaches {group.label}'s final loss of {equal.loss:.4f} with {theirs} tokens instead of {ours}"
    needs = f"{group.label} needs {equal.ratio:.1%} of {base.label}'s tokens at equal loss"
    return {**asdict(equal), "ratio": equal.ratio, "sentence": f"{sentence}: {needs}."}


def _verdict(baseline: str, rows: list[dict[str, Any]]) -> str:
    """One sentence: the baseline against the best of the groups that are held against it."""
    rivals = [row for row in rows if row["baseline"] == baseline and row["difference"]]
    if not rivals:
        return ""
    best = min(rivals, key=lambda row: row["difference"]["mean"])
    choice = f" It is the best of {len(rivals)}, which flatters it." if len(rivals) > 1 else ""
    gap, low, high, pairs = (best["difference"][key] for key in ("mean", "low", "high", "pairs"))
    distance = f"{abs(gap):.4f} nats a token {'below' if gap < 0 else 'above'} {baseline}"
    if low is None:
        seeds = "one seed in common" if pairs else "no seed in common"
        return f"{best['label']} ends {distance}, with {seeds}: too few to tell the difference from chance.{choice}"
    interval = f"95% interval {low:+.4f} to {high:+.4f} over {pairs} paired seeds"
    if low <= 0 <= high:
        return f"No winner: {best['label']} ends {distance}, but the {interval} includes zero.{choice}"
    winner = f"{best['label']} wins: it" if gap < 0 else f"{baseline} wins: {best['label']}"
    return f"{winner} ends {distance}, and the {interval} excludes zero.{choice}"


def _scaling(groups: list[Group]) -> dict[str, Any] | None:
    """Power laws of the architectures that were run in three sizes or more, if two of them were.

    N is the number of parameters that are no embedding.
    """
    laws: dict[str, tuple[list[int], list[float], PowerLaw]] = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        points = sorted((g.parameters["rest"], float(np.mean(list(g.final("val/loss").values())))) for g in of_kind if g.parameters)
        sizes, losses = [n for n, _ in points], [loss for _, loss in points]
        if len(points) == len(of_kind) and len(set(sizes)) == len(sizes) >= 3:
            laws[kind] = (sizes, losses, fit_power_law(sizes, losses))
    if len(laws) < 2:
        return None
    base = "transformer" if "transformer" in laws else next(iter(laws))
    fits = [
        {"kind": kind, "parameters": sizes, "losses": losses, **asdict(law), "sentence": _law_sentence(kind, law, len(sizes))}
        for kind, (sizes, losses, law) in laws.items()
    ]
    pairs = [_equal_parameters(kind, base, laws) for kind in laws if kind != base]
    return {"laws": fits, "equal_loss": pairs}


def _law_sentence(kind: str, law: PowerLaw, sizes: int) -> str:
    floor = f" + {law.c:.3f}" if law.c else ""
    return (
        f"{kind}: loss = {law.a:.4g}·N^{-law.b:.4f}{floor} over {sizes} sizes, N the parameters without embeddings; "
        f"no size is further from it than {law.error:.2%}."
    )


def _equal_parameters(kind: str, base: str, laws: dict[str, tuple[list[int], list[float], PowerLaw]]) -> dict[str, Any]:
    """How many parameters an architecture needs for the fitted loss of the baseline's largest size."""
    sizes, _, law = laws[kind]
    largest, base_law = laws[base][0][-1], laws[base][2]
    loss = base_law.loss(largest)
    needed = law.parameters(loss)
    outside = not sizes[0] <= needed <= sizes[-1]
    what = f"the loss of the largest {base} ({figure(largest)} parameters, {loss:.4f} by its fit)"
    if np.isinf(needed):
        return {
            "kind": kind,
            "baseline": base,
            "loss": loss,
            "ratio": None,
            "sentence": f"{kind} does not reach {what} at any size, by its fit.",
        }
    sentence = f"{kind} reaches {what} with {figure(needed)}: {needed / largest:.1%} of the parameters."
    if outside:
        sentence += f" That is extrapolated: its sizes went from {figure(sizes[0])} to {figure(sizes[-1])}."
    return {
        "kind": kind,
        "baseline": base,
        "loss": loss,
        "parameters": needed,
        "baseline_parameters": largest,
        "ratio": needed / largest,
        "extrapolated": outside,
        "sentence": sentence,
    }


def _warnings(groups: list[Group]) -> list[str]:
    """What makes the runs less comparable than the table looks."""
    runs = [run for group in groups for run in group.runs]
    lines = []
    for group in groups:
        if len(group.final("val/loss")) < len(group.runs):
            lines.append(f"{group.label} ran a seed more than once: each seed counts once, by its mean")
    for what, key in (("data", "sha256"), ("tokenizers", "tokenizer")):
        if len({str(run.data.get(key)) for run in runs}) > 1:
            lines.append(f"not comparable: the runs used different {what} (`{key}` in data.json differs)")
    lengths = {run.curve("val/loss")[0][-1] for run in runs}
    if len(lengths) > 1:
        lines.append(f"not comparable: final losses are at different token counts, {_list(figure(n) for n in sorted(lengths))}")
    settings = [group.common for group in groups]
    for key in dict.fromkeys(key for s in settings for key in s):
        values = list(dict.fromkeys(as_word(s.get(key)) for s in settings))
        if key not in SHAPE_KEYS and len(values) > 1:
            lines.append(f"not the same recipe: {key} is {_list(values)}")
    return lines


def _list(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
