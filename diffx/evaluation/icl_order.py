"""The effect of the order of the same demonstrations (arXiv 2410.05258, section 3.5).

Best minus worst order grows with the number of orders, and with few queries by chance: compare
models over the same orders and queries.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from diffx.evaluation.icl_prompts import Prompts, ask_queries, check_shots, classify
from diffx.evaluation.icl_tasks import Row, Task, alternate, load_tasks
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Average, Declaration, Picture, Table, metrics
from diffx.results.published import published
from diffx.results.table import EXAMPLE

_MAX_DEFAULT = 256  # demonstrations, with suite.shots=null
_ORDER = "accuracy of an order"
_SPREADS: dict[str, Callable[[list[float]], Any]] = {
    "max - min": np.ptp,
    "std": lambda accuracies: np.std(accuracies, ddof=1),
}


def plan(context: Context) -> list[Example]:
    """Each seed's queries after each order of its demonstrations; ``limit`` is for one order."""
    return [example for task in load_tasks(context) for example in _plan_task(context, task)]


def _plan_task(context: Context, task: Task) -> Iterator[Example]:
    suite, lm = context.suite, context.lm
    prompts = Prompts(lm, suite.template, task.labels)
    drawn = {seed: task.draw(seed, suite.queries, by_class=True) for seed in suite.seeds}

    def room(tokens: int) -> int:
        return min(prompts.room(rows, queries, tokens) for queries, rows in drawn.values())

    most = room(lm.context)
    shots = suite.shots or min(_MAX_DEFAULT, room(lm.context // 2))
    check_shots(context, task, 2 <= shots <= most, most)
    for arrangement in suite.arrangements:
        for seed, (queries, rows) in drawn.items():
            prefix = f"{task.name}/{arrangement}/{shots}/{seed}"
            for order in range(suite.orders):
                name = f"{prefix}/{order}"
                data: Record = {"labels": task.labels, "about": {"seed": seed, "order": order}}
                data["by"] = {"task": task.name, "variant": arrangement}
                data["demonstrations"] = arrange(rows[:shots], arrangement, name)
                yield from ask_queries(name, prefix, context.limited(queries), data)


def arrange(rows: list[Row], arrangement: str, key: str) -> list[Row]:
    """Permute demonstrations at random by ``key``; ``alternating`` lets the classes take turns."""
    choose = random.Random(key)
    rows = choose.sample(rows, len(rows))
    return alternate(rows, choose) if arrangement == "alternating" else rows


answer = classify


def declare(context: Context) -> Declaration:
    """By task and arrangement: accuracy, best minus worst and standard deviation over orders."""
    by_arrangement = Table(
        by=["task", "variant"],
        label="{task} {variant}",
        metrics=["accuracy", *_SPREADS],
        average=Average(over=["task"], by=["variant"], label="average {variant}"),
    )
    title, ylabel = "Orders of the same demonstrations", "accuracy (dot: an order; line: mean)"
    limits: list[float | None] = [0, 1.02]
    return Declaration(
        metrics=[
            *metrics(["accuracy", _ORDER], unit="accuracy"),
            *metrics(_SPREADS, unit="accuracy", better="lower"),
        ],
        tables=[by_arrangement],
        pictures=[
            Picture(kind="dots", title=title, metrics=[_ORDER], limits=limits, ylabel=ylabel),
            Picture(kind="bars", title="Best order minus worst", metrics=["max - min"]),
        ],
        references=published("icl_order"),
        notes=["Spreads are means over seeds; each seed draws demonstrations and queries."],
    )


def figures(context: Context, records: list[Record]) -> Iterator[Record]:
    """The accuracy of each order, and for each seed the spread over orders."""
    groups: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for record in records:
        key = (record["by"]["task"], record["by"]["variant"], record["seed"])
        orders = groups.setdefault(key, {})
        orders.setdefault(record["order"], []).append(record["scores"]["accuracy"])
    for (task, variant, seed), orders in groups.items():
        place = {"task": task, "variant": variant, "aggregate": EXAMPLE}
        means = {order: float(np.mean(scores)) for order, scores in orders.items()}
        for order, value in means.items():
            example = f"seed {seed}, order {order}"
            yield place | {"metric": _ORDER, "example": example, "value": value}
        for name, spread in _SPREADS.items():
            value = float(spread(list(means.values())))
            yield place | {"metric": name, "example": f"seed {seed}", "value": value}
