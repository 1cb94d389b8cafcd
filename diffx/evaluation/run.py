"""``diffx eval``: a suite on a checkpoint, from its examples to its folder of results.

<folder>/evals/<step>/<suite>/<settings hash>/
    settings.json       the hashed settings and the model's fingerprint
    records.jsonl       one line an example, with a checksum; at the end records.jsonl.zst
    rows.parquet        rows of the table of results, for comparisons
    results.json        the metrics, made of the rows; written last
    <suite>.png
"""

import json
import logging
import shutil
import sys
import time
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
from diffx.errors import describe_any, one_line, storage_errors
from diffx.evaluation.adapter import with_chat_template
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.suite import Context, Example, Record, rows_of, with_unit
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
from diffx.results.aggregate import Row, aggregate
from diffx.results.declare import Declaration
from diffx.results.draw import COLUMNS, cells, draw_results
from diffx.results.table import ROWS, make_frame, read_frame, write_frame
from diffx.tracking import show_evaluation

_log = logging.getLogger(__name__)
_MODULES = {"attention_allocation": "allocation"}  # where the module has another name than the kind
_RECORDS, _VERDICTS = "records.jsonl", "verdicts_"  # a judge's replies
_MAX_ROWS = 60  # of a table on the terminal; results.json has all


@dataclass(frozen=True, slots=True)
class Change:
    """What is done to a model while a suite runs, such as a quantization.

    Attributes:
        name: ends the name of the folder.
        settings: part of the settings hash.
        applied: the context in which a model is changed.
        caches: whether the change works with a key/value cache.
        facts: more about it, for the results.
    """

    name: str
    settings: dict[str, Any]
    applied: Callable[[nn.Module], AbstractContextManager[None]]
    caches: bool
    facts: dict[str, Any] = field(default_factory=dict)


def evaluate(job: EvalJob, words: list[str]) -> Path:
    """Run a suite on a checkpoint, or resume it, or show its results; return their folder.

    Raises:
        UserError: the checkpoint or the suite cannot be used; nothing was made.
        RunError: something outside failed; the same command goes on after the finished records.
    """
    return measure(job, _load(job))


def evaluate_all(jobs: list[EvalJob]) -> int:
    """Run jobs that differ in their suites only; the checkpoint is loaded once.

    Returns:
        0, or the exit code: 2 if all failures are user errors, else 1.
    """
    lm = _load(jobs[0])
    codes = []
    for job in jobs:
        try:
            measure(job, lm)
        except Exception as error:
            code, line = describe_any(error)
            codes.append(code)
            line = f"error: suite={job.suite.name}: {one_line(line)}"
            print(line, file=sys.stderr, flush=True)
    return min(codes, default=0)


def _load(job: EvalJob) -> LanguageModel:
    options = job.device, job.dtype, job.revision, job.trust_remote_code
    return LanguageModel(load(job.checkpoint, *options))


def measure(
    job: EvalJob, lm: LanguageModel, change: Change | None = None, table: bool = True
) -> Path:
    """Run a suite on a model, changed meanwhile by ``change``; ``table`` prints the results."""
    started, suite, reporter = time.time(), job.suite, Reporter()
    module = import_module(f"diffx.evaluation.{_MODULES.get(suite.kind, suite.kind)}")
    # lm-eval applies chat templates itself
    if suite.kind != "harness" and getattr(suite, "chat_template", False):
        lm = with_chat_template(lm, job)
    context = Context(job, lm, Path(), reporter)
    examples = module.plan(context)
    judged = job.judge.kind != "none"
    settings = _settings(context) | ({"change": change.settings} if change else {})
    name = f"{suite.name}-{change.name}" if change else suite.name
    place = lm.loaded.folder / "evals" / str(lm.loaded.step) / name
    folder = context.folder = place / json_sha256(settings)[:12]
    reporter.line(f"{name} on {lm.name}, {len(examples)} examples, in {folder}")
    with storage_errors(f"the evaluation in {folder} stopped"):
        folder.mkdir(parents=True, exist_ok=True)
        with (
            locked(folder / ".lock", f"the evaluation folder {folder}"),
            change.applied(lm.model) if change else nullcontext(),
        ):
            _prepare(context, settings)
            metrics = None if judged else _finished(context)
            if metrics is not None:
                reporter.line("measured before with these settings: force=true measures again")
                _tidy(folder)
                if table:
                    _show(context, metrics)
                return folder
            records = _answer(module, context, examples)
            facts: dict[str, Any] = {"seconds": round(time.time() - started, 1)}
            facts |= {"settings": settings, "change": change.facts if change else {}}
            if judged:
                records = module.judge(context, records)
            metrics = _write(module, context, records, facts)
            rows = _show(context, metrics) if table else list(map(cells, metrics))
            columns = [column.replace("\n", " ") for column in COLUMNS]
            values = {f"{row['label']}/{row['metric']}": row["value"] for row in metrics}
            picture, title = folder / f"{suite.name}.png", f"{lm.name}-{name}"
            shown = (settings, columns, rows, values, picture, reporter.warn)
            show_evaluation(folder, job.wandb, title, *shown)
    if table:
        files = f"results: {folder / 'results.json'}   records: {folder / _RECORDS}.zst"
        reporter.line(f"{files}   picture: {picture}")
    return folder


def make_rows(
    module: ModuleType, context: Context, records: list[Record], declaration: Declaration
) -> pd.DataFrame:
    """The rows of an evaluation: those of its examples, and the suite's ``figures``."""
    lm, loaded, job = context.lm, context.lm.loaded, context.lm.loaded.job
    common = {
        "checkpoint": lm.name,
        "architecture": loaded.architecture,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "seed": job.seed if job else None,
        "step": loaded.step,
        "tokens": loaded.step * job.train.batch_tokens if job else None,
        "source": context.suite.name,
    }
    rows = list(rows_of(records, declaration))
    if hasattr(module, "figures"):
        rows += [with_unit(row, declaration) for row in module.figures(context, records)]
    return make_frame(common | row for row in rows)


def _write(
    module: ModuleType, context: Context, records: list[Record], facts: dict[str, Any]
) -> list[Row]:
    """Write the files of a finished evaluation, and return its metrics."""
    lm, folder, suite = context.lm, context.folder, context.suite
    declaration = module.declare(context)
    frame = make_rows(module, context, records, declaration)
    metrics = aggregate(frame, declaration)
    with replacing(folder / f"{suite.name}.png", ".png") as temporary:
        title = f"{suite.name}: {lm.name}"
        draw_results(metrics, frame.to_dict("records"), declaration, title, temporary)
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    with replacing(folder / f"{_RECORDS}.zst") as temporary:
        temporary.write_bytes(compressor.compress(lines.encode()))
    write_frame(frame, folder / ROWS)
    results = {
        "suite": suite.name,
        "settings_hash": folder.name,
        "data": asdict(context.data) if "data" in context.sources else None,
        "checkpoint": {key: getattr(lm.loaded, key) for key in ("name", "step", "fingerprint")},
        "judge": asdict(context.job.judge),
        "metrics": metrics,
        "declaration": declaration.as_json(),
        "examples": len(records),
        "versions": {name: version(name) for name in ("diffx", "torch", "transformers", "lm_eval")},
        "device": str(lm.device),
        "finished": True,
    }
    write_json(folder / "results.json", results | facts)
    _tidy(folder)
    return metrics


def read_records(folder: Path) -> list[Record]:
    """Read the records of an evaluation, finished or not; damaged ones are skipped."""
    records = read_json_lines(folder / _RECORDS, skip_damaged=True)
    finished = folder / f"{_RECORDS}.zst"
    if finished.exists():
        try:
            with open_text(finished) as file:
                records = [parse_json(line) for line in file] + records
        except (ValueError, zstandard.ZstdError) as error:
            _log.warning("%s is damaged (%s): its records are measured again", finished, error)
    kinds = {"id": str, "by": dict, "scores": dict}
    return [
        record
        for record in records
        if isinstance(record, dict)
        and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(score, int | float) for score in record["scores"].values())
    ]


def _finished(context: Context) -> list[Row] | None:
    """The metrics of a finished evaluation; None, with a warning, if its results are damaged."""
    path = context.folder / "results.json"
    if not path.exists():
        return None
    try:
        metrics: list[Row] = read_json(path, {"metrics": list})["metrics"]
        "".join(cell for metric in metrics for cell in cells(metric))  # fails if one is no text
        read_frame(path.with_name(ROWS))
        return metrics
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        reason = error if isinstance(error, UserError) else f"{path} is damaged"
        context.reporter.warn(f"{reason}: its figures are computed again")
        return None


def _tidy(folder: Path) -> None:
    """Delete files of an unfinished evaluation; a judge's replies cost money and stay."""
    for path in (*folder.glob("*.jsonl"), *folder.glob(".*.tmp*")):
        if not path.name.startswith(_VERDICTS):
            path.unlink()


def _settings(context: Context) -> dict[str, Any]:
    """What decides the results, besides the model; it is hashed."""
    job = context.job
    settings: dict[str, Any] = {"suite": asdict(job.suite), "sources": context.sources}
    settings |= {"dtype": job.dtype.value, "limit": job.limit, "seed": job.seed}
    if job.judge.kind != "none":
        keys = ("base_url", "model", "temperature")
        settings["judge"] = {key: asdict(job.judge).get(key) for key in keys}
    return settings


def _prepare(context: Context, settings: dict[str, Any]) -> None:
    """Write ``settings.json``; empty a folder of another model, damaged, or with ``force``."""
    path, force = context.folder / "settings.json", context.job.force
    settings = parse_json(json.dumps(settings))
    state = {"fingerprint": context.lm.loaded.fingerprint, "settings": settings}
    if path.exists():
        problem = f"{path} is damaged"
        try:
            known = read_json(path)
            if known == state:
                problem = ""
            elif known.get("settings") == settings:
                old = "are not those that were measured before"
                problem = f"the weights of {context.job.checkpoint} {old}"
        except UserError as error:
            problem = str(error)
        if problem:
            context.reporter.warn(f"{problem}: measuring again")
        elif not force:
            return
        for entry in context.folder.iterdir():
            if entry.name != ".lock" and (force or not entry.name.startswith(_VERDICTS)):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    write_json(path, state)


def _answer(module: ModuleType, context: Context, examples: list[Example]) -> list[Record]:
    """Answer examples without a record, writing each record at once; return all in order."""
    reporter, name = context.reporter, context.suite.name
    done = {record["id"]: record for record in read_records(context.folder)}
    todo = [example for example in examples if example.id not in done]
    answered = context.answered = len(examples) - len(todo)
    if answered and todo:
        reporter.line(f"{answered} of {len(examples)} examples were answered before")
    if todo:
        with (
            append_lines(context.folder / _RECORDS) as file,
            reporter.progress(name, len(examples), answered, "examples") as context.bar,
        ):
            for count, record in enumerate(module.answer(context, todo), answered + 1):
                file.write(checked_line(record))
                file.flush()
                done[record["id"]] = record
                context.bar.at(count)
    missing = [example.id for example in examples if example.id not in done]
    assert not missing, f"suite {name} gave no record for {missing[:3]}"
    return [done[example.id] for example in examples]


def _show(context: Context, metrics: list[Row]) -> list[list[str]]:
    rows = list(map(cells, metrics))
    title = f"{context.suite.name}: {context.lm.name}"
    context.reporter.table(make_table(title, COLUMNS, rows[:_MAX_ROWS]))
    if len(rows) > _MAX_ROWS:
        context.reporter.line(f"{len(rows) - _MAX_ROWS} more rows in results.json")
    return rows
