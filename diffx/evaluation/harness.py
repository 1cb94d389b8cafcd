"""Tasks of ``lm-eval`` as a suite: its prompts, its metrics and its aggregates, over our decoders or its own class for ``transformers``."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from matplotlib.figure import Figure
from transformers import GenerationConfig

from diffx.config import UserError
from diffx.data.sources import reason
from diffx.evaluation.adapter import DecoderLM, PretrainedLM, RecordingLM, generation_settings, quiet, with_chat_template
from diffx.evaluation.bootstrap import interval, resampled_means
from diffx.evaluation.harness_tasks import Tasks, digest, load_tasks
from diffx.evaluation.published import published
from diffx.evaluation.suite import Context, Example, Metric, Record, mean_metrics
from diffx.models import Decoder

_REQUESTS = "requests.jsonl"
_GENERATION = ("until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SEED = 1234  # lm-eval's own for demonstrations: seed=0 draws those that it draws
_RESAMPLES = 200  # of figures that are no means
# What is averaged over tasks, and the score of a task that counts: the first that it has.
_AVERAGES = {
    "acc": ("acc",),
    "acc_norm": ("acc_norm", "acc"),
    "accuracy": ("math_verify", "exact_match", "exact_match,flexible-extract", "exact_match,strict-match"),
    "answer_tokens": ("answer_tokens",),
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "DsXP^v"


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
            _check_generation(context, name, generation_settings(task.get_config("generation_kwargs")), ours)
        context.sources[name] = digest(task, with_demonstrations=any(shots for _, shots in _runs(context, found, name)))
    return _examples(context)


def _tasks(context: Context) -> Tasks:
    suite = context.suite
    arguments = {"max_gen_toks": suite.max_tokens} if suite.max_tokens else {}
    generation = json.dumps(arguments | suite.gen_kwargs)
    return load_tasks(tuple(suite.tasks), suite.include_path, suite.data_dir, generation, context.seed)


def _check_gen_kwargs(arguments: dict[str, Any], ours: bool) -> None:
    """Refuse names and values that the model's generation does not know."""
    known = {*_GENERATION, *(() if ours else GenerationConfig().to_dict())}
    for name, value in arguments.items():
        refused = f"suite.gen_kwargs.{name}={value} cannot be used"
        if name not in known:
            which = ", ".join(_GENERATION) + (" with a run" if ours else ", or one of transformers' GenerationConfig")
            raise UserError(f"{refused}: it must be {which}")
        texts = value if isinstance(value, list) else [value]
        if name == "until":
            good, accepted = all(isinstance(text, str) and text for text in texts), "a text or a list of texts"
        elif name == "do_sample":
            good, accepted = isinstance(value, bool), "true or false"
        elif name == "temperature":
            good, accepted = type(value) in (int, float) and value >= 0, "zero or more"
        else:
            good, accepted = name not in _GENERATION or (type(value) is int and value >= 1), "a positive whole number"
        if not good:
            raise UserError(f"{refused}: it must be {accepted}")
    try:
        GenerationConfig(**{name: value for name, value in arguments.items() if name not in _GENERATION}).validate(strict=False)
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
            raise UserError("suite.gen_kwargs.do_sample=true cannot be used with a run: its answers are decoded greedily")
        raise UserError(f"suite.tasks={name} cannot be used: it samples its answers, and the suite decodes greedily; choose another task")


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
            examples += [Example(f"{name}/{shots}/{number}", {"run": (name, asked, shots)}) for number in documents]
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Run each task with each number of shots through lm-eval; records come when a task is done, its requests are kept before that."""
    tasks, wanted = _tasks(context).tasks, {example.id for example in examples}
    ours = isinstance(context.lm.model, Decoder)
    asked_of = DecoderLM(context.lm, context.batch) if ours else PretrainedLM(context.lm, context.job)
    done, heading, documents = len(_examples(context)) - len(examples), "", 0

    def tell(answered: int, requests: int) -> None:
        if context.bar:
            context.bar.at(done + documents * answered // requests, f"{heading}: {answered}/{requests} requests")

    model = RecordingLM(asked_of.ask, context.folder / _REQUESTS, tell, getattr(asked_of, "hflm", None))
    suite = context.suite
    runs = [example.data["run"] for example in examples]
    for name, asked, shots in dict.fromkeys(runs):
        task, heading, documents = tasks[name], f"{name} ({shots}-shot)", runs.count((name, asked, shots))
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
            context.reporter.warn(f"{heading}: {asked_of.cut} requests are longer than {limit}: their beginning was left out")
            asked_of.cut = 0
        for record in _records(context, task, heading, results["samples"][name]):
            record |= {"task": name, "shots": asked}
            if record["id"] in wanted:
                done += 1
                yield record


def _records(context: Context, task: Task, heading: str, samples: list[dict[str, Any]]) -> Iterator[Record]:
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
            scores["answer_tokens"] = float(np.mean([len(context.lm.encode(text)) for given in first["resps"] for text in given]))
        elif task.OUTPUT_TYPE == "loglikelihood_rolling":
            scores["loglikelihood"] = float(sum(responses))
        record = {
            "id": f"{task.task_name}/{task.get_config('num_fewshot')}/{number}",
            "group": heading,
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
    return json.loads(json.dumps(value, default=lambda other: other.tolist() if hasattr(other, "tolist") else str(other)))


def summarize(context: Context, records: list[Record]) -> list[Metric]:
    """Means over documents, lm-eval's other aggregates, its groups, and averages over tasks."""
    found, name_of = _tasks(context), context.suite.name
    metrics = mean_metrics(records, partial(published, name_of), average=False)
    by_heading: dict[str, list[Record]] = {}
    for record in records:
        by_heading.setdefault(record["group"], []).append(record)
    for heading, own in by_heading.items():
        for name in own[0].get("values", {}):
            aggregate = found.tasks[own[0]["task"]].aggregation()[name.split(",")[0]]
            metrics.append(_resampled(heading, name, aggregate, [record["values"][name] for record in own], context.seed))
    metrics.sort(key=lambda metric: list(by_heading).index(metric.group))
    for asked in dict.fromkeys(record["shots"] for record in records):
        suffix = "" if asked is None else f" ({asked}-shot)"
        own = [record for record in records if record["shots"] == asked]
        for group in found.groups:
            metrics += _group(found, group, suffix, own, metrics)
        averages = _averages(found, suffix, own)
        for metric in averages:
            metric.published = published(name_of, metric.group, {"answer_tokens": "tokens"}.get(metric.name, metric.name))
        metrics += averages
    return metrics


def _resampled(heading: str, name: str, aggregate: Any, values: list[Any], seed: int) -> Metric:
    rng = np.random.default_rng(seed)
    drawn = [[values[index] for index in rng.integers(len(values), size=len(values))] for _ in range(_RESAMPLES)]
    figures = np.array([aggregate(sample) for sample in drawn])
    return Metric(heading, name, float(aggregate(values)), float(figures.std(ddof=1)), *interval(figures), len(values))


def _group(found: Tasks, group: str, suffix: str, records: list[Record], metrics: list[Metric]) -> list[Metric]:
    """What lm-eval says of a group of tasks."""
    of_tasks: dict[str, Any] = {}
    for task, heading in dict.fromkeys((record["task"], record["group"]) for record in records):
        own = [metric for metric in metrics if metric.group == heading]
        of_tasks[task] = {"sample_len": own[0].n}
        for metric in own:
            name, _, sieve = metric.name.partition(",")
            of_tasks[task][f"{name},{sieve or 'none'}"] = metric.value
            of_tasks[task][f"{name}_stderr,{sieve or 'none'}"] = "N/A" if metric.stderr is None else metric.stderr
    together = dict(found.groups[group].aggregate(of_tasks))
    figures = []
    for key, value in together.items():
        name, comma, sieve = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = together[f"{name}_stderr,{sieve}"]
            label = name if sieve == "none" else key
            figures.append(
                Metric(group + suffix, label, float(value), None if stderr == "N/A" else float(stderr), n=together["sample_len"])
            )
    return figures


def _averages(found: Tasks, suffix: str, records: list[Record]) -> list[Metric]:
    """Averages of what all tasks have, each task or group counted once."""
    parts = [[record for record in records if record["task"] in tasks] for tasks in found.items.values()]
    if len(parts) < 2 or not all(parts):
        return []
    averages = []
    for name, counted in _AVERAGES.items():
        chosen = [next((score for score in counted if score in part[0]["scores"]), None) for part in parts]
        if None in chosen or (name == "acc_norm" and name not in chosen):
            continue
        columns = [np.array([record["scores"][score] for record in part]) for part, score in zip(parts, chosen, strict=True)]
        value = float(np.mean([column.mean() for column in columns]))
        n = sum(map(len, columns))
        if min(map(len, columns)) < 2:
            averages.append(Metric(f"average{suffix}", name, value, n=n))
            continue
        stderr = float(np.sqrt(sum(column.var(ddof=1) / len(column) for column in columns)) / len(columns))
        means = [resampled_means(column, f"{item}{suffix}/{name}") for item, column in zip(found.items, columns, strict=True)]
        averages.append(Metric(f"average{suffix}", name, value, stderr, *interval(np.mean(means, axis=0)), n))
    return averages


def draw(context: Context, records: list[Record], metrics: list[Metric], path: Path) -> None:
    """A row for each task: its shares with their intervals and the papers' figures; what is no share has a panel of its own."""
    scores = [item for record in records for item in record["scores"].items()]
    beyond = {name for name, score in scores if not 0 <= score <= 1} | {name for record in records for name in record.get("values", {})}
    others = list(dict.fromkeys(metric.name for metric in metrics if metric.name in beyond))
    shares = list(dict.fromkeys(metric.name for metric in metrics if metric.name not in beyond))
    panels = [names for names in (shares, *([name] for name in others)) if names]
    rows = list(dict.fromkeys(metric.group for metric in metrics))
    canvas = Figure(figsize=(2.5 + 4.2 * len(panels), 1.8 + 0.42 * len(rows)), layout="constrained")
    all_axes = canvas.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, names in zip(all_axes, panels, strict=True):
        for index, name in enumerate(names):
            own = [metric for metric in metrics if metric.name == name]
            places = [rows.index(metric.group) + 0.5 * (index - (len(names) - 1) / 2) / len(names) for metric in own]
            colour = _COLOURS[index % len(_COLOURS)]
            axes.plot([metric.value for metric in own], places, "o", color=colour, markersize=5, label=name)
            for metric, place in zip(own, places, strict=True):
                if metric.low is not None and metric.high is not None:
                    axes.plot([metric.low, metric.high], [place, place], color=colour, linewidth=1.6)
        theirs = {(label, metric.group): value for metric in metrics if metric.name in names for label, value in metric.published.items()}
        for number, label in enumerate(dict.fromkeys(label for label, _ in theirs)):
            points = [(value, rows.index(group)) for (own_label, group), value in theirs.items() if own_label == label]
            style = {"marker": _MARKERS[number % len(_MARKERS)], "facecolors": "none", "edgecolors": "#444444", "s": 34}
            axes.scatter(*zip(*points, strict=True), label=label, **style)
        axes.set_title("share right" if names is shares else names[0], loc="left", fontsize=11, fontweight="bold")
        axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if len(names) > 1 or theirs:
            axes.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(0, -1 / (1 + len(rows))))
    all_axes[0].set_yticks(range(len(rows)), rows)
    all_axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    canvas.suptitle(f"{context.suite.name}: {context.lm.name} (95% intervals)", fontsize=11)
    canvas.savefig(path, dpi=150, format="png")
