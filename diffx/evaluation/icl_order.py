"""How much the order of the same demonstrations matters (arXiv 2410.05258, section 3.5).

The difference between the best and the worst order grows with the number of orders, and with few queries chance adds to it:
compare models over the same orders and queries only.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffx.config import UserError
from diffx.evaluation.icl_prompts import Prompts, classify
from diffx.evaluation.icl_tasks import Row, Task, alternate, load_tasks
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Average, Declaration, Metric, Picture, Table, metrics
from diffx.results.published import published
from diffx.results.table import EXAMPLE

_MOST = 256  # demonstrations, where suite.shots=null
_ORDER = "accuracy of an order"
_SPREADS: dict[str, Callable[[list[float]], Any]] = {
    "max - min": np.ptp,
    "std": lambda accuracies: np.std(accuracies, ddof=1),
}


def plan(context: Context) -> list[Example]:
    """Each seed's queries behind each order of its demonstrations; ``limit`` is that of the queries for an order.

    Raises:
        UserError: a task cannot be read, or the demonstrations do not fit into the model's context.
    """
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite, lm = context.suite, context.lm
    prompts = Prompts(lm, suite.template, task.labels)
    drawn = {seed: task.draw(seed, suite.queries, by_class=True) for seed in suite.seeds}
    room = min(prompts.room(rows, queries, lm.context) for queries, rows in drawn.values())
    shots = suite.shots or min(
        _MOST, min(prompts.room(rows, queries, lm.context // 2) for queries, rows in drawn.values())
    )
    if not 2 <= shots <= room:
        shown = "null" if suite.shots is None else suite.shots
        fits = f"{task.name} has {max(room, 0)} demonstrations that fit into the model's {lm.context} tokens"
        raise UserError(f"suite.shots={shown} cannot be used: {fits}; ask for 2 or more that fit")
    for arrangement in suite.arrangements:
        for seed, (queries, rows) in drawn.items():
            name_of_seed = f"{task.name}/{arrangement}/{shots}/{seed}"
            for order in range(suite.orders):
                name = f"{name_of_seed}/{order}"
                shared: dict[str, Any] = {"by": {"task": task.name, "variant": arrangement}}
                shared |= {"labels": task.labels, "about": {"seed": seed, "order": order}}
                shared["demonstrations"] = arrange(rows[:shots], arrangement, name)
                for index, (text, label) in enumerate(context.limited(queries)):
                    # A query is one example, in whatever order its demonstrations stand.
                    query = {"text": text, "label": label, "example": f"{name_of_seed}/{index}"}
                    yield Example(f"{name}/{index}", shared | query)


def arrange(rows: list[Row], arrangement: str, key: str) -> list[Row]:
    """Permute demonstrations: ``random``, or ``alternating`` between the classes; ``key`` decides how."""
    choose = random.Random(key)
    rows = choose.sample(rows, len(rows))
    return alternate(rows, choose) if arrangement == "alternating" else rows


answer = classify


def declare(context: Context) -> Declaration:
    """By task and arrangement: accuracy, best minus worst and standard deviation over orders."""
    return Declaration(
        metrics=[
            Metric(name="accuracy", unit="accuracy"),
            Metric(name=_ORDER, unit="accuracy"),
            *metrics(_SPREADS, unit="accuracy", better="lower"),
        ],
        tables=[
            Table(
                by=["task", "variant"],
                label="{task} {variant}",
                metrics=["accuracy", *_SPREADS],
                average=Average(over=["task"], by=["variant"], label="average {variant}"),
            )
        ],
        pictures=[
            Picture(
                kind="dots",
                title="Orders of the same demonstrations",
                metrics=[_ORDER],
                limits=[0, 1.02],
                ylabel="accuracy (dot: an order; line: mean)",
            ),
            Picture(kind="bars", title="Best order minus worst", metrics=["max - min"]),
        ],
        references=published("icl_order"),
        notes=["Spreads are means over seeds, each with demonstrations and queries of its own."],
    )


def figures(context: Context, records: list[Record]) -> list[Record]:
    """The accuracy of each order, and the spread over orders of each seed, whose examples are seeds."""
    correct: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for record in records:
        key = (record["by"]["task"], record["by"]["variant"], record["seed"])
        orders = correct.setdefault(key, {})
        orders.setdefault(record["order"], []).append(record["scores"]["accuracy"])
    rows = []
    for (task, variant, seed), orders in correct.items():
        place = {"task": task, "variant": variant, "aggregate": EXAMPLE}
        accuracies = {order: float(np.mean(scores)) for order, scores in orders.items()}
        for order, value in accuracies.items():
            example = f"seed {seed}, order {order}"
            rows.append(place | {"metric": _ORDER, "example": example, "value": value})
        for name, of in _SPREADS.items():
            value = float(of(list(accuracies.values())))
            rows.append(place | {"metric": name, "example": f"seed {seed}", "value": value})
    return rows
