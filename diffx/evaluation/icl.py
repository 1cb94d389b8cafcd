"""Many-shot in-context classification: accuracy by the number of demonstrations (arXiv 2410.05258, section 3.5)."""

from collections.abc import Iterator
from typing import Any

from diffx.config import UserError
from diffx.evaluation.icl_prompts import Prompts, classify
from diffx.evaluation.icl_tasks import Task, load_tasks
from diffx.evaluation.suite import Context, Example
from diffx.results.declare import Average, Declaration, Metric, Picture, Reference, Table
from diffx.results.published import published


def plan(context: Context) -> list[Example]:
    """The same queries for every number of shots, behind ever more of the same demonstrations.

    Raises:
        UserError: a task cannot be read, or the shots that were asked for do not fit into the model's context.
    """
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite = context.suite
    queries, rows = task.draw(context.seed, suite.queries, suite.per_class)
    queries = context.limited(queries)
    rounds = len(task.labels) if suite.per_class else 1  # demonstrations a shot
    most = (
        Prompts(context.lm, suite.template, task.labels).room(rows, queries, context.lm.context)
        // rounds
    )
    if suite.per_class:  # a class that runs out would leave the others with more
        most = min(most, min(sum(label == name for _, label in rows) for name in task.labels))
    if max(suite.shots or [1]) > most:
        shown = "null" if suite.shots is None else ",".join(map(str, suite.shots))
        unit = "demonstrations a class" if suite.per_class else "demonstrations"
        room = f"{task.name} has {max(most, 0)} {unit} that fit into the model's {context.lm.context} tokens"
        raise UserError(
            f"suite.shots={shown} cannot be used: {room}; ask for fewer, or null for all that fit"
        )
    for shots in suite.shots or [2**power for power in range(most.bit_length())]:
        shared: dict[str, Any] = {"by": {"task": task.name, "shots": shots}, "about": {}}
        shared |= {"labels": task.labels, "demonstrations": rows[: shots * rounds]}
        for index, (text, label) in enumerate(queries):
            # A query is one example, behind however many demonstrations.
            query = {"text": text, "label": label, "example": f"{task.name}/{index}"}
            yield Example(f"{task.name}/{shots}/{index}", shared | query)


answer = classify


def declare(context: Context) -> Declaration:
    """Accuracy by task and shots, and by task the mean over the numbers of shots, as in the paper."""
    per_class = context.suite.per_class
    unit = "demonstrations a class" if per_class else "demonstrations"
    classes = {task.name: len(task.labels) for task in load_tasks(context)}
    return Declaration(
        metrics=[Metric(name="accuracy", unit="accuracy")],
        tables=[
            Table(by=["task", "shots"], label="{task} {shots} shots" + " a class" * per_class),
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
        ],
        pictures=[
            Picture(
                kind="curve",
                title="{panel}",
                metrics=["accuracy"],
                x="shots",
                panels=["task"],
                xlabel=unit,
                ylabel="accuracy (band: 95% interval)",
                log="x",
                limits=[0, 1],
            )
        ],
        references=[
            *published("icl"),
            *(
                Reference(
                    label=f"guessing among {number} labels",
                    metric="accuracy",
                    value=1 / number,
                    by={"task": task},
                )
                for task, number in classes.items()
            ),
        ],
    )
