"""Many-shot in-context classification: accuracy by demonstrations (arXiv 2410.05258, 3.5)."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from diffx.evaluation.icl_prompts import Prompts, ask_queries, check_shots, classify
from diffx.evaluation.icl_tasks import Task, load_tasks
from diffx.evaluation.suite import Context, Example
from diffx.results.declare import Average, Declaration, Picture, Reference, Table, metrics
from diffx.results.published import published


def plan(context: Context) -> list[Example]:
    """The same queries for every number of shots, after ever more of the same demonstrations."""
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite, lm, labels = context.suite, context.lm, task.labels
    queries, rows = task.draw(context.seed, suite.queries, suite.per_class)
    queries = context.limited(queries)
    a_shot = len(labels) if suite.per_class else 1  # demonstrations
    most = Prompts(lm, suite.template, labels).room(rows, queries, lm.context) // a_shot
    if suite.per_class:  # each class has as many
        most = min(most, *Counter(label for _, label in rows).values())
    fits = max(suite.shots or [1]) <= most
    check_shots(context, task, fits, most, " a class" * suite.per_class)
    for shots in suite.shots or [2**power for power in range(most.bit_length())]:
        data = {"labels": labels, "demonstrations": rows[: shots * a_shot]}
        data["by"] = {"task": task.name, "shots": shots}
        yield from ask_queries(f"{task.name}/{shots}", task.name, queries, data)


answer = classify


def declare(context: Context) -> Declaration:
    """Accuracy by task and shots, and by task the mean over shots, as in the paper."""
    a_class = " a class" * context.suite.per_class
    references = published("icl")
    for task in load_tasks(context):
        n, by = len(task.labels), {"task": task.name}
        label = f"guessing among {n} labels"
        references.append(Reference(label=label, metric="accuracy", value=1 / n, by=by))
    axes: Any = {"x": "shots", "xlabel": f"demonstrations{a_class}", "log": "x"}
    axes |= {"ylabel": "accuracy (band: 95% interval)", "limits": [0, 1], "panels": ["task"]}
    return Declaration(
        metrics=metrics(["accuracy"], unit="accuracy"),
        tables=[
            Table(by=["task", "shots"], label="{task} {shots} shots" + a_class),
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
        ],
        pictures=[Picture(kind="curve", title="{panel}", metrics=["accuracy"], **axes)],
        references=references,
    )
