"""Many-shot in-context classification: accuracy by the number of demonstrations (arXiv 2410.05258, section 3.5)."""

import math
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from diffx.config import UserError
from diffx.evaluation.icl_prompts import Prompts, classify
from diffx.evaluation.icl_tasks import Task, load_tasks
from diffx.evaluation.suite import Context, Example, Metric, Record, mean_metrics

BLUE = "#0072B2"


def plan(context: Context) -> list[Example]:
    """The same queries for every number of shots, behind ever more of the same demonstrations.

    Raises:
        UserError: a task cannot be read, or the shots that were asked for do not fit into the model's context.
    """
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite, classes = context.suite, len(task.labels)
    queries, rows = task.draw(context.seed, suite.queries, suite.per_class)
    queries = context.limited(queries)
    rounds = classes if suite.per_class else 1  # demonstrations a shot
    most = Prompts(context.lm, suite.template, task.labels).room(rows, queries, context.lm.context) // rounds
    if suite.per_class:  # a class that runs out would leave the others with more
        most = min(most, min(sum(label == name for _, label in rows) for name in task.labels))
    if max(suite.shots or [1]) > most:
        shown = "null" if suite.shots is None else ",".join(map(str, suite.shots))
        unit = "demonstrations a class" if suite.per_class else "demonstrations"
        room = f"{task.name} has {max(most, 0)} {unit} that fit into the model's {context.lm.context} tokens"
        raise UserError(f"suite.shots={shown} cannot be used: {room}; ask for fewer, or null for all that fit")
    for shots in suite.shots or [2**power for power in range(most.bit_length())]:
        group = f"{task.name} {shots} shots" + (" a class" if suite.per_class else "")
        about = {"task": task.name, "shots": shots, "classes": classes}
        shared = {"group": group, "labels": task.labels, "about": about, "demonstrations": rows[: shots * rounds]}
        for index, (text, label) in enumerate(queries):
            yield Example(f"{task.name}/{shots}/{index}", shared | {"text": text, "label": label})


answer = classify


def summarize(context: Context, records: list[Record]) -> list[Metric]:
    """Accuracy by task and shots, and by task the mean over the numbers of shots, which is what the paper compares."""
    metrics = mean_metrics(records, average=False)
    queries: dict[tuple[str, str], list[float]] = {}  # a query is asked once for every number of shots
    for record in records:
        queries.setdefault((record["task"], record["id"].rpartition("/")[2]), []).append(record["scores"]["accuracy"])
    over_shots = [{"group": task, "scores": {"accuracy": sum(scores) / len(scores)}} for (task, _), scores in queries.items()]
    return metrics + mean_metrics(over_shots)


def draw(context: Context, records: list[Record], metrics: list[Metric], path: Path) -> None:
    """Accuracy by shots with its interval, a panel a task, and what guessing would give."""
    places = {record["group"]: record for record in records}
    tasks = list(dict.fromkeys(record["task"] for record in records))
    columns = min(len(tasks), 3)
    rows = math.ceil(len(tasks) / columns)
    canvas = Figure(figsize=(max(4.8 * columns, 6.4), 4.2 * rows), layout="constrained")
    panels = canvas.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes, task in zip(panels, tasks, strict=False):
        points = [metric for metric in metrics if metric.group in places and places[metric.group]["task"] == task]
        shots = [places[metric.group]["shots"] for metric in points]
        low = [metric.value if metric.low is None else metric.low for metric in points]
        high = [metric.value if metric.high is None else metric.high for metric in points]
        axes.fill_between(shots, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(shots, [metric.value for metric in points], color=BLUE, linewidth=1.8, marker="o", markersize=4, label=context.lm.name)
        classes = places[points[0].group]["classes"]
        axes.axhline(1 / classes, color="#444444", linestyle=":", linewidth=1.4, label=f"guessing among {classes} labels")
        axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.7)
        axes.set_xticks(shots, [str(number) for number in shots])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlim=(shots[0] / 1.2 if shots[0] else -0.2, max(shots[-1], 1) * 1.2), ylim=(0, 1))
        axes.set_title(f"{task}: {points[0].n} texts to label", loc="left", fontsize=11, fontweight="bold")
        axes.set(xlabel="demonstrations a class" if context.suite.per_class else "demonstrations", ylabel="accuracy (band: 95% interval)")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.remove()
    canvas.savefig(path, dpi=150)
