"""Tasks of ``lm-eval`` as a suite: its prompts, its metrics and its aggregates, over our decoders or its own class for ``transformers``."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import GenerationConfig

from diffx.config import UserError
from diffx.data.sources import reason
from diffx.evaluation.adapter import (
    DecoderLM,
    PretrainedLM,
    RecordingLM,
    generation_settings,
    quiet,
    with_chat_template,
)
from diffx.evaluation.harness_tasks import Tasks, digest, load_tasks
from diffx.evaluation.suite import Context, Example, Record
from diffx.models import Decoder
from diffx.results.declare import Average, Declaration, Metric, Picture, Table
from diffx.results.published import published

_REQUESTS = "requests.jsonl"
_GENERATION = (
    "until",
    "do_sample",
    "temperature",
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)
_SEED = 1234  # lm-eval's own for demonstrations: seed=0 draws those that it draws
_RESAMPLES = 200  # of figures that are no means
# What is averaged over tasks, and the score of a task that counts: the first that it has.
_AVERAGES = {
    "acc": ["acc"],
    "acc_norm": ["acc_norm", "acc"],
    "accuracy": [
        "math_verify",
        "exact_match",
        "exact_match,flexible-extract",
        "exact_match,strict-match",
    ],
    "answer_tokens": ["answer_tokens"],
}
_SHARES = {"acc", "acc_norm", "exact_match", "em", "f1", "math_verify"}


def plan(context: Context) -> list[Example]:
    """One example for each document of each task, for each number of shots.

    Raises:
        UserError: a task, its data or a setting cannot be used.
    """
    suite, ours = context.suite, isinstance(context.lm.model, Decoder)
    if suite.chat_template:
        with_chat_template(context.lm, context.job, suite.system_instruction)  # which checks it
    _check_gen_kwargs(suite.gen_kwargs, ours)
    found = _tasks(context)
    for name, task in found.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            _check_generation(
                context, name, generation_settings(task.get_config("generation_kwargs")), ours
            )
        context.sources[name] = digest(
            task, with_demonstrations=any(shots for _, shots in _runs(context, found, name))
        )
    return _examples(context)


def _tasks(context: Context) -> Tasks:
    suite = context.suite
    arguments = {"max_gen_toks": suite.max_tokens} if suite.max_tokens else {}
    generation = json.dumps(arguments | suite.gen_kwargs)
    return load_tasks(
        tuple(suite.tasks), suite.include_path, suite.data_dir, generation, context.seed
    )


def _check_gen_kwargs(arguments: dict[str, Any], ours: bool) -> None:
    """Refuse names and values that the model's generation does not know."""
    known = {*_GENERATION, *(() if ours else GenerationConfig().to_dict())}
    for name, value in arguments.items():
        refused = f"suite.gen_kwargs.{name}={value} cannot be used"
        if name not in known:
            which = ", ".join(_GENERATION) + (
                " with a run" if ours else ", or one of transformers' GenerationConfig"
            )
            raise UserError(f"{refused}: it must be {which}")
        texts = value if isinstance(value, list) else [value]
        if name == "until":
            good, accepted = (
                all(isinstance(text, str) and text for text in texts),
                "a text or a list of texts",
            )
        elif name == "do_sample":
            good, accepted = isinstance(value, bool), "true or false"
        elif name == "temperature":
            good, accepted = type(value) in (int, float) and value >= 0, "zero or more"
        else:
            good, accepted = (
                name not in _GENERATION or (type(value) is int and value >= 1),
                "a positive whole number",
            )
        if not good:
            raise UserError(f"{refused}: it must be {accepted}")
    try:
        GenerationConfig(
            **{name: value for name, value in arguments.items() if name not in _GENERATION}
        ).validate(strict=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"suite.gen_kwargs={arguments} cannot be used: {reason(error)}") from error


def _check_generation(context: Context, name: str, settings: dict[str, Any], ours: bool) -> None:
    tokens, room = settings["max_gen_toks"], context.lm.context
    if tokens >= room:
        raise UserError(
            f"suite.tasks={name} cannot be used: its answers have up to {tokens} tokens, and the model's context is {room}; "
            "set suite.max_tokens below that"
        )
    if ours and settings["do_sample"]:
        if context.suite.gen_kwargs.get("do_sample", context.suite.gen_kwargs.get("temperature")):
            raise UserError(
                "suite.gen_kwargs.do_sample=true cannot be used with a run: its answers are decoded greedily"
            )
        raise UserError(
            f"suite.tasks={name} cannot be used: it samples its answers, and the suite decodes greedily; choose another task"
        )


def _runs(context: Context, found: Tasks, name: str) -> list[tuple[int | None, int]]:
    """The numbers of shots that were asked for (None: the task's own), and what they are; as in lm-eval a task's own 0 stays."""
    own = found.shots[name]
    if context.suite.shots is None:
        return [(None, own or 0)]
    runs = {0 if own == 0 else shots: shots for shots in reversed(context.suite.shots)}
    return [(asked, shots) for shots, asked in reversed(runs.items())]


def _examples(context: Context) -> list[Example]:
    found, examples = _tasks(context), []
    for name, task in found.tasks.items():
        documents = context.limited(list(range(len(task.eval_docs))))
        for asked, shots in _runs(context, found, name):
            examples += [
                Example(f"{name}/{shots}/{number}", {"run": (name, asked, shots)})
                for number in documents
            ]
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Run each task with each number of shots through lm-eval; records come when a task is done, its requests are kept before that."""
    found, wanted = _tasks(context), {example.id for example in examples}
    ours = isinstance(context.lm.model, Decoder)
    asked_of = (
        DecoderLM(context.lm, context.batch) if ours else PretrainedLM(context.lm, context.job)
    )
    done, heading, documents = len(_examples(context)) - len(examples), "", 0

    def tell(answered: int, requests: int) -> None:
        if context.bar:
            context.bar.at(
                done + documents * answered // requests,
                f"{heading}: {answered}/{requests} requests",
            )

    model = RecordingLM(
        asked_of.ask, context.folder / _REQUESTS, tell, getattr(asked_of, "hflm", None)
    )
    suite = context.suite
    runs = [example.data["run"] for example in examples]
    for name, asked, shots in dict.fromkeys(runs):
        task, heading, documents = (
            found.tasks[name],
            f"{name} ({shots}-shot)",
            runs.count((name, asked, shots)),
        )
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_SEED + context.seed)
        torch.manual_seed(context.seed)
        with quiet():  # all documents, also where some have a record: what is drawn for a document depends on those before it
            results = evaluate(
                model,
                {"tasks": {name: task}},
                limit=context.job.limit,
                bootstrap_iters=0,
                system_instruction=suite.system_instruction,
                apply_chat_template=suite.chat_template,
                fewshot_as_multiturn=suite.fewshot_as_multiturn,
            )
        if asked_of.cut:
            limit = f"the context of {context.lm.context} tokens"
            context.reporter.warn(
                f"{heading}: {asked_of.cut} requests are longer than {limit}: their beginning was left out"
            )
            asked_of.cut = 0
        item = next(item for item, names in found.items.items() if name in names)
        for record in _records(context, task, results["samples"][name]):
            record |= {"by": {"task": name, "shots": shots, "variant": item}, "shots": asked}
            if record["id"] in wanted:
                done += 1
                yield record


def _records(context: Context, task: Task, samples: list[dict[str, Any]]) -> Iterator[Record]:
    by_document: dict[int, list[dict[str, Any]]] = {}
    for sample in samples:  # one for each filter of the answers
        by_document.setdefault(sample["doc_id"], []).append(sample)
    for number, filtered in by_document.items():
        scores: dict[str, float] = {}
        values: dict[str, Any] = {}  # of metrics that are no means over documents
        for sample in filtered:
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                if task.aggregation().get(metric, mean) is mean and np.isscalar(sample[metric]):
                    scores[name] = float(sample[metric])
                else:
                    values[name] = _plain(sample[metric])
        first = filtered[0]
        responses = [_plain(given[0] if len(given) == 1 else given) for given in first["resps"]]
        if task.OUTPUT_TYPE == "generate_until":
            scores["answer_tokens"] = float(
                np.mean(
                    [len(context.lm.encode(text)) for given in first["resps"] for text in given]
                )
            )
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            scores["loglikelihood"] = float(sum(responses))
        record = {
            "id": f"{task.task_name}/{task.get_config('num_fewshot')}/{number}",
            "scores": scores,
            "prompts": list(dict.fromkeys(arguments[0] for arguments in first["arguments"])),
            "responses": responses,
            "target": _plain(first["target"]),
        }
        if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            record["choices"] = [arguments[1] for arguments in first["arguments"]]
        yield record | ({"values": values} if values else {})


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    return json.loads(
        json.dumps(
            value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other)
        )
    )


def declare(context: Context) -> Declaration:
    """Means over documents and lm-eval's other aggregates by task and shots, its groups, averages."""
    loaded, own_shots = _tasks(context), context.suite.shots is None
    average = Average(
        over=["variant"],
        by=[] if own_shots else ["shots"],
        label="average" if own_shots else "average ({shots}-shot)",
        metrics=_AVERAGES,
    )
    metrics = {name: Metric(name=name, unit="share") for name in ("acc", "acc_norm", "accuracy")}
    metrics |= {"answer_tokens": Metric(name="answer_tokens", unit="tokens", better="none")}
    loglikelihood = Metric(name="loglikelihood", unit="nats", better="higher")
    for task in loaded.tasks.values():
        metrics |= {metric.name: metric for metric in _metrics_of(task)}
    metrics["loglikelihood"] = loglikelihood
    picture = Picture(kind="intervals", title="{panel} (95% intervals)", panels=["unit"])
    return Declaration(
        metrics=list(metrics.values()),
        tables=[Table(by=["task", "shots"], label="{task} ({shots}-shot)", average=average)],
        pictures=[picture],
        references=published(context.suite.name),
    )


def _metrics_of(task: Task) -> Iterator[Metric]:
    """What lm-eval says of a task's metrics, one for each filter of its answers."""
    sieves = [sieve.name for sieve in getattr(task, "_filters", [])] or ["none"]
    directions = task.higher_is_better()
    for name in {**directions, **task.aggregation()}:
        higher = directions.get(name)
        whole = task.aggregation().get(name, mean) is not mean
        unit = "share" if name in _SHARES else name
        better = "higher" if higher else "lower" if higher is False else "none"
        for sieve in sieves:
            label = name if sieve == "none" else f"{name},{sieve}"
            how = "given" if whole else "mean"
            yield Metric(name=label, unit=unit, better=better, aggregate=how)


def figures(context: Context, records: list[Record]) -> list[Record]:
    """lm-eval's aggregates that are no means, and what it says of its groups of tasks."""
    loaded, rows = _tasks(context), []
    by_run: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        by_run.setdefault((record["by"]["task"], record["by"]["shots"]), []).append(record)
    for (task, shots), of_run in by_run.items():
        for name in of_run[0].get("values", {}):
            aggregate = loaded.tasks[task].aggregation()[name.split(",")[0]]
            values = [record["values"][name] for record in of_run]
            place = {
                "metric": name,
                "task": task,
                "shots": shots,
                "aggregate": getattr(aggregate, "__name__", "whole"),
            }
            rows.append(place | _resampled(aggregate, values, context.seed))
    for asked in dict.fromkeys(record["shots"] for record in records):
        runs = {run: r for run, r in by_run.items() if r[0]["shots"] == asked}
        for group in loaded.groups:
            rows += _group(loaded, group, runs, rows)
    return rows


def _resampled(aggregate: Any, values: list[Any], seed: int) -> Record:
    rng = np.random.default_rng(seed)
    draws = [rng.integers(len(values), size=len(values)) for _ in range(_RESAMPLES)]
    drawn = np.array([aggregate([values[index] for index in indices]) for indices in draws])
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    interval = {"stderr": float(drawn.std(ddof=1)), "low": low, "high": high}
    return {"value": float(aggregate(values)), **interval, "n": len(values)}


def _group(
    loaded: Tasks, group: str, runs: dict[tuple[str, int], list[Record]], given: list[Record]
) -> Iterator[Record]:
    """What lm-eval says of a group of tasks."""
    of_tasks: dict[str, Any] = {}
    for (task, shots), records in runs.items():
        of_tasks[task] = {"sample_len": len(records)}
        figures = {
            name: _mean_of([record["scores"][name] for record in records])
            for name in records[0]["scores"]
        }
        for row in given:
            if (row.get("task"), row.get("shots")) == (task, shots):
                figures[row["metric"]] = (row["value"], row["stderr"])
        for label, (value, stderr) in figures.items():
            name, _, sieve = label.partition(",")
            of_tasks[task][f"{name},{sieve or 'none'}"] = value
            of_tasks[task][f"{name}_stderr,{sieve or 'none'}"] = "N/A" if stderr is None else stderr
    together = dict(loaded.groups[group].aggregate(of_tasks))
    shots = max(shots for _, shots in runs)
    for key, value in together.items():
        name, comma, sieve = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = together[f"{name}_stderr,{sieve}"]
            yield {
                "metric": name if sieve == "none" else key,
                "task": group,
                "shots": shots,
                "aggregate": "group",
                "value": float(value),
                "stderr": None if stderr == "N/A" else float(stderr),
                "n": together["sample_len"],
            }


def _mean_of(scores: list[float]) -> tuple[float, float | None]:
    """Mean and standard error."""
    n = len(scores)
    return float(np.mean(scores)), float(np.std(scores, ddof=1) / n**0.5) if n > 1 else None
