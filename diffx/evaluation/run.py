"""``diffx eval``: a suite on a checkpoint, from its examples to its folder of results.

<folder>/evals/<step>/<suite>/<settings hash>/
    settings.json       what the hash is of, the model's fingerprint, versions
    records.jsonl       one line an example while it runs, with a checksum; at the end records.jsonl.zst, in the plan's order
    rows.parquet        the same as rows of the table of results, for comparisons
    results.json        the metrics, made of the rows; its presence says that the evaluation is finished
    <suite>.png
"""

import json
import logging
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import zstandard
from torch import nn

from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.console import Reporter, make_table
from diffx.errors import describe, one_line, storage_errors
from diffx.evaluation.adapter import with_chat_template
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record, rows_of
from diffx.files import (
    append_lines,
    checked_line,
    json_sha256,
    locked,
    open_text,
    parse_json,
    read_json,
    read_json_lines,
    replacing,
    write_json,
)
from diffx.loading import load
from diffx.results.aggregate import Row, aggregate, references_of
from diffx.results.declare import Declaration
from diffx.results.draw import draw_results
from diffx.results.table import ROWS, make_frame, read_frame, write_frame
from diffx.tracking import show_evaluation

_log = logging.getLogger(__name__)
_MODULES = {"attention_allocation": "allocation"}  # where a module's name is not its suites' kind
_RECORDS, _VERDICTS = "records.jsonl", "verdicts_"  # a judge's words, by the hash of what it read
_ROWS = 60  # of a table on the terminal; the rest is in results.json
_COLUMNS = ("", "metric", "value", "standard\nerror", "95% interval", "n", "published")


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a model while a suite runs, such as a quantization.

    Attributes:
        name: ends the name of the folder.
        settings: part of what the settings hash is of.
        applied: the change, for as long as a context lasts.
        caches: whether it is right with a key/value cache; one that looks at whole texts is not.
        facts: what else the results say of it.
    """

    name: str
    settings: dict[str, Any]
    applied: Callable[[nn.Module], AbstractContextManager[None]]
    caches: bool
    facts: dict[str, Any] = field(default_factory=dict)


def evaluate(job: EvalJob, words: list[str]) -> Path:
    """Run a suite on a checkpoint, or take up or show what is there, and return the folder of results.

    Args:
        job: the composed job.
        words: the overrides given on the command line.

    Raises:
        UserError: the checkpoint or the suite cannot be used as they are; nothing was made.
        RunError: something outside failed; what was measured is kept, and the same command goes on.
    """
    return measure(
        job,
        LanguageModel(
            load(job.checkpoint, job.device, job.dtype, job.revision, job.trust_remote_code)
        ),
    )


def evaluate_all(jobs: list[EvalJob]) -> int:
    """Run several suites on one checkpoint, which is loaded once; a suite that fails does not stop the others.

    Args:
        jobs: jobs that differ in their suites only.

    Returns:
        0, or the exit code: 2 if all failures are user errors, else 1.
    """
    job = jobs[0]
    lm = LanguageModel(
        load(job.checkpoint, job.device, job.dtype, job.revision, job.trust_remote_code)
    )
    codes = []
    for job in jobs:
        try:
            measure(job, lm)
        except Exception as error:
            described = describe(error)
            if described is None:
                traceback.print_exception(error)
                described = 1, f"{type(error).__name__}: {error}"
            codes.append(described[0])
            print(
                f"error: suite={job.suite.name}: {one_line(described[1])}",
                file=sys.stderr,
                flush=True,
            )
    return min(codes, default=0)


def measure(
    job: EvalJob, lm: LanguageModel, change: Change | None = None, table: bool = True
) -> Path:
    """Run a job's suite on a model, or on one that is changed for that time; see ``evaluate``. The table is printed if ``table``."""
    started = time.time()
    reporter = Reporter()
    module: ModuleType = import_module(
        f"diffx.evaluation.{_MODULES.get(job.suite.kind, job.suite.kind)}"
    )
    if job.suite.kind != "harness" and getattr(
        job.suite, "chat_template", False
    ):  # lm-eval applies its tasks' itself
        lm = with_chat_template(lm, job)
    context = Context(job, lm, Path(), reporter)
    examples = module.plan(context)
    judged = job.judge.kind != "none" and hasattr(module, "judge")
    settings = _settings(context, judged) | ({"change": change.settings} if change else {})
    digest = json_sha256(settings)[:12]
    name = f"{job.suite.name}-{change.name}" if change else job.suite.name
    folder = context.folder = lm.loaded.folder / "evals" / str(lm.loaded.step) / name / digest
    reporter.line(f"{name} on {lm.name}, {len(examples)} examples, in {folder}")
    with storage_errors(f"the evaluation in {folder} stopped"):
        folder.mkdir(parents=True, exist_ok=True)
        with (
            locked(folder / ".lock", f"the evaluation folder {folder}"),
            change.applied(lm.model) if change else nullcontext(),
        ):
            return _evaluate(
                module,
                context,
                examples,
                settings,
                judged,
                change.facts if change else {},
                started,
                table,
            )


def _evaluate(
    module: ModuleType,
    context: Context,
    examples: list[Example],
    settings: dict[str, Any],
    judged: bool,
    facts: dict[str, Any],
    started: float,
    table: bool,
) -> Path:
    job, lm, folder, reporter = context.job, context.lm, context.folder, context.reporter
    _prepare(context, settings)
    finished = folder / "results.json"
    if not judged:
        known = _finished(context, finished)
        if known is not None:
            reporter.line(
                "measured before with the same settings: these are its figures; force=true measures again"
            )
            _tidy(folder)
            if table:
                _show(context, known)
            return folder
    records = _answer(module, context, examples)
    seconds = time.time() - started
    if judged:
        records = module.judge(context, records)
    declaration: Declaration = module.declare(context)
    frame = _make_frame(module, context, records, declaration)
    metrics = aggregate(frame, declaration)
    for metric in metrics:
        metric["published"] = references_of(metric, declaration)
    picture, title = folder / f"{job.suite.name}.png", f"{job.suite.name}: {lm.name}"
    with replacing(picture, picture.suffix) as temporary:
        draw_results(metrics, frame.to_dict("records"), declaration, title, temporary)
    _write_records(folder, records)
    write_frame(frame, folder / ROWS)
    results = {
        "suite": job.suite.name,
        "settings_hash": folder.name,
        "settings": settings,
        "data": asdict(context.data) if "data" in context.sources else None,
        "checkpoint": {
            "name": lm.name,
            "step": lm.loaded.step,
            "fingerprint": lm.loaded.fingerprint,
        },
        "judge": asdict(job.judge),
        "change": facts,
        "metrics": metrics,
        "declaration": declaration.as_json(),
        "examples": len(records),
        "versions": {name: version(name) for name in ("diffx", "torch", "transformers", "lm_eval")},
        "device": str(lm.device),
        "seconds": round(seconds, 1),
        "finished": True,
    }
    write_json(finished, results)
    _tidy(folder)
    rows = _show(context, metrics) if table else [_row(metric) for metric in metrics]
    figures = {f"{metric['label']}/{metric['metric']}": metric["value"] for metric in metrics}
    show_evaluation(
        folder,
        job.wandb,
        f"{lm.name}-{folder.parent.name}",
        settings,
        [name.replace("\n", " ") for name in _COLUMNS],
        rows,
        figures,
        picture,
        reporter.warn,
    )
    if table:
        reporter.line(
            f"results: {finished}   records: {folder / (_RECORDS + '.zst')}   picture: {picture}"
        )
    return folder


def read_records(folder: Path) -> list[Record]:
    """Read the records of an evaluation: those of a finished one, or of an unfinished one what there is; damaged ones are left out."""
    records = read_json_lines(folder / _RECORDS, skip_damaged=True)
    whole = folder / f"{_RECORDS}.zst"
    if whole.exists():
        try:
            with open_text(whole) as file:
                records = [parse_json(line) for line in file] + records
        except (ValueError, zstandard.ZstdError) as error:
            _log.warning("%s is damaged (%s): its records are measured again", whole, error)
    return [record for record in records if _is_record(record)]


def _is_record(value: Any) -> bool:
    known = isinstance(value, dict) and isinstance(value.get("id"), str)
    if (
        not known
        or not isinstance(value.get("by"), dict)
        or not isinstance(value.get("scores"), dict)
    ):
        return False
    return all(isinstance(score, int | float) for score in value["scores"].values())


def _make_frame(
    module: ModuleType, context: Context, records: list[Record], declaration: Declaration
) -> pd.DataFrame:
    """All rows of the evaluation: those of its examples, and those that the suite works out itself."""
    loaded = context.lm.loaded
    facts = {
        "checkpoint": context.lm.name,
        "architecture": loaded.architecture,
        "parameters": sum(parameter.numel() for parameter in context.lm.model.parameters()),
        "seed": loaded.job.seed if loaded.job else None,
        "step": loaded.step,
        "tokens": loaded.step * loaded.job.train.batch_tokens if loaded.job else None,
        "source": context.suite.name,
    }
    rows = [facts | row for row in rows_of(records, declaration)]
    for row in module.figures(context, records) if hasattr(module, "figures") else ():
        metric = declaration.metric(row["metric"])
        rows.append({"unit": metric.unit, "better": metric.better} | facts | row)
    return make_frame(rows)


def _finished(context: Context, path: Path) -> list[Row] | None:
    """The metrics of a finished evaluation; ``None`` of one that is not, or whose results are damaged, which is warned of."""
    if not path.exists():
        return None
    try:
        metrics = read_json(path, {"metrics": list})["metrics"]
        if all(isinstance(cell, str) for metric in metrics for cell in _row(metric)):
            read_frame(path.with_name(ROWS))
            return list(metrics)
        raise TypeError
    except (UserError, TypeError, ValueError, AttributeError, KeyError) as error:
        reason = error if isinstance(error, UserError) else f"{path} is damaged"
        context.reporter.warn(f"{reason}: its figures are computed again")
        return None


def _tidy(folder: Path) -> None:
    """Delete what a finished evaluation needs no more, such as a killed process leaves; a judge's verdicts were paid for, and stay."""
    for path in (*folder.glob("*.jsonl"), *folder.glob(".*.tmp*")):
        if not path.name.startswith(_VERDICTS):
            path.unlink()


def _settings(context: Context, judged: bool) -> dict[str, Any]:
    """What decides the results, besides the model: the settings hash is of this."""
    job = context.job
    judge = {key: asdict(job.judge).get(key) for key in ("base_url", "model", "temperature")}
    return ({"judge": judge} if judged else {}) | {
        "suite": asdict(job.suite),
        "sources": context.sources,
        "dtype": job.dtype.value,
        "limit": job.limit,
        "seed": job.seed,
    }


def _prepare(context: Context, settings: dict[str, Any]) -> None:
    """Empty the folder if it holds another model's results, damaged settings or if they are to be forced; write ``settings.json``."""
    folder, loaded = context.folder, context.lm.loaded
    path = folder / "settings.json"
    state = {"fingerprint": loaded.fingerprint, "settings": parse_json(json.dumps(settings))}
    if path.exists():
        try:
            known = read_json(path)
            weights = (
                f"the weights of {context.job.checkpoint} are not those that were measured before"
            )
            changed = (
                ""
                if known == state
                else weights
                if known.get("settings") == state["settings"]
                else f"{path} is damaged"
            )
        except UserError as error:
            changed = str(error)
        if changed:
            context.reporter.warn(f"{changed}: measuring again")
        if not (changed or context.job.force):
            return
        for entry in folder.iterdir():
            if entry.name != ".lock" and (
                context.job.force or not entry.name.startswith(_VERDICTS)
            ):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_json(path, state)


def _answer(module: ModuleType, context: Context, examples: list[Example]) -> list[Record]:
    """Answer the examples that have no record yet, each record written as it comes; all records, in the examples' order."""
    path, wanted = context.folder / _RECORDS, {example.id for example in examples}
    done = {
        record["id"]: record for record in read_records(context.folder) if record["id"] in wanted
    }
    left = [example for example in examples if example.id not in done]
    if done and left:
        context.reporter.line(f"{len(done)} of {len(examples)} examples were answered before")
    if left:
        with (
            append_lines(path) as file,
            context.reporter.progress(
                context.suite.name, len(examples), len(done), "examples"
            ) as context.bar,
        ):
            for record in module.answer(context, left):
                file.write(checked_line(record))
                file.flush()
                done[record["id"]] = record
                context.bar.at(len(done))
    missing = [example.id for example in examples if example.id not in done]
    if missing:
        raise AssertionError(f"suite {context.suite.name} gave no record for {missing[:3]}")
    return [done[example.id] for example in examples]


def _write_records(folder: Path, records: list[Record]) -> None:
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    with (
        replacing(folder / f"{_RECORDS}.zst") as temporary,
        zstandard.open(temporary, "wt", cctx=compressor, encoding="utf-8") as file,
    ):
        for record in records:
            file.write(json.dumps(record) + "\n")


def _show(context: Context, metrics: list[Row]) -> list[list[str]]:
    rows = [_row(metric) for metric in metrics]
    context.reporter.table(
        make_table(f"{context.suite.name}: {context.lm.name}", _COLUMNS, rows[:_ROWS])
    )
    if len(rows) > _ROWS:
        context.reporter.line(f"{len(rows) - _ROWS} more rows in results.json")
    return rows


def _row(metric: Row) -> list[str]:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"

    low, high = metric["low"], metric["high"]
    interval = "-" if low is None else f"{text(low)} to {text(high)}"
    published = ", ".join(f"{name}: {value:g}" for name, value in metric["published"].items())
    figures = [text(metric["value"]), text(metric["stderr"]), interval, str(metric["n"] or "-")]
    return [metric["label"], metric["metric"], *figures, published or "-"]
