"""``diffx compare A B suite=S``: differences between checkpoints over the same examples, with bootstrap intervals."""

import math
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np

from diffx.config import UserError
from diffx.config.checks import new_path
from diffx.console import Reporter, make_table
from diffx.evaluation.bootstrap import interval, resampled_means
from diffx.evaluation.published import published_gain, source
from diffx.report.compare import write_report
from diffx.report.evals_picture import draw
from diffx.report.evaluations import Evaluation, Key, find_evaluations, share
from diffx.report.picture import FORMATS
from diffx.report.runs import read_run
from diffx.report.speed import speed_sentences

FEW = 10  # examples below which no verdict is given


def compare_evaluations(words: Sequence[str], out: Path | None = None) -> None:
    """Print, draw and write the differences between evaluations of one suite with the same settings.

    Args:
        words: two checkpoints or more, the baseline first, and ``suite=S``. A checkpoint is what ``diffx eval`` takes, or a folder
            ``runs/hub/<name>@<revision>``.
        out: the picture; beside it a JSON file of its name holds every figure. None is ``compare-<suite>.png`` here.

    Raises:
        UserError: a checkpoint has no finished evaluation of the suite, they share no settings, or a word cannot be used.
        RunError: the picture cannot be written.
    """
    suites = [word.removeprefix("suite=") for word in words if word.startswith("suite=")]
    specs = list(dict.fromkeys(word for word in words if not word.startswith("suite=")))
    if len(suites) > 1:
        raise UserError(f"suite={suites[1]} cannot be used beside suite={suites[0]}: one suite is compared at a time")
    suite = suites[0]
    out = out or Path(f"compare-{suite}.png")
    new_path("out", out)
    if out.suffix not in FORMATS:
        raise UserError(f"out={out} cannot be used: it is the picture, so its name must end in {', '.join(FORMATS)}")
    if len(specs) < 2:
        raise UserError(f"suite={suite} cannot be compared with {len(specs)} checkpoint: give two or more, the baseline first")
    reporter = Reporter()
    chosen = share([find_evaluations(spec, suite) for spec in specs], reporter.line)
    report = analyse_evaluations(chosen)
    for line in report["warnings"]:
        reporter.warn(line)
    for rival in report["comparisons"]:
        title = f"{suite}: {_place(rival)} against {_place(report['baseline'])}, settings {report['settings_hash']}"
        reporter.table(make_table(title, *_table(report, rival)))
        for line in rival["sentences"]:
            reporter.line(line)
    if report["published"]:
        reporter.line(f"published: {report['published']}")
    write_report(report, out, draw, reporter)


def _place(checkpoint: dict[str, Any]) -> str:
    return f"{checkpoint['checkpoint']} (step {checkpoint['step']})" if checkpoint["step"] else checkpoint["checkpoint"]


def _table(report: dict[str, Any], rival: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of one comparison."""
    papers = list(dict.fromkeys(label for row in rival["rows"] for label in row["published_gain"]))
    columns = ["group", "score", report["baseline"]["checkpoint"], rival["checkpoint"], f"{report['what']}\n[95% interval]", "n"]
    sign = "" if report["what"] == "ratio" else "+"
    rows = []
    for row in rival["rows"]:
        ends = f" [{_text(row['low'], sign)}, {_text(row['high'], sign)}]" if row["low"] is not None else ""
        gains = [_text(row["published_gain"][label], "+") if label in row["published_gain"] else "-" for label in papers]
        means = [_text(row["baseline"]), _text(row["value"])]
        rows.append([row["group"], row["score"], *means, _text(row["difference"], sign) + ends, str(row["n"] or "-"), *gains])
    return [*columns, *(label.replace(" (paper)", "\n(paper)") for label in papers)], rows


def _text(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if abs(value) < 100 else f"{value:{sign},.1f}"


def analyse_evaluations(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Work out every figure and sentence, JSON-able; the first evaluation is the baseline."""
    base, *rivals = evaluations
    suite = base.results["suite"]
    ratio, theirs = suite == "speed", base.scores()
    warnings: list[str] = []
    comparisons = []
    for rival in rivals:
        ours, means = rival.scores(), (base.means(), rival.means())
        if ratio:
            rows = paired_rows(theirs, ours, ratio=True)
        else:
            rows = paired_rows(theirs, ours, _no_means(theirs, means[0]) | _no_means(ours, means[1]))
            rows += _unpaired(*means, rows)
        if not rows:
            raise UserError(
                f"RUN={rival.label} cannot be compared with {base.label}: they have no example and no figure of {suite} in common"
            )
        for row in rows:
            row["published_gain"] = published_gain(suite, row["group"], row["score"])
        warnings += _warnings(base, rival, sum(len(theirs.get(key, {}).keys() ^ ours.get(key, {}).keys()) for key in theirs | ours))
        if ratio:
            are_runs = all((evaluation.run / "config.yaml").is_file() for evaluation in (base, rival))
            runs = (read_run(base.run), read_run(rival.run)) if are_runs else None
            sizes = (means[0]["model", "parameters"], means[1]["model", "parameters"])
            sentences = speed_sentences(base.label, rival.label, rows, sizes, runs)
        else:
            several = len({row["group"] for row in rows if row["n"]}) > 1
            sentences = [_verdict(suite, base.label, rival.label, row, several) for row in _main(rows)]
        comparisons.append({**_identity(rival), "rows": rows, "sentences": sentences})
    return {
        "suite": suite,
        "settings_hash": base.results["settings_hash"],
        "settings": base.results["settings"],
        "what": "ratio" if ratio else "difference",
        "published": source(suite) if ratio or any(row["published_gain"] for rival in comparisons for row in rival["rows"]) else "",
        "baseline": _identity(base),
        "comparisons": comparisons,
        "warnings": warnings,
    }


def _warnings(base: Evaluation, rival: Evaluation, alone: int) -> list[str]:
    """What makes the two less comparable than the table looks."""
    lines = [f"{alone} scores that not both of {base.label} and {rival.label} have are left out"] if alone else []
    keys = ("judge", "device") if base.results["suite"] == "speed" else ("judge",)
    changed = [key for key in keys if base.results.get(key) != rival.results.get(key)]
    return lines + [f"not comparable: {base.label} and {rival.label} had different {key}s" for key in changed]


def _identity(evaluation: Evaluation) -> dict[str, Any]:
    return {"checkpoint": evaluation.label, "step": evaluation.results["checkpoint"].get("step"), "folder": str(evaluation.folder)}


def _no_means(scores: dict[Key, dict[str, float]], means: dict[Key, float]) -> set[Key]:
    """Scores whose figure in ``results.json`` is not their mean over examples, such as the largest of all."""
    return {key for key, own in scores.items() if key in means and not math.isclose(np.mean(list(own.values())), means[key], rel_tol=1e-6)}


def paired_rows(
    theirs: dict[Key, dict[str, float]], ours: dict[Key, dict[str, float]], no_means: AbstractSet[Key] = frozenset(), ratio: bool = False
) -> list[dict[str, Any]]:
    """Means and their paired difference for each group and score, over the examples that both have.

    A score that every group has also gets a row that averages the groups' means: of all groups, in the harness of all with as many
    shots, in ``icl`` of a task's numbers of shots. All groups are resampled by the same positions, so that groups which ask the same
    examples, as those do, do not count as independent of each other.

    Args:
        theirs: the baseline's scores.
        ours: the other's.
        no_means: scores that are named as what they are here, means over examples, and are not averaged.
        ratio: means are geometric, and the difference is the quotient.

    Returns:
        A row each; fewer than two examples have no interval.
    """
    into, back = (np.log, np.exp) if ratio else (np.asarray, np.asarray)
    rows: list[dict[str, Any]] = []
    parts: dict[Key, list[tuple[float, float, np.ndarray | None, int]]] = {}
    for key in theirs:
        ids = [i for i in theirs[key] if i in ours.get(key, {}) and (not ratio or min(theirs[key][i], ours[key][i]) > 0)]
        if not ids:
            continue
        a, b = (into(np.array([scores[key][i] for i in ids])) for scores in (theirs, ours))
        means = resampled_means(b - a, key[1]) if len(ids) > 1 else None
        part = (float(a.mean()), float(b.mean()), means, len(ids))
        rows.append(_row((key[0], f"{key[1]}, mean over examples") if key in no_means else key, *part, back))
        parts.setdefault((_average(key[0]), key[1]), []).append(part)
    averages = [_average(group) for group in {group for group, _ in theirs}]
    for key, own in parts.items():
        if 1 < averages.count(key[0]) == len(own) and not any(score == key[1] for _, score in no_means):
            a, b, each, counts = zip(*own, strict=True)
            resampled = np.mean(each, axis=0) if all(means is not None for means in each) else None
            rows.append(_row(key, float(np.mean(a)), float(np.mean(b)), resampled, sum(counts), back) | {"groups": len(own)})
    return rows


def _average(group: str) -> str:
    """What the average that a group belongs to is called."""
    found = re.fullmatch(r"(?P<task>.+) \d+ shots( a class)?|.+(?P<shots> \(\d+-shot\))", group)
    return "average" if found is None else found["task"] or f"average{found['shots']}"


def _row(key: Key, a: float, b: float, means: np.ndarray | None, n: int, back: Any) -> dict[str, Any]:
    low, high = (None, None) if means is None else (float(back(end)) for end in interval(means))
    figures = {"baseline": float(back(a)), "value": float(back(b)), "difference": float(back(b - a)), "low": low, "high": high}
    return {"group": key[0], "score": key[1], **figures, "n": n, "groups": 1}


def _unpaired(theirs: dict[Key, float], ours: dict[Key, float], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures that are no means over examples, such as a spread over orders: their difference has no interval."""
    paired = {row["score"] for row in rows}
    return [_row(key, theirs[key], ours[key], None, 0, np.asarray) for key in theirs if key in ours and key[1] not in paired]


def _main(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that sum a score up: its averages, or its only group; if no score has either, the groups of the first."""
    paired = [row for row in rows if row["n"]]
    by_score = [[row for row in paired if row["score"] == score] for score in dict.fromkeys(row["score"] for row in paired)]
    chosen = [row for own in by_score for row in own if row["groups"] > 1 or len(own) == 1]
    return chosen or [row for own in by_score[:1] for row in own]


def _verdict(suite: str, base: str, rival: str, row: dict[str, Any], several: bool) -> str:
    what = f"{suite} {row['score']}" + (f" ({row['group']})" if several else "")
    if row["low"] is None or row["n"] < FEW:
        return f"No verdict on {what}: {rival} differs from {base} by {_text(row['difference'], '+')} in too few examples ({row['n']})."
    gap = f"{_text(row['difference'], '+')} [{_text(row['low'], '+')}, {_text(row['high'], '+')}] over {row['n']} examples"
    if row["low"] <= 0 <= row["high"]:
        return f"No difference can be told between {rival} and {base} on {what}: {gap}."
    return f"{rival} scores {'higher' if row['difference'] > 0 else 'lower'} than {base} on {what}: {gap}."
