"""What a second attention map costs: sentences on training and inference, at equal parameters and at equal loss."""

from typing import Any

from diffx.console import figure
from diffx.report.runs import Run
from diffx.report.statistics import EqualLoss, tokens_at_equal_loss

_UNIT = "tokens/s"
_EQUAL = 0.02  # counts that differ by no more than this share are called equal


def speed_sentences(base: str, rival: str, rows: list[dict[str, Any]], runs: tuple[Run, Run] | None) -> list[str]:
    """Say what the rival costs against the baseline.

    At equal parameters that is the ratio of throughputs; at equal loss, for training, the ratio of the times to reach the worse one's
    final loss: its share of the baseline's tokens, divided by the ratio of throughputs.

    Args:
        base: the baseline's name.
        rival: the other's.
        rows: ratios of the rival to the baseline by group and score.
        runs: the runs of both, the baseline first; None where one is no run of ours.
    """
    phases = list(dict.fromkeys(row["score"] for row in rows if row["score"].endswith(_UNIT)))
    size = _sizes(runs)
    sentences, costs = [], {}
    for score in phases:
        phase = score.removesuffix(_UNIT).strip() or "all"
        cells = [row for row in rows if row["score"] == score]
        ratio = cells[-1]["difference"]  # the average, which stands last, or the only one
        low, high = min(row["low"] or row["difference"] for row in cells), max(row["high"] or row["difference"] for row in cells)
        costs[phase] = "slower" if high < 1 else "faster" if low > 1 else "level"
        spread = f", {low:.3f} to {high:.3f} over shapes and rounds" if low < high else ""
        sentences.append(f"{phase.capitalize()}, {size}: {rival} does {ratio:.3f} of {base}'s tokens a second{spread}.")
        if phase.startswith("train"):
            sentences.append(_at_equal_loss(base, rival, ratio, runs))
    told = [f"{word} at {_and([p for p, c in costs.items() if c == word])}" for word in ("slower", "faster") if word in costs.values()]
    level = [phase for phase, cost in costs.items() if cost == "level"]
    told += [f"neither clearly slower nor faster at {_and(level)}"] if level else []
    return [*sentences, f"In short, {size}: {rival} is {', '.join(told)}, against {base}."] if told else sentences


def _sizes(runs: tuple[Run, Run] | None) -> str:
    counts = [run.summary.get("parameters", {}).get("total") for run in runs or ()]
    if not counts or None in counts:
        return "at the sizes they have"
    theirs, ours = counts
    equal = "equal" if abs(ours / theirs - 1) <= _EQUAL else "unequal"
    return f"at {equal} parameters ({figure(ours)} and {figure(theirs)})"


def _at_equal_loss(base: str, rival: str, ratio: float, runs: tuple[Run, Run] | None) -> str:
    equal = _equal_loss(runs)
    if equal is None:
        return "Train, at equal loss: not known, since that needs two runs whose validation curves meet."
    time = equal.ratio / ratio
    verdict = "less" if time < 1 else "more"
    return (
        f"Train, at equal loss ({equal.loss:.4f}): {rival} needs {equal.ratio:.1%} of {base}'s tokens at {ratio:.3f} of its speed, so "
        f"{time:.1%} of its time: it costs {verdict}. Inference at equal loss costs what it does at these sizes."
    )


def _equal_loss(runs: tuple[Run, Run] | None) -> EqualLoss | None:
    theirs, ours = (run.curve("val/loss") for run in runs) if runs else (None, None)
    return tokens_at_equal_loss(ours, theirs) if ours and theirs and ours[0].size and theirs[0].size else None


def _and(items: list[str]) -> str:
    return " and ".join(items)
