"""What a comparison of DEX with its controls shows: which variants differ from ``attn_only`` by more than the noise, and from the base."""

from typing import Any

import numpy as np

from diffx.results.runs import BASE

CONTROL = "attn_only"
_MIRROR = "dex_mirror"
_ROUNDING = 1e-4  # nats a token: on a GPU the mirrored pair may differ by the order of sums, and by no more


def noise_floor(rows: list[dict[str, Any]]) -> float | None:
    """The median over variants of the standard deviation of the final loss over seeds, in nats a token; None with one seed each."""
    spreads = [row["val/loss"]["std"] for row in rows if row["kind"] not in (BASE, _MIRROR) and row["val/loss"]["std"] is not None]
    return float(np.median(spreads)) if spreads else None


def read_adaptations(rows: list[dict[str, Any]], noise: float | None) -> tuple[list[str], list[str]]:
    """Say what the rows of a comparison of adaptations show, beside the noise floor.

    Returns:
        Sentences; and warnings, where a mirrored pair is not equal.
    """
    if noise is None:
        sentences = ["One seed each: the noise floor, which is the spread over seeds, is not known, and no difference is told from chance."]
    else:
        sentences = [
            f"Noise floor: {noise:.4f} nats a token, the standard deviation of the final loss over seeds (median of the variants)."
        ]
        for control in (row["label"] for row in rows if row["kind"] == CONTROL):
            sentences += _against(control, rows, noise)
    sentences += [_share(row, rows) for row in rows if row["kind"] == "dex"]
    sentences += [f"{row['label']}, seed {row['seeds'][0]}: {row['branch']}." for row in rows if row["branch"] and row["kind"] != _MIRROR]
    warnings = []
    for row in rows:
        twin = next((dex for dex in rows if row["kind"] == _MIRROR and dex["label"] == row["label"].replace(_MIRROR, "dex", 1)), None)
        if twin and (seeds := set(row["seeds"]) & set(twin["seeds"])):
            gap = max(abs(row["val/loss"]["by_seed"][seed] - twin["val/loss"]["by_seed"][seed]) for seed in seeds)
            pair = f"{twin['label']} and its mirror image {row['label']} end"
            if gap > _ROUNDING:
                warnings.append(f"{pair} up to {gap:.2g} nats a token apart: but for rounding they must be equal, so something is broken")
            else:
                sentences.append(f"{pair} with the same loss, as they must ({f'but for {gap:.1g}' if gap else 'to the last digit'}).")
    return sentences, warnings


def _against(control: str, rows: list[dict[str, Any]], noise: float) -> list[str]:
    """Name the variants that differ from the control by more than the noise, by less than it, and not clearly at all."""
    found: dict[str, list[str]] = {"more": [], "less": [], "unclear": []}
    for row in rows:
        if row["baseline"] != control or not row["difference"] or row["kind"] in (BASE, _MIRROR):
            continue
        gap, low, high = (row["difference"][key] for key in ("mean", "low", "high"))
        if low is None or low <= 0 <= high:
            found["unclear"].append(row["label"])
        else:
            words = f"{row['label']} ({abs(gap):.4f} {'better' if gap < 0 else 'worse'})"
            found["more" if abs(gap) > noise else "less"].append(words)
    more, less, unclear = (", ".join(names) for names in found.values())
    lines = [f"Different from {control} by more than the noise, with intervals that exclude zero: {more or 'none'}."]
    lines += [f"Different by less than the noise, though the interval excludes zero: {less}."] if less else []
    return lines + ([f"Not to be told from {control}: {unclear}."] if unclear else [])


def _share(dex: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """How much of what DEX gains over the base its control gains without the branch."""
    gain = -dex["difference_to_base"]["mean"]
    if gain <= 0:
        return f"{dex['label']} ends {-gain:.4f} nats a token above the base: it made it no better."
    sentence = f"{dex['label']} ends {gain:.4f} nats a token below the base"
    control = next((row for row in rows if row["label"] == dex["baseline"] and row["kind"] == CONTROL), None)
    if control is None:
        return f"{sentence}; without {CONTROL} there is no telling what the branch has to do with it."
    return f"{sentence}; {control['label']}, which has no branch, gains {-control['difference_to_base']['mean'] / gain:.0%} of that."
