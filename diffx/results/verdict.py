"""What a comparison shows, as sentences made of its figures: every verdict is written here."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffx.console import figure
from diffx.results.curves import Curve, EqualLoss, tokens_at_equal_loss
from diffx.results.runs import BASE, CONTROL
from diffx.results.scaling import PowerLaw

FEW = 10  # examples below which no verdict is given
MIRROR = "dex_mirror"
_ROUNDING = 1e-4  # nats a token, by which a mirrored pair may differ in the order of sums on a GPU
_EQUAL = 5e-5  # a change that is smaller is shown as 0
_EQUAL_SIZE = 0.02  # parameter counts that differ by no more than this share are called equal
_SPEED = "tokens/s"

Row = Mapping[str, Any]


# Suites of two checkpoints.


def headline(rows: Sequence[Row]) -> list[Row]:
    """The rows that sum a metric up: its averages, or its only group; else the first's groups."""
    paired = [row for row in rows if row["n"] and row["better"] != "none"]
    metrics = dict.fromkeys(row["metric"] for row in paired)
    by_metric = [[row for row in paired if row["metric"] == metric] for metric in metrics]
    chosen = [
        row
        for of_metric in by_metric
        for row in of_metric
        if row["groups"] > 1 or len(of_metric) == 1
    ]
    return chosen or [row for of_metric in by_metric[:1] for row in of_metric]


def on_difference(suite: str, base: str, rival: str, row: Row, several: bool) -> str:
    """Say whether a rival differs from the baseline on one row of a comparison.

    Args:
        suite: its name.
        base: the baseline's name.
        rival: the other model's name.
        row: of ``diffx.results.compare``.
        several: the comparison has several groups, so that the row's is named.
    """
    metric = f"{suite} {row['metric']}" + (f" ({row['label']})" if several else "")
    gap = signed(row["difference"])
    if row["low"] is None or row["n"] < FEW:
        few = f"in too few examples ({row['n']})"
        return f"No verdict on {metric}: {rival} differs from {base} by {gap} {few}."
    gap += f" [{signed(row['low'])}, {signed(row['high'])}] over {row['n']} examples"
    if row["low"] <= 0 <= row["high"]:
        return f"No difference can be told between {rival} and {base} on {metric}: {gap}."
    direction = "higher" if row["difference"] > 0 else "lower"
    better = {"higher": row["difference"] > 0, "lower": row["difference"] < 0}.get(row["better"])
    judged = "" if better is None else ", which is better" if better else ", which is worse"
    return f"{rival} scores {direction} than {base} on {metric}{judged}: {gap}."


def signed(value: float) -> str:
    """A difference with its sign, to three decimals."""
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+,.1f}"


# Suites at several numbers of bits.


def cost_of_bits(cost: Row) -> str:
    """A change for the worse with its interval."""
    texts = {
        key: None if cost[key] is None else f"{cost[key] if abs(cost[key]) >= _EQUAL else 0.0:+.4f}"
        for key in ("loss", "low", "high")
    }
    interval = "" if texts["low"] is None else f" [{texts['low']}, {texts['high']}]"
    return f"{texts['loss']}{interval}"


def on_bits(models: Sequence[Row], exact: int) -> list[str]:
    """What each number of bits costs; who loses less is said where the intervals tell it.

    Args:
        models: each with its ``label`` and ``by_bits``, of each width its ``loss``, ``low``,
            ``high`` and ``n``.
        exact: the width of the model as it is.
    """
    lines = []
    for bits in sorted(
        set.intersection(*({*m["by_bits"]} for m in models)) - {exact}, reverse=True
    ):
        costs = sorted(
            ((model["by_bits"][bits], model["label"]) for model in models),
            key=lambda pair: pair[0]["loss"],
        )
        told = ", ".join(f"{label} {cost_of_bits(cost)}" for cost, label in costs)
        line = f"Change for the worse at {bits} bits: {told}."
        (least, first), (most, last) = costs[0], costs[-1]
        gap, n = most["loss"] - least["loss"], min(cost["n"] for cost, _ in costs)
        known = least["high"] is not None and most["low"] is not None
        if len(costs) > 1 and gap < _EQUAL:
            line += " They lose alike."
        elif len(costs) > 1 and n < FEW:
            line += f" No verdict: {n} examples are too few."
        elif len(costs) > 1 and known and least["high"] < most["low"]:
            line += f" {first} loses less than {last}, by {gap:.4f}."
        elif len(costs) > 1:
            overlap = "their intervals overlap or are not known"
            line += f" No verdict: {first} and {last} differ by {gap:.4f}, and {overlap}."
        lines.append(line)
    return lines


# Runs of `diffx train`.


def on_training(baselines: Sequence[str], rows: Sequence[Row], scaling: Row | None) -> list[str]:
    """Who wins against each baseline, the tokens at equal loss, and the scaling laws."""
    sentences = [winner(baseline, rows) for baseline in baselines]
    equal = [row["tokens_at_equal_loss"] for row in rows if row["tokens_at_equal_loss"]]
    sentences += [ratio["sentence"] for ratio in equal]
    if equal:
        sentences.append(
            "(Read off the mean validation curves; where the learning rate decays, a curve's "
            "middle lies above the end of a shorter run.)"
        )
    if scaling:
        sentences += [law["sentence"] for law in scaling["laws"]]
        sentences += [pair["sentence"] for pair in scaling["equal_loss"]]
    return [sentence for sentence in sentences if sentence]


def winner(baseline: str, rows: Sequence[Row]) -> str:
    """The baseline against the best of the groups that are compared with it; empty without one."""
    rivals = [row for row in rows if row["baseline"] == baseline and row["difference"]]
    if not rivals:
        return ""
    best = min(rivals, key=lambda row: row["difference"]["mean"])
    count = len(rivals)
    choice = f" It is the best of {count}, which flatters it." if count > 1 else ""
    gap, low, high, pairs = (best["difference"][key] for key in ("mean", "low", "high", "pairs"))
    side = "below" if gap < 0 else "above"
    distance = f"{abs(gap):.4f} nats a token {side} {baseline}"
    if low is None:
        seeds = f"{'one' if pairs else 'no'} seed in common"
        few = "too few to tell the difference from chance"
        return f"{best['label']} ends {distance}, with {seeds}: {few}.{choice}"
    interval = f"95% interval {low:+.4f} to {high:+.4f} over {pairs} paired seeds"
    if low <= 0 <= high:
        ends = f"{best['label']} ends {distance}, but the {interval} includes zero"
        return f"No winner: {ends}.{choice}"
    first = f"{best['label']} wins: it" if gap < 0 else f"{baseline} wins: {best['label']}"
    return f"{first} ends {distance}, and the {interval} excludes zero.{choice}"


def on_equal_loss(label: str, baseline: str, equal: EqualLoss) -> str:
    """How many of the baseline's tokens a group needs for the worse one's final loss."""
    tokens, base_tokens = figure(equal.tokens), figure(equal.baseline_tokens)
    if equal.better:
        ahead, behind, needed, instead = label, baseline, tokens, base_tokens
    else:
        ahead, behind, needed, instead = baseline, label, base_tokens, tokens
    loss = f"{behind}'s final loss of {equal.loss:.4f}"
    needs = f"{label} needs {equal.ratio:.1%} of {baseline}'s tokens at equal loss"
    return f"{ahead} reaches {loss} with {needed} tokens instead of {instead}: {needs}."


def on_power_law(kind: str, law: PowerLaw, sizes: int) -> str:
    """The fitted law and how well it fits."""
    floor = f" + {law.c:.3f}" if law.c else ""
    formula = f"loss = {law.a:.4g}·N^-{law.b:.4f}{floor}"
    return (
        f"{kind}: {formula} over {sizes} sizes, N the parameters without embeddings; no size is "
        f"further from it than {law.error:.2%}."
    )


def on_parameters(pair: Row, largest: int, sizes: Sequence[int]) -> str:
    """How many of the baseline's parameters an architecture needs for the same loss."""
    kind, baseline, loss = pair["kind"], pair["baseline"], pair["loss"]
    goal = (
        f"the loss of the largest {baseline} ({figure(largest)} parameters, {loss:.4f} by its fit)"
    )
    if pair["ratio"] is None:
        return f"{kind} does not reach {goal} at any size, by its fit."
    share = f"{pair['ratio']:.1%} of the parameters"
    sentence = f"{kind} reaches {goal} with {figure(pair['parameters'])}: {share}."
    if pair["extrapolated"]:
        measured = f"{figure(sizes[0])} to {figure(sizes[-1])}"
        sentence += f" That is extrapolated: its sizes went from {measured}."
    return sentence


# Runs of `diffx adapt-dex`.


def on_adaptations(rows: Sequence[Row], noise: float | None) -> tuple[list[str], list[str]]:
    """What a comparison of DEX with its controls shows, beside the noise floor.

    Args:
        rows: the groups' figures.
        noise: the spread of the final loss over seeds, in nats a token; None if not known.

    Returns:
        Sentences; and warnings, where a mirrored pair is not equal.
    """
    if noise is None:
        sentences = [
            "One seed each: the noise floor, which is the spread over seeds, is not known, and no "
            "difference is told from chance."
        ]
    else:
        spread = "the standard deviation of the final loss over seeds (median of the variants)"
        sentences = [f"Noise floor: {noise:.4f} nats a token, {spread}."]
        for control in (row["label"] for row in rows if row["kind"] == CONTROL):
            sentences += _against_control(control, rows, noise)
    sentences += [_gain_of_dex(row, rows) for row in rows if row["kind"] == "dex"]
    sentences += [
        f"{row['label']}, seed {row['seeds'][0]}: {row['branch']}."
        for row in rows
        if row["branch"] and row["kind"] != MIRROR
    ]
    warnings: list[str] = []
    for mirror in (row for row in rows if row["kind"] == MIRROR):
        name = mirror["label"].replace(MIRROR, "dex", 1)
        for dex in (row for row in rows if row["kind"] == "dex" and row["label"] == name):
            equal, line = _mirrored(dex, mirror)
            (sentences if equal else warnings).append(line)
    return sentences, [line for line in warnings if line]


def _mirrored(dex: Row, mirror: Row) -> tuple[bool, str]:
    """Whether DEX and its mirror image end alike, as they must but for rounding."""
    losses = [row["val/loss"]["by_seed"] for row in (dex, mirror)]
    seeds = losses[0].keys() & losses[1].keys()
    gap = max((abs(losses[0][seed] - losses[1][seed]) for seed in seeds), default=0.0)
    pair = f"{dex['label']} and its mirror image {mirror['label']} end"
    if gap > _ROUNDING:
        must = "but for rounding they must be equal, so something is broken"
        return False, f"{pair} up to {gap:.2g} nats a token apart: {must}"
    digits = f"but for {gap:.1g}" if gap else "to the last digit"
    return True, f"{pair} with the same loss, as they must ({digits})."


def _against_control(control: str, rows: Sequence[Row], noise: float) -> list[str]:
    """The variants that differ from the control by more than the noise, by less, not clearly."""
    more: list[str] = []
    less: list[str] = []
    unclear: list[str] = []
    for row in rows:
        if row["baseline"] != control or not row["difference"] or row["kind"] in (BASE, MIRROR):
            continue
        gap, low, high = (row["difference"][key] for key in ("mean", "low", "high"))
        if low is None or low <= 0 <= high:
            unclear.append(row["label"])
        else:
            told = f"{row['label']} ({abs(gap):.4f} {'better' if gap < 0 else 'worse'})"
            (more if abs(gap) > noise else less).append(told)
    excluded = "by more than the noise, with intervals that exclude zero"
    lines = [f"Different from {control} {excluded}: {', '.join(more) or 'none'}."]
    if less:
        small = "Different by less than the noise, though the interval excludes zero"
        lines.append(f"{small}: {', '.join(less)}.")
    if unclear:
        lines.append(f"Not to be told from {control}: {', '.join(unclear)}.")
    return lines


def _gain_of_dex(dex: Row, rows: Sequence[Row]) -> str:
    """How much of what DEX gains over the base its control gains without the branch."""
    gain = -dex["difference_to_base"]["mean"]
    if gain <= 0:
        worse = f"{-gain:.4f} nats a token above the base"
        return f"{dex['label']} ends {worse}: it made it no better."
    sentence = f"{dex['label']} ends {gain:.4f} nats a token below the base"
    controls = (r for r in rows if r["label"] == dex["baseline"] and r["kind"] == CONTROL)
    control = next(controls, None)
    if control is None:
        unknown = "there is no telling what the branch has to do with it"
        return f"{sentence}; without {CONTROL} {unknown}."
    share = -control["difference_to_base"]["mean"] / gain
    return f"{sentence}; {control['label']}, which has no branch, gains {share:.0%} of that."


# `suite=speed`.


def on_speed(
    base: str,
    rival: str,
    rows: Sequence[Row],
    sizes: tuple[float, float],
    curves: tuple[Curve, Curve] | None,
) -> list[str]:
    """What one model costs against another, at equal parameters and at equal loss.

    At equal parameters that is the ratio of throughputs; at equal loss, for training, the ratio of
    the times to reach the worse one's final loss: the share of the baseline's tokens that the rival
    needs, divided by the ratio of throughputs.

    Args:
        base: the baseline's name.
        rival: the other model's name.
        rows: of ``diffx.results.compare``, averages last.
        sizes: parameters of both, the baseline's first.
        curves: the validation curves of both, the baseline's first; None where one is no run.
    """
    equal = "equal" if abs(sizes[1] / sizes[0] - 1) <= _EQUAL_SIZE else "unequal"
    size = f"at {equal} parameters ({figure(sizes[0])} and {figure(sizes[1])})"
    sentences, costs = [], {}
    for metric in dict.fromkeys(row["metric"] for row in rows if row["unit"] == _SPEED):
        phase = metric.removesuffix(f" {_SPEED}")
        cells = [row for row in rows if row["metric"] == metric]
        ratio, low, high = (cells[-1][key] for key in ("difference", "low", "high"))
        known = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        shapes = [row["difference"] for row in cells if row["groups"] == 1]
        spread = f"; {min(shapes):.3f} to {max(shapes):.3f} by shape" if len(shapes) > 1 else ""
        does = f"{rival} does {ratio:.3f}{known} of {base}'s tokens a second"
        sentences.append(f"{phase}, {size}: {does}{spread}.")
        if phase == "train":
            sentences.append(_speed_at_equal_loss(base, rival, ratio, curves))
        told = low is not None and not low <= 1 <= high
        faster = "slower" if ratio < 1 else "faster"
        costs[phase] = faster if told else "neither clearly slower nor faster"
    if not costs:
        return []
    verdicts = [
        f"{word} at {', '.join(phase for phase in costs if costs[phase] == word)}"
        for word in dict.fromkeys(costs.values())
    ]
    return [
        *sentences,
        f"So {size} {rival} is {'; '.join(verdicts)}, against {base}.",
        "(Intervals are over rounds: what else the machine did while it measured the one and the "
        "other model is not in them.)",
    ]


def _speed_at_equal_loss(
    base: str, rival: str, ratio: float, curves: tuple[Curve, Curve] | None
) -> str:
    equal = None
    if curves and all(tokens.size for tokens, _ in curves):
        equal = tokens_at_equal_loss(curves[1], curves[0])
    if equal is None:
        return (
            "train, at equal loss: not known; that takes two runs, the better of which passes the "
            "other's final validation loss."
        )
    time = equal.ratio / ratio
    less = "less" if time < 1 else "more"
    return (
        f"train, at equal loss ({equal.loss:.4f}): {rival} needs {equal.ratio:.1%} of {base}'s "
        f"tokens at {ratio:.3f} of its speed, which is {time:.1%} of its time: {less}. Inference "
        "costs at equal loss what it costs at these sizes."
    )


# `diffx experiment`.


def on_effect(effect: Row) -> str:
    """The verdict on one effect, with what it rests on.

    Args:
        effect: of a report of ``diffx experiment``: its fields, ``estimate``, ``low``, ``high`` and
            ``ruling``.
    """
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
