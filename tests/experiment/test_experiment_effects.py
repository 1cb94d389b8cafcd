"""Effects out of rows: every measure against figures worked out by hand."""

import math

import pytest

from diffx.config import UserError
from diffx.config.experiment import Effect
from diffx.experiment.effects import natural, onsets, smallest_of, values_by_seed
from diffx.results.table import make_frame

PAIR = {"candidate": ["diff"], "baseline": ["base"]}
LOSS = {"source": "train", "metric": "val/loss"}


def frame(rows):
    """Rows as dicts with `arm`."""
    made = make_frame([{k: v for k, v in row.items() if k != "arm"} for row in rows])
    return made.assign(arm=[row["arm"] for row in rows])


def curve(arm, seed, points, parameters=100):
    return [
        {
            "arm": arm,
            "seed": seed,
            "parameters": parameters,
            "step": step,
            "tokens": tokens,
            "aggregate": "mean",
            "value": value,
            **LOSS,
        }
        for step, (tokens, value) in enumerate(points)
    ]


def test_a_difference_takes_the_last_step_and_is_positive_as_claimed():
    rows = frame(
        curve("base", 0, [(0, 9.0), (10, 3.0)])
        + curve("diff", 0, [(0, 9.5), (10, 2.9)])
        + curve("base", 1, [(0, 9.0), (10, 3.1)])
        + curve("diff", 1, [(0, 9.5), (10, 3.2)])
        + curve("diff", 2, [(0, 9.5), (10, 1.0)])  # without its baseline
    )
    effect = Effect(**PAIR, select=LOSS, smallest=0.01)
    assert values_by_seed(rows, effect) == pytest.approx({0: 0.1, 1: -0.1})
    assert natural(effect, 0.1) == pytest.approx(-0.1)
    higher = Effect(**PAIR, select=LOSS, smallest=0.01, direction="higher")
    assert values_by_seed(rows, higher) == pytest.approx({0: -0.1, 1: 0.1})


def test_a_second_cell_is_subtracted_first():
    def at(arm, bits, value):
        columns = {"source": "long_context", "metric": "nll", "bits": bits, "aggregate": "mean"}
        return {"arm": arm, "seed": 0, "step": 5, "value": value, **columns}

    rows = frame(
        [at("base", None, 2.0), at("base", 4, 2.5), at("diff", None, 1.0), at("diff", 4, 1.1)]
    )
    select = {"source": "long_context", "metric": "nll", "bits": 4}
    effect = Effect(**PAIR, select=select, less={"bits": None}, smallest=0.01)
    assert values_by_seed(rows, effect) == pytest.approx({0: 0.4})


def test_a_ratio_is_a_logarithm():
    rows = frame(curve("base", 0, [(1, 100.0)]) + curve("diff", 0, [(1, 25.0)]))
    effect = Effect(**PAIR, select=LOSS, measure="ratio", smallest=0.5)
    value = values_by_seed(rows, effect)[0]
    assert value == pytest.approx(math.log(4))
    assert natural(effect, value) == pytest.approx(0.25)
    assert smallest_of(effect) == pytest.approx(math.log(2))


def test_tokens_at_equal_loss():
    """The candidate reaches the baseline's final 3.0 half way between 10 and 20 tokens."""
    rows = frame(
        curve("base", 0, [(10, 5.0), (30, 3.0)])
        + curve("diff", 0, [(10, 4.0), (20, 2.0), (30, 1.0)])
    )
    effect = Effect(**PAIR, select=LOSS, measure="tokens", smallest=0.9)
    assert natural(effect, values_by_seed(rows, effect)[0]) == pytest.approx(15 / 30)


def test_parameters_at_equal_loss():
    """Losses of 5 - log N, and of 5 - log(2 N): half the parameters do."""
    sizes = (100, 200, 400)
    rows = []
    for number, size in enumerate(sizes):
        rows += curve(f"base-{number}", 0, [(1, 5 - math.log(size))], size)
        rows += curve(f"diff-{number}", 0, [(1, 5 - math.log(2 * size))], size)
    effect = Effect(
        candidate=[f"diff-{n}" for n in range(3)],
        baseline=[f"base-{n}" for n in range(3)],
        select=LOSS,
        measure="parameters",
        smallest=0.9,
    )
    assert natural(effect, values_by_seed(frame(rows), effect)[0]) == pytest.approx(0.5)


def test_the_onset_of_a_run_that_never_begins_is_its_length():
    rows = frame(
        curve("base", 0, [(0, 4.0), (100, 3.0), (200, 2.9)])
        + curve("diff", 0, [(0, 4.0), (100, 2.0), (200, 1.0)])
    )
    effect = Effect(**PAIR, select=LOSS, measure="onset", threshold=2.5, smallest=0.8)
    assert onsets(rows, effect, "base") == ([200.0], [True])
    assert onsets(rows, effect, "diff") == ([75.0], [False])
    assert natural(effect, values_by_seed(rows, effect)[0]) == pytest.approx(75 / 200)


@pytest.mark.parametrize(
    ("select", "words"),
    [
        ({"source": "train", "metric": "nothing"}, ["nothing", "0 such rows"]),
        ({"flavour": 1}, ["flavour", "columns"]),
        ({"source": "train"}, ["2 such rows"]),
    ],
)
def test_a_cell_that_is_missing_or_not_one_is_named(select, words):
    rows = curve("base", 0, [(1, 2.0)]) + curve("diff", 0, [(1, 2.0)])
    rows += [row | {"metric": "val/bpb"} for row in rows]
    with pytest.raises(UserError) as error:
        values_by_seed(frame(rows), Effect(**PAIR, select=select, smallest=0.1))
    assert all(word in str(error.value) for word in words)
