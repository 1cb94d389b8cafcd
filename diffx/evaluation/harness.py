"""Tasks of ``lm-eval`` as a suite: its prompts, metrics and aggregates."""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import GenerationConfig

from diffx.config.checks import POSITIVE, refuse, require
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
from diffx.evaluation.task_rows import refusing
from diffx.models import Decoder
from diffx.results.declare import Average, Declaration, Metric, Picture, Table, metrics
from diffx.results.published import published

_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of a run's generation, each with a test of its values and what is accepted.
_GENERATION: dict[str, tuple[Callable[[Any], bool], str]] = {
    "until": (lambda value: _are_texts(value), "a text or a list of texts"),
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (lambda value: type(value) in (int, float) and value >= 0, "zero or more"),
    **{name: (lambda value: type(value) is int and value >= 1, POSITIVE) for name in _COUNTS},
}
_SEED = 1234  # lm-eval's for demonstrations: seed=0 draws the same ones
_RESAMPLES = 200  # of figures that are not means
# What is averaged over tasks: the first of these scores that a task has.
_AVERAGES = {
    "acc": ["acc"],
    "acc_norm": ["acc_norm", "acc"],
    "accuracy": ["math_verify", "exact_match"]
    + [f"exact_match,{name}" for name in ("flexible-extract", "strict-match")],
    "answer_tokens": ["answer_tokens"],
}
_SHARES = {"acc", "acc_norm", "exact_match", "em", "f1", "math_verify"}


def plan(context: Context) -> list[Example]:
    """One example for each document of each task, for each number of shots."""
    suite = context.suite
    if suite.chat_template:  # checks the template
        with_chat_template(context.lm, context.job, suite.system_instruction)
    _check_gen_kwargs(context)
    loaded, examples = _tasks(context), []
    for name, task in loaded.tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            _check_generation(context, name, task)
        runs = _runs(context, loaded, name)
        context.sources[name] = digest(task, with_demonstrations=any(shots for _, shots in runs))
        documents = context.limited(range(len(task.eval_docs)))
        for asked, shots in runs:
            data = {"run": (name, asked, shots)}
            examples += [Example(f"{name}/{shots}/{number}", data) for number in documents]
    return examples


def _tasks(context: Context) -> Tasks:
    suite = context.suite
    arguments = {"max_gen_toks": suite.max_tokens} if suite.max_tokens else {}
    generation = json.dumps(arguments | suite.gen_kwargs)
    folders = suite.include_path, suite.data_dir
    return load_tasks(tuple(suite.tasks), *folders, generation, context.seed)


def _check_gen_kwargs(context: Context) -> None:
    """Refuse names and values that the model's generation does not know."""
    arguments, decoder = context.suite.gen_kwargs, isinstance(context.lm.model, Decoder)
    known = set() if decoder else GenerationConfig().to_dict().keys()
    others = "with a run" if decoder else "or one of transformers' GenerationConfig"
    for name, value in arguments.items():
        accepted = f"{', '.join(_GENERATION)}, {others}"
        key, good = f"suite.gen_kwargs.{name}", name in known
        if name in _GENERATION:
            test, accepted = _GENERATION[name]
            good = test(value)
        require(good, key, value, accepted)
    with refusing(f"suite.gen_kwargs={arguments}", "transformers refuses it"):
        rest = {name: value for name, value in arguments.items() if name not in _GENERATION}
        GenerationConfig(**rest).validate(strict=False)


def _are_texts(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) and text for text in texts)


def _check_generation(context: Context, name: str, task: Task) -> None:
    settings = generation_settings(task.get_config("generation_kwargs"))
    tokens, room, given = settings["max_gen_toks"], context.lm.context, context.suite.gen_kwargs
    length = f"its answers have up to {tokens} tokens, and the model's context is {room}"
    setting, below = f"suite.tasks={name}", f"{length}; set suite.max_tokens below that"
    refuse(tokens >= room, setting, below)
    sampled = settings["do_sample"] and isinstance(context.lm.model, Decoder)
    if given.get("do_sample", given.get("temperature")):
        greedily = "its answers are decoded greedily"
        refuse(sampled, "suite.gen_kwargs.do_sample=true", greedily, "a run")
    refuse(sampled, setting, "it samples its answers, and a run decodes greedily")


def _runs(context: Context, loaded: Tasks, name: str) -> list[tuple[int | None, int]]:
    """(asked, used) numbers of shots; asked None: the default. A task's 0 stays 0."""
    default = loaded.shots[name]
    if context.suite.shots is None:
        return [(None, default or 0)]
    if default == 0:
        return [(context.suite.shots[0], 0)]
    return [(shots, shots) for shots in dict.fromkeys(context.suite.shots)]


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Run each task with each number of shots; answers to requests are kept in a file."""
    loaded, wanted = _tasks(context), {example.id for example in examples}
    suite, bar = context.suite, context.bar
    decoder = isinstance(context.lm.model, Decoder)
    lm = DecoderLM(context.lm, context.batch) if decoder else PretrainedLM(context.lm, context.job)
    done, heading, documents = context.answered, "", 0

    def tell(answered: int, requests: int) -> None:
        if bar:
            note = f"{heading}: {answered}/{requests} requests"
            bar.at(done + documents * answered // requests, note)

    path = context.folder / "requests.jsonl"
    model = RecordingLM(lm.ask, path, tell, getattr(lm, "hflm", None))
    runs = [example.data["run"] for example in examples]
    for name, asked, shots in dict.fromkeys(runs):
        task, heading = loaded.tasks[name], f"{name} ({shots}-shot)"
        documents = runs.count((name, asked, shots))
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(_SEED + context.seed)
        torch.manual_seed(context.seed)
        # All documents, with a record or not: random draws for one depend on those before it.
        with quiet():
            results = evaluate(
                model,
                {"tasks": {name: task}},
                limit=context.job.limit,
                bootstrap_iters=0,
                system_instruction=suite.system_instruction,
                apply_chat_template=suite.chat_template,
                fewshot_as_multiturn=suite.fewshot_as_multiturn,
            )
        if lm.cut:
            longer = f"longer than the context of {context.lm.context} tokens"
            beginning = "their beginning was left out"
            context.reporter.warn(f"{heading}: {lm.cut} requests are {longer}: {beginning}")
            lm.cut = 0
        item = next(item for item, names in loaded.items.items() if name in names)
        place = {"by": {"task": name, "shots": shots, "variant": item}, "shots": asked}
        for record in _records(context, task, results["samples"][name]):
            if record["id"] in wanted:
                done += 1
                yield record | place


def _records(context: Context, task: Task, samples: list[dict[str, Any]]) -> Iterator[Record]:
    # a document has a sample for each filter of its answers
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    for number, filtered in groupby(samples, lambda sample: sample["doc_id"]):
        scores: dict[str, float] = {}
        values: dict[str, Any] = {}  # of metrics that are not means over documents
        for sample in filtered:
            for metric in sample["metrics"]:
                name = _label(metric, sample["filter"])
                if task.aggregation().get(metric, mean) is mean and np.isscalar(sample[metric]):
                    scores[name] = float(sample[metric])
                else:
                    values[name] = _plain(sample[metric])
        given, arguments = sample["resps"], sample["arguments"]  # the same in each sample
        responses = [_plain(each[0] if len(each) == 1 else each) for each in given]
        if task.OUTPUT_TYPE == "generate_until":
            lengths = [len(context.lm.encode(text)) for each in given for text in each]
            scores["answer_tokens"] = float(np.mean(lengths))
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            scores["loglikelihood"] = float(sum(responses))
        name = f"{task.task_name}/{task.get_config('num_fewshot')}/{number}"
        prompts = list(dict.fromkeys(each[0] for each in arguments))
        record = {"id": name, "scores": scores, "prompts": prompts, "responses": responses}
        record["target"] = _plain(sample["target"])
        if task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
            record["choices"] = [each[1] for each in arguments]
        yield record | ({"values": values} if values else {})


def _plain(value: Any) -> Any:
    def convert(other: Any) -> Any:
        return other.tolist() if hasattr(other, "tolist") else str(other)

    return json.loads(json.dumps(value, default=convert))


def declare(context: Context) -> Declaration:
    """lm-eval's aggregates by task and shots, those of its groups, and averages."""
    by, label = ["shots"], "average ({shots}-shot)"
    if context.suite.shots is None:
        by, label = [], "average"
    average = Average(over=["variant"], by=by, label=label, metrics=_AVERAGES)
    declared = metrics(["acc", "acc_norm", "accuracy"])
    declared += metrics(["answer_tokens"], unit="tokens", better="none")
    for task in _tasks(context).tasks.values():
        declared += _metrics_of(task)
    declared += metrics(["loglikelihood"], unit="nats")
    picture = Picture(kind="intervals", title="{panel} (95% intervals)", panels=["unit"])
    return Declaration(
        metrics=list({metric.name: metric for metric in declared}.values()),
        tables=[Table(by=["task", "shots"], label="{task} ({shots}-shot)", average=average)],
        pictures=[picture],
        references=published(context.suite.name),
    )


def _metrics_of(task: Task) -> Iterator[Metric]:
    """A task's metrics in lm-eval, one for each filter of its answers."""
    filters = [each.name for each in getattr(task, "_filters", [])] or ["none"]
    directions, aggregates = task.higher_is_better(), task.aggregation()
    for name in {**directions, **aggregates}:
        better = {True: "higher", False: "lower"}.get(directions.get(name), "none")
        how = "mean" if aggregates.get(name, mean) is mean else "given"
        unit = "share" if name in _SHARES else name
        labels = [_label(name, each) for each in filters]
        yield from metrics(labels, unit=unit, better=better, aggregate=how)


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def figures(context: Context, records: list[Record]) -> list[Record]:
    """lm-eval's aggregates that are not means, and its figures of groups of tasks."""
    loaded, rows = _tasks(context), []
    runs: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        runs.setdefault((record["by"]["task"], record["by"]["shots"]), []).append(record)
    for (task, shots), of_run in runs.items():
        for name in of_run[0].get("values", {}):
            aggregate = loaded.tasks[task].aggregation()[name.split(",")[0]]
            values = [record["values"][name] for record in of_run]
            how = getattr(aggregate, "__name__", "whole")
            place = {"metric": name, "task": task, "shots": shots, "aggregate": how}
            rows.append(place | _resampled(aggregate, values, context.seed))
    for asked in dict.fromkeys(record["shots"] for record in records):
        same = {run: of_run for run, of_run in runs.items() if of_run[0]["shots"] == asked}
        for group in loaded.groups:
            rows += _group(loaded, group, same, rows)
    return rows


def _resampled(aggregate: Any, values: list[Any], seed: int) -> Record:
    rng, n = np.random.default_rng(seed), len(values)
    draws = [rng.integers(n, size=n) for _ in range(_RESAMPLES)]
    drawn = np.array([aggregate([values[index] for index in indices]) for indices in draws])
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    interval = {"stderr": float(drawn.std(ddof=1)), "low": low, "high": high}
    return {"value": float(aggregate(values)), **interval, "n": n}


def _group(
    loaded: Tasks, group: str, runs: dict[tuple[str, int], list[Record]], rows: list[Record]
) -> Iterator[Record]:
    """lm-eval's figures of a group of tasks, from the means and ``rows`` of its tasks."""
    tasks: dict[str, Any] = {}
    for (task, shots), records in runs.items():
        scores = pd.DataFrame([record["scores"] for record in records])
        figures = {name: (scores[name].mean(), scores[name].sem()) for name in scores}
        for row in rows:
            if (row["task"], row["shots"]) == (task, shots):
                figures[row["metric"]] = row["value"], row["stderr"]
        tasks[task] = {"sample_len": len(records)}
        for label, (value, stderr) in figures.items():
            name, _, filter_name = label.partition(",")
            tasks[task][f"{name},{filter_name or 'none'}"] = value
            tasks[task][f"{name}_stderr,{filter_name or 'none'}"] = stderr
    whole = dict(loaded.groups[group].aggregate(tasks))
    place = {"task": group, "shots": max(shots for _, shots in runs), "aggregate": "group"}
    for key, value in whole.items():
        name, comma, filter_name = key.partition(",")
        if comma and not name.endswith("_stderr"):
            figure = {"value": value, "stderr": whole[f"{name}_stderr,{filter_name}"]}
            yield {"metric": _label(name, filter_name), **place, **figure, "n": whole["sample_len"]}
