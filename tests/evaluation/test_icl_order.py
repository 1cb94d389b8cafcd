import json

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.stats import sem

from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import IclOrderSuite
from diffx.console import Reporter
from diffx.evaluation import icl_order
from diffx.evaluation.suite import Context


@pytest.fixture
def context(tiny, tmp_path):
    def make(limit=None, seed=0, **options):
        suite = IclOrderSuite(
            name="icl_order", **{"template": "{text}:{label}\n", "labels": 3} | options
        )
        return Context(
            EvalJob(checkpoint="x", suite=suite, limit=limit, seed=seed),
            tiny(),
            tmp_path,
            Reporter(),
        )

    return make


def test_orders_are_permutations_of_one_set_a_seed(context):
    examples = icl_order.plan(context(shots=9, orders=4, seeds=[0, 5], queries=7))
    assert len({e.id for e in examples}) == len(examples) == 2 * 2 * 4 * 7
    prompts = {e.id.rpartition("/")[0]: e.data["demonstrations"] for e in examples}
    queries = {}
    for example in examples:
        queries.setdefault(example.id.rpartition("/")[0], []).append(
            (example.data["text"], example.data["label"])
        )
    for seed in (0, 5):
        own = {key: rows for key, rows in prompts.items() if key.split("/")[3] == str(seed)}
        assert len({tuple(sorted(rows)) for rows in own.values()}) == 1  # the same demonstrations
        assert len({tuple(rows) for rows in own.values()}) == 8  # in as many orders
        assert len({tuple(queries[key]) for key in own}) == 1
        for key, rows in own.items():
            labels = [label for _, label in rows]
            turns = [set(labels[i : i + 3]) for i in (0, 3, 6)]
            if "alternating" in key:
                assert all(len(turn) == 3 for turn in turns)
    assert queries["synthetic/random/9/0/0"] != queries["synthetic/random/9/5/0"]
    assert prompts == {
        e.id.rpartition("/")[0]: e.data["demonstrations"]
        for e in icl_order.plan(context(shots=9, orders=4, seeds=[0, 5]))
    }
    assert (
        len(icl_order.plan(context(shots=9, orders=4, seeds=[0], limit=2))) == 2 * 4 * 2
    )  # 2 queries an order


def test_null_fills_half_of_the_context(context):
    made = context(orders=2, seeds=[0, 1, 2])
    examples = icl_order.plan(made)
    shots = len(examples[0].data["demonstrations"])
    line = len("babebi:bobu\n")
    longest = 1 + len("babebi:") + len("bobu\n")
    assert shots == (128 - longest) // line and f"/{shots}/" in examples[0].id
    with pytest.raises(
        UserError,
        match=r"^suite\.shots=30 cannot be used: synthetic has \d+ demonstrations "
        r"that fit into the model's 256",
    ):
        icl_order.plan(context(shots=30))
    with pytest.raises(UserError, match=r"^suite\.shots=null cannot be used"):
        icl_order.plan(context(template="{text}" * 20 + "{label}\n"))


def accuracies_to_records(table, task="trec", arrangement="random"):
    """Records of 100 queries an order with the accuracies of table (seeds, orders)."""
    return [
        {
            "id": f"{task}/{arrangement}/8/{seed}/{order}/{query}",
            "example": f"{task}/{arrangement}/8/{seed}/{query}",
            "by": {"task": task, "variant": arrangement},
            "scores": {"accuracy": float(query < round(100 * accuracy))},
            "seed": seed,
            "order": order,
        }
        for seed, row in enumerate(table)
        for order, accuracy in enumerate(row)
        for query in range(100)
    ]


def test_spread_over_orders_by_seed(context, summarize, tmp_path):
    table = np.array([[0.5, 0.7, 0.6], [0.2, 0.9, 0.1], [0.4, 0.4, 0.4]])
    records = accuracies_to_records(table) + accuracies_to_records(table[:1], "mine", "alternating")
    made = context()
    path = tmp_path / "order.png"
    metrics = summarize(icl_order, made, records, path)
    spread = metrics["trec random", "max - min"]
    assert spread["value"] == pytest.approx((0.2 + 0.8 + 0.0) / 3) and spread["n"] == 3
    assert spread["published"] == {"Transformer-3B (paper)": 0.19, "DIFF-3B (paper)": 0.04}
    assert (
        spread["stderr"] == pytest.approx(sem([0.2, 0.8, 0.0])) and spread["low"] == 0.0
    )  # seeds are drawn
    accuracy = metrics["trec random", "accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (pytest.approx(table.mean()), 300), (
        "a query in many orders is one example"
    )
    assert metrics["trec random", "std"]["value"] == pytest.approx(table.std(axis=1, ddof=1).mean())
    alone = metrics["mine alternating", "max - min"]
    assert (
        alone["value"] == pytest.approx(0.2)
        and alone["stderr"] is None
        and alone["published"] == {}
    )
    assert imread(path).std() > 0.05


def test_end_to_end(context, summarize):
    made = context(shots=6, orders=2, seeds=[0], queries=5)
    examples = icl_order.plan(made)
    records = list(icl_order.answer(made, examples))
    json.dumps(records)
    assert {r["id"] for r in records} == {e.id for e in examples}
    assert {(r["by"]["variant"], r["seed"], r["order"]) for r in records} == {
        (a, 0, o) for a in ("random", "alternating") for o in (0, 1)
    }
    names = {("synthetic random", "accuracy"), ("synthetic alternating", "std")}
    assert summarize(icl_order, made, records).keys() >= names
