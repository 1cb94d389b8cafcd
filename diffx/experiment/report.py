"""``diffx experiment report``: the effects of an experiment, beside the published ones, judged."""

import math
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from diffx.config import UserError
from diffx.config.bridge import to_plain
from diffx.config.experiment import Effect, ExperimentJob
from diffx.console import Reporter, duration, figure, make_table
from diffx.errors import storage_errors
from diffx.experiment.claims import RESULTS, load_experiment, scale_of
from diffx.experiment.effects import ARM, cells, natural, onsets, smallest_of, values_by_seed
from diffx.experiment.plan import Trial, make_trials
from diffx.files import json_sha256, read_json, replacing, write_json, write_text
from diffx.results import plot
from diffx.results.evaluations import read_evaluation
from diffx.results.read import TRAIN, curve_rows
from diffx.results.rule import Ruling, rule
from diffx.results.runs import read_run
from diffx.results.table import COLUMNS, make_frame
from diffx.results.verdict import on_effect

REPORT, ROWS, RULE = "report.json", "rows.parquet", "rule.json"
_CURVE = ("val/loss",)  # metrics of which a report keeps every step


def results_folder(job: ExperimentJob) -> Path:
    """Where the report of an experiment is written."""
    return Path(job.dir) / f"{job.name}-{job.scale}"


def rule_of(name: str, scale: str) -> dict[str, Any]:
    """Everything that decides a verdict, and its hash.

    A run's name is the hash of its config, so that a changed recipe changes the rule.
    """
    experiment = load_experiment(name)
    plain = to_plain(experiment)
    decides = {
        key: plain[key] for key in ("command", "bases", "words", "arms", "measure", "effects")
    }
    decides["scale"] = to_plain(scale_of(name, experiment, scale))
    trials = make_trials(ExperimentJob(name=name, scale=scale, seeds=[0, 1]))
    decides["runs"] = sorted(trial.folder.name for trial in trials)
    return {"sha256": json_sha256(decides), "rule": decides}


def keep_rule(job: ExperimentJob) -> None:
    """Write the rule beside the runs before the first of them, so that a later change is seen."""
    path = results_folder(job) / RULE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, rule_of(job.name, job.scale))


def read_rows(trials: Sequence[Trial]) -> pd.DataFrame:
    """The figures of finished runs, with the column ``arm``.

    These are the held-out losses of every step, the last of the run's other figures, and the
    aggregated figures of each evaluation that the experiment asks for; of one at few bits ``bits``
    is set, and ``variant`` is what was rounded.

    Raises:
        UserError: no run is finished, or a file is damaged.
    """
    rows = [row for trial in trials if trial.finished for row in _rows_of(trial)]
    if not rows:
        raise UserError("no run of this experiment is finished; `diffx experiment run` makes them")
    frame = make_frame({k: v for k, v in row.items() if k in COLUMNS} for row in rows)
    return frame.assign(arm=pd.array([row[ARM] for row in rows], dtype="string"))


def _rows_of(trial: Trial) -> Iterator[dict[str, Any]]:
    run = read_run(trial.folder)
    curve = list(curve_rows(run))
    last = max(row["step"] for row in curve)
    place = {ARM: trial.arm, "seed": trial.seed}
    for row in curve:
        if row["metric"] in _CURVE or row["step"] == last:
            yield row | place
    facts = {key: curve[-1][key] for key in ("checkpoint", "architecture", "parameters")}
    facts |= {"step": last, "tokens": curve[-1]["tokens"]} | place
    for command in trial.measure:
        for folder in trial.evaluations(command):
            results = read_evaluation(folder).results
            change = results["settings"].get("change", {})
            bits = {"bits": change["bits"], "variant": change["kind"]} if change else {}
            source = {"source": results["suite"]}
            for row in results["metrics"]:
                yield facts | source | bits | {k: v for k, v in row.items() if k != "n"}


def load_rows(path: Path) -> pd.DataFrame:
    """Read rows that a report wrote here or elsewhere.

    Raises:
        UserError: the file is missing, damaged, or has other columns.
    """
    try:
        rows = pd.read_parquet(path)
        if missing := {ARM, *COLUMNS} - {*rows.columns}:
            raise ValueError(f"it lacks the columns {', '.join(sorted(missing))}")
        return rows.astype({**COLUMNS, ARM: "string"})
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rows={path} cannot be used: {reason}; give rows.parquet of a report"
        ) from error


def analyse(name: str, scale: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Judge every effect of an experiment, JSON-able.

    Raises:
        UserError: a cell of an effect is missing, or fewer than two seeds have all of them.
    """
    experiment = load_experiment(name)
    by_seed = {key: values_by_seed(rows, effect) for key, effect in experiment.effects.items()}
    for key, values in by_seed.items():
        if len(values) < 2:
            reason = f"effect {key} has {len(values)} seeds with all its arms; it takes two or more"
            raise UserError(f"experiment={name} cannot be judged: {reason}")
    effects = experiment.effects.values()
    rulings = rule(
        [[*values.values()] for values in by_seed.values()],
        [smallest_of(effect) for effect in effects],
        [effect.direction == "equal" for effect in effects],
    )
    return {
        "name": name,
        "scale": scale,
        "claim": experiment.claim,
        "source": experiment.source,
        "published": experiment.published,
        "note": experiment.note,
        "rule_sha256": rule_of(name, scale)["sha256"],
        "arms": _arms(rows),
        "effects": [
            _effect(key, effect, ruling, by_seed[key], rows)
            for (key, effect), ruling in zip(experiment.effects.items(), rulings, strict=True)
        ],
    }


def _arms(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    facts = {}
    for arm, of_arm in rows.groupby(ARM, sort=False):
        last = of_arm.dropna(subset="parameters").iloc[-1]
        facts[str(arm)] = {
            "parameters": int(last["parameters"]),
            "tokens": int(of_arm["tokens"].max()),
            "seeds": sorted(int(seed) for seed in of_arm["seed"].unique()),
        }
    return facts


def _effect(
    name: str, effect: Effect, ruling: Ruling, by_seed: Mapping[int, float], rows: pd.DataFrame
) -> dict[str, Any]:
    ends = sorted(natural(effect, end) for end in (ruling.low, ruling.high))
    report = {
        "name": name,
        **asdict(effect),
        "ruling": asdict(ruling) | {"seeds_needed": ruling.seeds_needed},
        "estimate": natural(effect, ruling.estimate),
        "low": ends[0],
        "high": ends[1],
        "by_seed": {seed: natural(effect, value) for seed, value in by_seed.items()},
        "cells": cells(rows, effect) if effect.measure != "parameters" else {},
    }
    if effect.measure == "onset":
        report["onset"] = _survival(rows, effect)
    return report | {"sentence": on_effect(report)}


def _survival(rows: pd.DataFrame, effect: Effect) -> dict[str, Any]:
    """Onsets of both arms, how many runs never began, and the log-rank test between the arms."""
    samples: list[stats.CensoredData] = []
    facts: dict[str, dict[str, list[Any]]] = {}
    for arm in (effect.baseline[0], effect.candidate[0]):
        tokens, censored = onsets(rows, effect, arm)
        facts[arm] = {"tokens": tokens, "censored": censored}
        samples.append(
            stats.CensoredData(
                uncensored=[t for t, c in zip(tokens, censored, strict=True) if not c],
                right=[t for t, c in zip(tokens, censored, strict=True) if c],
            )
        )
    begun = any(not c for arm in facts.values() for c in arm["censored"])
    return {"arms": facts, "logrank_p": float(stats.logrank(*samples).pvalue) if begun else None}


def write_report(job: ExperimentJob, trials: Sequence[Trial]) -> dict[str, Any]:
    """Judge the finished runs of an experiment, print it, and write its report.

    Raises:
        UserError: too few runs are finished.
        RunError: the files cannot be written.
    """
    rows, folder = read_rows(trials), results_folder(job)
    report = analyse(job.name, job.scale, rows)
    kept = folder / RULE
    first = read_json(kept, {"sha256": str})["sha256"] if kept.exists() else report["rule_sha256"]
    done = {trial.folder: read_run(trial.folder).summary for trial in trials if trial.finished}
    seconds = [summary["seconds"] for summary in done.values()]
    report |= {
        "rule_changed": first != report["rule_sha256"],
        "command": f"diffx experiment run {job.name} scale={job.scale}",
        "runs": len(done),
        "unfinished": len({trial.folder for trial in trials}) - len(done),
        "hours": sum(seconds) / 3600,
        "machine": f"{platform.machine()}, {job.device.value}",
        "versions": {package: version(package) for package in ("diffx", "torch")},
        "date": date.today().isoformat(),
    }
    with storage_errors(f"{folder} cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / ROWS) as temporary:
            rows.to_parquet(temporary, index=False, compression="zstd")
        with replacing(folder / "figure.png", ".png") as temporary:
            draw(report, rows, temporary)
        write_text(folder / "README.md", markdown(report))
        write_json(folder / REPORT, report)
    show(report)
    Reporter().line(f"report: {folder / 'README.md'}")
    return report


def show(report: Mapping[str, Any]) -> None:
    """Print the claim, the effects and the verdicts."""
    reporter = Reporter()
    reporter.line(f"{report['name']} ({report['source']}): {report['claim']}")
    columns = ["effect", "measured", "interval", "published", "smallest", "seeds", "verdict"]
    reporter.table(make_table(f"scale={report['scale']}", columns, map(_cells, report["effects"])))
    for effect in report["effects"]:
        reporter.line(effect["sentence"])
    if report.get("rule_changed"):
        reporter.warn("the rule was changed after the first of these runs")


def _cells(effect: Mapping[str, Any]) -> list[str]:
    published = effect["published"]
    return [
        effect["name"],
        f"{effect['estimate']:.4g} {effect['unit']}".strip(),
        f"{effect['low']:.4g} to {effect['high']:.4g}",
        "-" if published is None else f"{published:.4g}",
        f"{effect['smallest']:.4g}, {effect['direction']}",
        str(effect["ruling"]["seeds"]),
        effect["ruling"]["verdict"],
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page of Markdown, beside its picture."""
    lines = [
        f"# {report['name']}, scale={report['scale']}: {report['effects'][0]['ruling']['verdict']}",
        "",
        f"**Claim** ({report['source']}): {report['claim']}",
        "",
        f"**Published**: {report['published']}",
        "",
        f"    {report['command']}",
        "",
        f"{report['runs']} runs, {duration(report['hours'] * 3600)} of one job at a time on "
        f"{report['machine']}, torch {report['versions']['torch']}, {report['date']}.",
        "",
        "![effects](figure.png)",
        "",
        "| effect | measured | interval | published | smallest of interest | seeds | verdict |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(_cells(effect))} |" for effect in report["effects"]),
        "",
        *(f"- {effect['sentence']}" for effect in report["effects"]),
    ]
    if report["note"]:
        lines += ["", report["note"]]
    if report["rule_changed"]:
        lines += ["", "**The rule was changed after the first of these runs.**"]
    if report["unfinished"]:
        lines += ["", f"{report['unfinished']} runs of this experiment are not finished."]
    lines += ["", "| arm | parameters | tokens | seeds |", "|---|---|---|---|"]
    lines += [
        f"| `{arm}` | {facts['parameters']:,} | {figure(facts['tokens'])} | {len(facts['seeds'])} |"
        for arm, facts in report["arms"].items()
    ]
    for effect in report["effects"]:
        if effect.get("onset", {}).get("logrank_p") is not None:
            arms = effect["onset"]["arms"]
            never = ", ".join(f"{sum(a['censored'])} of `{arm}`" for arm, a in arms.items())
            p = effect["onset"]["logrank_p"]
            lines += ["", f"Runs that never begin: {never}. Log-rank test: p = {p:.2g}."]
        if effect["cells"]:
            lines += ["", f"`{effect['name']}`, each arm and seed:", ""]
            seeds = sorted({seed for values in effect["cells"].values() for seed in values})
            lines += [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± std |"]
            lines += ["|---" * (len(seeds) + 2) + "|"]
            lines += [_seeds_line(arm, values, seeds) for arm, values in effect["cells"].items()]
    return "\n".join(lines) + "\n"


def _seeds_line(arm: str, values: Mapping[int, float], seeds: Sequence[int]) -> str:
    shown = [f"{values[seed]:.5g}" if seed in values else "" for seed in seeds]
    spread = f" ± {statistics.stdev(values.values()):.2g}" if len(values) > 1 else ""
    return f"| `{arm}` | {' | '.join(shown)} | {statistics.fmean(values.values()):.5g}{spread} |"


def draw(report: Mapping[str, Any], rows: pd.DataFrame, path: Path) -> None:
    """Draw the effects in units of the smallest effect of interest, and the loss curves."""
    figure_, (forest, curves) = plot.canvas(1, 2)
    places = [effect["name"] for effect in report["effects"]]
    series: dict[str, dict[str, Any]] = {"measured, with its interval": {}}
    published = {}
    for effect in report["effects"]:
        config = Effect(**{key: effect[key] for key in Effect.__dataclass_fields__})
        unit, ruling = smallest_of(config), effect["ruling"]
        scaled = {
            end: ruling[key] / unit
            for end, key in (("value", "estimate"), ("low", "low"), ("high", "high"))
        }
        series["measured, with its interval"][effect["name"]] = scaled
        if effect["published"] is not None:
            published[effect["name"]] = _in_units(config, effect["published"], unit)
    forest.axvspan(-1, 1, color="#eeeeee", lw=0)
    plot.intervals(forest, places, series, {"published": published}, zero=0)
    xlabel = "in units of the smallest effect of interest (shaded); right is as claimed"
    plot.style(forest, report["name"], xlabel, grid="x")
    plot.legend(forest)
    chosen = rows[(rows["source"] == TRAIN) & (rows["metric"] == "val/loss")]
    for number, (arm, of_arm) in enumerate(chosen.groupby(ARM, sort=False)):
        by_tokens = of_arm.groupby("tokens")["value"].agg(["mean", "min", "max"])
        tokens = by_tokens.index.to_numpy(float)
        ends = (by_tokens["min"].tolist(), by_tokens["max"].tolist())
        plot.curve(curves, tokens, by_tokens["mean"].tolist(), *ends, str(arm), plot.look(number))
    plot.style(
        curves, "Held-out loss (band: range over seeds)", "training tokens", "nats per token"
    )
    plot.token_axis(curves)
    plot.legend(curves, columns=2)
    plot.save(figure_, path)


def _in_units(effect: Effect, published: float, unit: float) -> float:
    """A published figure on the axis of the picture."""
    value = math.log(published) if effect.ratio else published
    return (-value if effect.direction == "lower" else value) / unit


def known_reports(name: str, dir: str) -> dict[str, dict[str, Any]]:
    """The reports of an experiment by scale: those of this machine, else those committed."""
    reports = {}
    for scale in load_experiment(name).scales:
        for folder in (Path(dir) / f"{name}-{scale}", RESULTS / name / scale):
            if (folder / REPORT).is_file():
                reports[scale] = read_json(folder / REPORT, {"effects": list, "rule_sha256": str})
                break
    return reports
