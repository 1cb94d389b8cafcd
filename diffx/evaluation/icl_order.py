"""How much the order of the same demonstrations matters (arXiv 2410.05258, section 3.5).

The difference between the best and the worst order grows with the number of orders, and with few queries chance adds to it:
compare models over the same orders and queries only.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffx.config import UserError
from diffx.evaluation.icl_prompts import Prompts, classify
from diffx.evaluation.icl_tasks import Row, Task, alternate, load_tasks
from diffx.evaluation.published import published
from diffx.evaluation.suite import Context, Example, Metric, Record

_MOST = 256  # demonstrations, where suite.shots=null
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")


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
    shots = suite.shots or min(_MOST, min(prompts.room(rows, queries, lm.context // 2) for queries, rows in drawn.values()))
    if not 2 <= shots <= room:
        shown = "null" if suite.shots is None else suite.shots
        fits = f"{task.name} has {max(room, 0)} demonstrations that fit into the model's {lm.context} tokens"
        raise UserError(f"suite.shots={shown} cannot be used: {fits}; ask for 2 or more that fit")
    for arrangement in suite.arrangements:
        for seed, (queries, rows) in drawn.items():
            for order in range(suite.orders):
                name = f"{task.name}/{arrangement}/{shots}/{seed}/{order}"
                about = {"task": task.name, "arrangement": arrangement, "seed": seed, "order": order, "shots": shots}
                shared: dict[str, Any] = {"group": f"{task.name} {arrangement}", "labels": task.labels, "about": about}
                shared["demonstrations"] = arrange(rows[:shots], arrangement, name)
                for index, (text, label) in enumerate(context.limited(queries)):
                    yield Example(f"{name}/{index}", shared | {"text": text, "label": label})


def arrange(rows: list[Row], arrangement: str, key: str) -> list[Row]:
    """Permute demonstrations: ``random``, or ``alternating`` between the classes; ``key`` decides how."""
    choose = random.Random(key)
    rows = choose.sample(rows, len(rows))
    return alternate(rows, choose) if arrangement == "alternating" else rows


answer = classify


def summarize(context: Context, records: list[Record]) -> list[Metric]:
    """By task and arrangement: accuracy, best minus worst and standard deviation over orders; each the mean over seeds.

    The standard error is that over seeds, which ``n`` counts.
    """
    metrics = []
    for (task, arrangement), seeds in _accuracies(records).items():
        orders = [np.array(list(accuracies.values())) for accuracies in seeds.values()]
        for name, of in (("accuracy", np.mean), ("max - min", np.ptp), ("std", lambda values: values.std(ddof=1))):
            metric = _over_seeds(task, f"{arrangement} {name}", np.array([of(accuracies) for accuracies in orders]))
            metric.published = published("icl_order", metric.group, metric.name)
            metrics.append(metric)
    return metrics


def _accuracies(records: list[Record]) -> dict[tuple[str, str], dict[int, dict[int, float]]]:
    """Accuracy by (task, arrangement), seed and order."""
    correct: dict[tuple[str, str], dict[int, dict[int, list[float]]]] = {}
    for record in records:
        seeds = correct.setdefault((record["task"], record["arrangement"]), {})
        seeds.setdefault(record["seed"], {}).setdefault(record["order"], []).append(record["scores"]["accuracy"])
    return {
        key: {seed: {order: float(np.mean(scores)) for order, scores in orders.items()} for seed, orders in seeds.items()}
        for key, seeds in correct.items()
    }


def _over_seeds(group: str, name: str, values: np.ndarray) -> Metric:
    n = len(values)
    return Metric(group, name, float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None, n=n)


def draw(context: Context, records: list[Record], metrics: list[Metric], path: Path) -> None:
    """Every order's accuracy, and beside it best minus worst with the papers' figures."""
    accuracies = _accuracies(records)
    labels = [f"{task}\n{arrangement}" for task, arrangement in accuracies]
    canvas = Figure(figsize=(max(10.0, 2.2 * len(labels) + 4), 4.6), layout="constrained")
    left, right = canvas.subplots(1, 2)
    for place, seeds in enumerate(accuracies.values()):
        for number, (seed, orders) in enumerate(seeds.items()):
            x = place + 0.5 * ((number + 0.5) / len(seeds) - 0.5)
            colour = _COLOURS[number % len(_COLOURS)]
            values = list(orders.values())
            left.plot([x] * len(values), values, "o", color=colour, alpha=0.55, markersize=5, label="_" if place else f"seed {seed}")
            left.plot([x], [np.mean(values)], "_", color=colour, markersize=16, markeredgewidth=2)
    left.set(ylabel="accuracy (dot: an order; line: their mean)", ylim=(0, 1.02))
    left.set_title("Orders of the same demonstrations", loc="left", fontsize=11, fontweight="bold")
    spreads = [metric for metric in metrics if metric.name.endswith("max - min")]
    heights, errors = [metric.value for metric in spreads], [metric.stderr or 0.0 for metric in spreads]
    right.bar(range(len(spreads)), heights, 0.5, yerr=errors, color="#0072B2", capsize=4, label=context.lm.name)
    shown = set()
    for place, metric in enumerate(spreads):
        for number, (label, value) in enumerate(metric.published.items()):
            look = {"marker": "Ds"[number % 2], "color": ("#D55E00", "#E69F00")[number % 2], "label": "_" if label in shown else label}
            right.plot([place], [value], linestyle="", markersize=7, **look)
            shown.add(label)
    right.set(ylabel="accuracy (line: standard error over seeds)", ylim=(0, None))
    right.set_title("Accuracy of the best order minus that of the worst", loc="left", fontsize=11, fontweight="bold")
    for axes in (left, right):
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=4)
    canvas.savefig(path, dpi=150)
