"""What one model costs against another: sentences on training and inference, at equal parameters and at equal loss."""

from typing import Any

from diffx.console import figure
from diffx.results.curves import tokens_at_equal_loss
from diffx.results.runs import Run

_UNIT = "tokens/s"
_TRAIN = "train"
_EQUAL = 0.02  # counts that differ by no more than this share are called equal


def speed_sentences(
    base: str, rival: str, rows: list[dict[str, Any]], sizes: tuple[float, float], runs: tuple[Run, Run] | None
) -> list[str]:
    """Say what the rival costs against the baseline.

    At equal parameters that is the ratio of throughputs; at equal loss, for training, the ratio of the times to reach the worse one's
    final loss: the share of the baseline's tokens that the rival needs, divided by the ratio of throughputs.

    Args:
        base: the baseline's name.
        rival: the other's.
        rows: ratios of the rival to the baseline by group and score, averages last.
        sizes: parameters of both, the baseline's first.
        runs: the runs of both, the baseline first; None where one is no run of ours.
    """
    equal = "equal" if abs(sizes[1] / sizes[0] - 1) <= _EQUAL else "unequal"
    size = f"at {equal} parameters ({figure(sizes[0])} and {figure(sizes[1])})"
    sentences, costs = [], {}
    for metric in dict.fromkeys(row["metric"] for row in rows if row["unit"] == _UNIT):
        phase = metric.removesuffix(f" {_UNIT}")
        cells = [row for row in rows if row["metric"] == metric]
        ratio, low, high = (cells[-1][key] for key in ("difference", "low", "high"))
        known = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        shapes = [row["difference"] for row in cells if row["groups"] == 1]
        spread = f"; {min(shapes):.3f} to {max(shapes):.3f} by shape" if len(shapes) > 1 else ""
        sentences.append(f"{phase}, {size}: {rival} does {ratio:.3f}{known} of {base}'s tokens a second{spread}.")
        if phase == _TRAIN:
            sentences.append(_at_equal_loss(base, rival, ratio, runs))
        told = low is not None and not low <= 1 <= high
        costs[phase] = ("slower" if ratio < 1 else "faster") if told else "neither clearly slower nor faster"
    if not costs:
        return []
    verdicts = [f"{word} at {', '.join(phase for phase in costs if costs[phase] == word)}" for word in dict.fromkeys(costs.values())]
    return [
        *sentences,
        f"So {size} {rival} is {'; '.join(verdicts)}, against {base}.",
        "(Intervals are over rounds: what else the machine did while it measured the one and the other model is not in them.)",
    ]


def _at_equal_loss(base: str, rival: str, ratio: float, runs: tuple[Run, Run] | None) -> str:
    theirs, ours = (run.curve("val/loss") for run in runs) if runs else (None, None)
    equal = tokens_at_equal_loss(ours, theirs) if ours and theirs and ours[0].size and theirs[0].size else None
    if equal is None:
        return f"{_TRAIN}, at equal loss: not known; that takes two runs, the better of which passes the other's final validation loss."
    time = equal.ratio / ratio
    return (
        f"{_TRAIN}, at equal loss ({equal.loss:.4f}): {rival} needs {equal.ratio:.1%} of {base}'s tokens at {ratio:.3f} of its speed, "
        f"which is {time:.1%} of its time: {'less' if time < 1 else 'more'}. Inference costs at equal loss what it costs at these sizes."
    )
