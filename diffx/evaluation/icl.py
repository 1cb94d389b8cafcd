"""Many-shot in-context classification: accuracy by demonstrations (arXiv 2410.05258, 3.5)."""

from collections.abc import Iterator
from typing import Any

from diffx.config import UserError
from diffx.evaluation.icl_prompts import Prompts, classify
from diffx.evaluation.icl_tasks import Task, load_tasks
from diffx.evaluation.suite import Context, Example
from diffx.results.declare import Average, Declaration, Metric, Picture, Reference, Table
from diffx.results.published import published


def plan(context: Context) -> list[Example]:
    """The same queries for every number of shots, after ever more of the same demonstrations.

    Raises:
        UserError: a task cannot be read, or the shots do not fit the model's context.
    """
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite, lm, labels = context.suite, context.lm, task.labels
    queries, rows = task.draw(context.seed, suite.queries, suite.per_class)
    queries = context.limited(queries)
    a_shot = len(labels) if suite.per_class else 1  # demonstrations
    most = Prompts(lm, suite.template, labels).room(rows, queries, lm.context) // a_shot
    unit = "demonstrations"
    if suite.per_class:  # each class has as many
        most = min(most, min(sum(label == name for _, label in rows) for name in labels))
        unit = "demonstrations a class"
    if max(suite.shots or [1]) > most:
        shown = "null" if suite.shots is None else ",".join(map(str, suite.shots))
        raise UserError(
            f"suite.shots={shown} cannot be used: {task.name} has {max(most, 0)} {unit} that fit "
            f"into the model's {lm.context} tokens; ask for fewer, or null for all that fit"
        )
    for shots in suite.shots or [2**power for power in range(most.bit_length())]:
        shared: dict[str, Any] = {"by": {"task": task.name, "shots": shots}, "about": {}}
        shared |= {"labels": labels, "demonstrations": rows[: shots * a_shot]}
        for index, (text, label) in enumerate(queries):
            # a query is one example, whatever the shots
            query = {"text": text, "label": label, "example": f"{task.name}/{index}"}
            yield Example(f"{task.name}/{shots}/{index}", shared | query)


answer = classify


def declare(context: Context) -> Declaration:
    """Accuracy by task and shots, and by task the mean over shots, as in the paper."""
    a_class = " a class" * context.suite.per_class
    guesses = [
        Reference(
            label=f"guessing among {len(task.labels)} labels",
            metric="accuracy",
            value=1 / len(task.labels),
            by={"task": task.name},
        )
        for task in load_tasks(context)
    ]
    picture = Picture(
        kind="curve",
        title="{panel}",
        metrics=["accuracy"],
        x="shots",
        panels=["task"],
        xlabel=f"demonstrations{a_class}",
        ylabel="accuracy (band: 95% interval)",
        log="x",
        limits=[0, 1],
    )
    return Declaration(
        metrics=[Metric(name="accuracy", unit="accuracy")],
        tables=[
            Table(by=["task", "shots"], label="{task} {shots} shots" + a_class),
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
        ],
        pictures=[picture],
        references=[*published("icl"), *guesses],
    )
