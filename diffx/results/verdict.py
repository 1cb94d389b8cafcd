"""What a comparison shows, as sentences made of its figures: every verdict is written here."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffx.console import figure
from diffx.results.curves import Curve, EqualLoss, PowerLaw, tokens_at_equal_loss
from diffx.results.runs import BASE, CONTROL

FEW = 10  # examples below which no verdict is given
MIRROR = "dex_mirror"
_ROUNDING = 1e-4  # nats a token, by which a mirrored pair may differ in the order of sums on a GPU
_EQUAL = 5e-5  # a change that is smaller is shown as 0
_EQUAL_SIZE = 0.02  # parameter counts that differ by no more than this share are called equal
_SPEED = "tokens/s"

Row = Mapping[str, Any]


def decimal(value: float, digits: int = 3, sign: str = "") -> str:
    """A number with so many decimals, or one decimal from 100 on; ``sign`` as in a format."""
    return f"{value:{sign}.{digits}f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def signed(value: float) -> str:
    """A difference with its sign, to three decimals."""
    return decimal(value, sign="+")


def ends(row: Row, text: Callable[[float], str] = "{:+.4f}".format) -> str:
    """The interval of a row in brackets behind a space; empty where it is not known."""
    return "" if row["low"] is None else f" [{text(row['low'])}, {text(row['high'])}]"


# Suites of two checkpoints.


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows that sum a metric up: its averages, or its only group; else the first's groups."""
    paired = [row for row in rows if row["n"] and row["better"] != "none"]
    counts = Counter(row["metric"] for row in paired)
    metrics = list(counts)
    chosen = [row for row in paired if row["groups"] > 1 or counts[row["metric"]] == 1]
    chosen = chosen or [row for row in paired if row["metric"] == metrics[0]]
    return sorted(chosen, key=lambda row: metrics.index(row["metric"]))


def on_difference(suite: str, base: str, rival: str, row: Row, several: bool) -> str:
    """Whether a rival differs on a row of ``compare``; of several groups the row's is named."""
    metric = f"{suite} {row['metric']}" + (f" ({row['label']})" if several else "")
    gap = signed(row["difference"])
    if row["low"] is None or row["n"] < FEW:
        few = f"in too few examples ({row['n']})"
        return f"No verdict on {metric}: {rival} differs from {base} by {gap} {few}."
    gap += f"{ends(row, signed)} over {row['n']} examples"
    if row["low"] <= 0 <= row["high"]:
        return f"No difference can be told between {rival} and {base} on {metric}: {gap}."
    direction = "higher" if row["difference"] > 0 else "lower"
    judged = {direction: ", which is better", "none": ""}.get(row["better"], ", which is worse")
    return f"{rival} scores {direction} than {base} on {metric}{judged}: {gap}."


# Suites at several numbers of bits.


def cost_of_bits(cost: Row) -> str:
    """A change for the worse with its interval."""

    def text(value: float) -> str:
        return f"{value if abs(value) >= _EQUAL else 0.0:+.4f}"

    return text(cost["loss"]) + ends(cost, text)


def on_bits(models: Sequence[Row], exact: int) -> list[str]:
    """What each number of bits costs; who loses less is said where the intervals tell it.

    A model has its ``label`` and ``by_bits``: ``loss``, ``low``, ``high`` and ``n``. ``exact`` is
    the width of the model as it is.
    """
    shared = set.intersection(*({*model["by_bits"]} for model in models)) - {exact}
    return [_on_width(models, bits) for bits in sorted(shared, reverse=True)]


def _on_width(models: Sequence[Row], bits: int) -> str:
    costs = [model["by_bits"][bits] | {"label": model["label"]} for model in models]
    costs.sort(key=lambda cost: cost["loss"])
    told = ", ".join(f"{cost['label']} {cost_of_bits(cost)}" for cost in costs)
    line = f"Change for the worse at {bits} bits: {told}."
    if len(costs) == 1:
        return line
    least, most, n = costs[0], costs[-1], min(cost["n"] for cost in costs)
    first, last, gap = least["label"], most["label"], most["loss"] - least["loss"]
    if gap < _EQUAL:
        return f"{line} They lose alike."
    if n < FEW:
        return f"{line} No verdict: {n} examples are too few."
    if None not in (least["high"], most["low"]) and least["high"] < most["low"]:
        return f"{line} {first} loses less than {last}, by {gap:.4f}."
    overlap = "their intervals overlap or are not known"
    return f"{line} No verdict: {first} and {last} differ by {gap:.4f}, and {overlap}."


# Runs of `diffx train`.


def on_training(baselines: Sequence[str], rows: Sequence[Row], scaling: Row | None) -> list[str]:
    """Who wins against each baseline, the tokens at equal loss, and the scaling laws."""
    sentences = [_winner(baseline, rows) for baseline in baselines]
    equal = [row["tokens_at_equal_loss"] for row in rows if row["tokens_at_equal_loss"]]
    sentences += [tokens["sentence"] for tokens in equal]
    if equal:
        decay = "where the learning rate decays, a curve's middle lies above a shorter run's end"
        sentences.append(f"(Read off the mean validation curves; {decay}.)")
    if scaling:
        sentences += [fit["sentence"] for fit in (*scaling["laws"], *scaling["equal_loss"])]
    return [sentence for sentence in sentences if sentence]


def _winner(baseline: str, rows: Sequence[Row]) -> str:
    """The baseline against the best of the groups that are compared with it; empty without one."""
    rivals = [row for row in rows if row["baseline"] == baseline and row["difference"]]
    if not rivals:
        return ""
    best = min(rivals, key=lambda row: row["difference"]["mean"])
    label, difference = best["label"], best["difference"]
    gap, low, high, pairs = (difference[key] for key in ("mean", "low", "high", "pairs"))
    choice = f" It is the best of {len(rivals)}, which flatters it." if len(rivals) > 1 else ""
    distance = f"{abs(gap):.4f} nats a token {'below' if gap < 0 else 'above'} {baseline}"
    if low is None:
        few = f"{'one' if pairs else 'no'} seed in common: too few to exclude chance"
        return f"{label} ends {distance}, with {few}.{choice}"
    interval = f"the 95% interval{ends(difference)} over {pairs} paired seeds"
    if low <= 0 <= high:
        return f"No winner: {label} ends {distance}, but {interval} includes zero.{choice}"
    first = f"{label} wins: it" if gap < 0 else f"{baseline} wins: {label}"
    return f"{first} ends {distance}, and {interval} excludes zero.{choice}"


def on_equal_loss(label: str, baseline: str, equal: EqualLoss) -> str:
    """How many of the baseline's tokens a group needs for the worse one's final loss."""
    models = [(label, figure(equal.tokens)), (baseline, figure(equal.baseline_tokens))]
    (ahead, needed), (behind, spent) = models if equal.better else models[::-1]
    loss = f"{behind}'s final loss of {equal.loss:.4f}"
    needs = f"{label} needs {equal.ratio:.1%} of {baseline}'s tokens at equal loss"
    return f"{ahead} reaches {loss} with {needed} tokens instead of {spent}: {needs}."


def on_power_law(kind: str, law: PowerLaw, sizes: int) -> str:
    """The fitted law and how well it fits."""
    floor = f" + {law.c:.3f}" if law.c else ""
    return (
        f"{kind}: loss = {law.a:.4g}·N^-{law.b:.4f}{floor} over {sizes} sizes, N the parameters "
        f"without embeddings; no size is further from it than {law.error:.2%}."
    )


def on_parameters(pair: Row, largest: int, sizes: Sequence[int]) -> str:
    """How many of the baseline's parameters an architecture needs for the same loss."""
    kind, at = pair["kind"], f"{figure(largest)} parameters, {pair['loss']:.4f} by its fit"
    goal = f"the loss of the largest {pair['baseline']} ({at})"
    if pair["ratio"] is None:
        return f"{kind} does not reach {goal} at any size, by its fit."
    needed = f"{figure(pair['parameters'])}: {pair['ratio']:.1%} of the parameters"
    measured = f"its sizes went from {figure(sizes[0])} to {figure(sizes[-1])}"
    extrapolated = f" That is extrapolated: {measured}." if pair["extrapolated"] else ""
    return f"{kind} reaches {goal} with {needed}.{extrapolated}"


# Runs of `diffx adapt-dex`.


def on_adaptations(rows: Sequence[Row], noise: float | None) -> tuple[list[str], list[str]]:
    """What a comparison of DEX with its controls shows, and warnings where a mirror is not equal.

    ``noise`` is the spread of the final loss over seeds, in nats a token; None if not known.
    """
    sentences: list[str] = []
    warnings: list[str] = []
    if noise is None:
        unknown = "the noise floor, which is the spread over seeds, is not known"
        sentences.append(f"One seed each: {unknown}, and no difference is told from chance.")
    else:
        spread = "the standard deviation of the final loss over seeds (median of the variants)"
        sentences.append(f"Noise floor: {noise:.4f} nats a token, {spread}.")
        for control in (row["label"] for row in rows if row["kind"] == CONTROL):
            sentences += _against_control(control, rows, noise)
    every_dex = {row["label"]: row for row in rows if row["kind"] == "dex"}
    sentences += [_gain_of_dex(dex, rows) for dex in every_dex.values()]
    sentences += [
        f"{row['label']}, seed {row['seeds'][0]}: {row['branch']}."
        for row in rows
        if row["branch"] and row["kind"] != MIRROR
    ]
    for mirror in (row for row in rows if row["kind"] == MIRROR):
        dex = every_dex.get(mirror["label"].replace(MIRROR, "dex", 1))
        if dex is None:
            continue
        losses, mirrored = (row["val/loss"]["by_seed"] for row in (dex, mirror))
        seeds = losses.keys() & mirrored.keys()
        gap = max((abs(losses[seed] - mirrored[seed]) for seed in seeds), default=0.0)
        pair = f"{dex['label']} and its mirror image {mirror['label']} end"
        if gap > _ROUNDING:
            must = "but for rounding they must be equal, so something is broken"
            warnings.append(f"{pair} up to {gap:.2g} nats a token apart: {must}")
        else:
            digits = f"but for {gap:.1g}" if gap else "to the last digit"
            sentences.append(f"{pair} with the same loss, as they must ({digits}).")
    return sentences, warnings


def _against_control(control: str, rows: Sequence[Row], noise: float) -> list[str]:
    more, less, unclear = (
        f"Different from {control} by more than the noise, with intervals that exclude zero",
        "Different by less than the noise, though the interval excludes zero",
        f"Not to be told from {control}",
    )
    variants: dict[str, list[str]] = {more: [], less: [], unclear: []}
    for row in rows:
        if row["baseline"] != control or not row["difference"] or row["kind"] in (BASE, MIRROR):
            continue
        gap, low, high = (row["difference"][key] for key in ("mean", "low", "high"))
        if low is None or low <= 0 <= high:
            variants[unclear].append(row["label"])
        else:
            text = f"{row['label']} ({abs(gap):.4f} {'better' if gap < 0 else 'worse'})"
            variants[more if abs(gap) > noise else less].append(text)
    return [
        f"{sentence}: {', '.join(labels) or 'none'}."
        for sentence, labels in variants.items()
        if labels or sentence is more
    ]


def _gain_of_dex(dex: Row, rows: Sequence[Row]) -> str:
    """How much of what DEX gains over the base its control gains without the branch."""
    label, gain = dex["label"], -dex["difference_to_base"]["mean"]
    if gain <= 0:
        return f"{label} ends {-gain:.4f} nats a token above the base: it made it no better."
    sentence = f"{label} ends {gain:.4f} nats a token below the base"
    for control in rows:
        if control["label"] == dex["baseline"] and control["kind"] == CONTROL:
            share = -control["difference_to_base"]["mean"] / gain
            return (
                f"{sentence}; {control['label']}, which has no branch, gains {share:.0%} of that."
            )
    return f"{sentence}; without {CONTROL} there is no telling what the branch has to do with it."


# `suite=speed`.


def on_speed(
    base: str, rival: str, rows: Sequence[Row], sizes: Sequence[float], curves: Sequence[Curve]
) -> list[str]:
    """What one model costs against another, at equal parameters and at equal loss.

    At equal parameters that is the ratio of throughputs; at equal loss, for training, the share of
    the baseline's tokens that the rival needs for the worse one's final loss, divided by that
    ratio. ``rows`` are of ``compare``, averages last; ``sizes`` are the parameters of the baseline
    and the rival; ``curves`` are the validation curves of those of them that are runs.
    """
    equal = "equal" if abs(sizes[1] / sizes[0] - 1) <= _EQUAL_SIZE else "unequal"
    size = f"at {equal} parameters ({figure(sizes[0])} and {figure(sizes[1])})"
    sentences: list[str] = []
    phases: dict[str, list[str]] = {}  # by verdict
    for metric in dict.fromkeys(row["metric"] for row in rows if row["unit"] == _SPEED):
        phase = metric.removesuffix(f" {_SPEED}")
        cells = [row for row in rows if row["metric"] == metric]
        whole, shapes = cells[-1], [row["difference"] for row in cells if row["groups"] == 1]
        ratio, low, high = (whole[key] for key in ("difference", "low", "high"))
        spread = f"; {min(shapes):.3f} to {max(shapes):.3f} by shape" if len(shapes) > 1 else ""
        does = f"{ratio:.3f}{ends(whole, '{:.3f}'.format)} of {base}'s tokens a second{spread}"
        sentences.append(f"{phase}, {size}: {rival} does {does}.")
        if phase == "train":
            sentences.append(_speed_at_equal_loss(base, rival, ratio, curves))
        word = "slower" if ratio < 1 else "faster"
        if low is None or low <= 1 <= high:
            word = "neither clearly slower nor faster"
        phases.setdefault(word, []).append(phase)
    if phases:
        verdicts = "; ".join(f"{word} at {', '.join(names)}" for word, names in phases.items())
        sentences += [
            f"So {size} {rival} is {verdicts}, against {base}.",
            "(Intervals are over rounds; other work of the machine is not in them.)",
        ]
    return sentences


def _speed_at_equal_loss(base: str, rival: str, ratio: float, curves: Sequence[Curve]) -> str:
    known = len(curves) == 2 and all(tokens.size for tokens, _ in curves)
    equal = tokens_at_equal_loss(curves[1], curves[0]) if known else None
    if equal is None:
        passes = "the better of which passes the other's final validation loss"
        return f"train, at equal loss: not known; that takes two runs, {passes}."
    time = equal.ratio / ratio
    needs = f"{rival} needs {equal.ratio:.1%} of {base}'s tokens at {ratio:.3f} of its speed"
    less = f"{time:.1%} of its time: {'less' if time < 1 else 'more'}"
    return f"train, at equal loss ({equal.loss:.4f}): {needs}, which is {less}."


# `diffx experiment`.


def on_effect(effect: Row) -> str:
    """The verdict on one effect of a report of ``diffx experiment``, with its reasons."""
    ruling, name = effect["ruling"], effect["name"]
    confidence = f"{100 * (1 - ruling['level']):.4g}%"
    unit = f" {effect['unit']}" if effect["unit"] else ""
    figures = f"{effect['estimate']:.4g}{unit} [{effect['low']:.4g}, {effect['high']:.4g}]"
    claim = f"{effect['direction']} by at least {effect['smallest']:.4g}"
    if effect["measure"] != "difference":
        claim = f"{effect['direction']}, {effect['smallest']:.4g} or beyond"
    line = (
        f"{name}: {ruling['verdict']}. {figures}, {confidence} interval over {ruling['seeds']} "
        f"paired seeds; of interest is {claim}."
    )
    if ruling["verdict"] == "undecided":
        needed = ruling["seeds_needed"]
        seeds = "more than 1000 seeds" if needed is None else f"{needed} seeds"
        line += f" {seeds} would decide it at 80% power, by the spread seen."
    return line
