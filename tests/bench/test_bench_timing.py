import pytest
import torch

from diffx.bench import timing
from diffx.bench.targets import NO_TARGET, target_ratio
from diffx.bench.timing import peak_bytes, time_in_turns

CPU = torch.device("cpu")


def test_contestants_take_turns_and_every_second_round_is_reversed(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    calls = []
    seconds = time_in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, 3, CPU)
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_turn_repeats_a_short_call_and_gives_seconds_a_call(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: next(clock) / 10
    )  # each turn seems to last a tenth of a second
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0.5)
    calls = []
    assert time_in_turns({"a": lambda: calls.append(1)}, 2, CPU) == {
        "a": [pytest.approx(0.1 / 5)] * 2
    }
    assert len(calls) == 2 + 2 * 5


def test_ratio_is_of_each_round_before_it_is_of_the_median():
    report = {"seconds": {"w": {"a": [1.0, 2.0, 4.0], "b": [3.0, 2.0, 8.0]}}}
    ratio = target_ratio(report, "w", "speed", "a", "b", NO_TARGET)
    assert (ratio["median"], ratio["low"], ratio["high"]) == (2.0, 1.0, 3.0)


def test_peak_memory_counts_what_lives_at_once():
    mib = 2**18  # floats

    def build():
        kept = torch.zeros(8 * mib)

        def call():
            first = torch.ones(4 * mib)
            del first
            torch.ones(3 * mib).add_(kept[0])

        return call

    for _ in range(2):  # what an earlier measurement freed does not count in the next
        assert peak_bytes({"a": build}, CPU)["a"] == pytest.approx(12 * 2**20, rel=1e-3)
