import json
from itertools import count

import pytest
import torch
import transformers

from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import SpeedSuite
from diffx.config.train import TrainJob
from diffx.console import Reporter
from diffx.evaluation import speed
from diffx.evaluation.suite import Context
from diffx.train.throughput import peak_allocation


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 0)
    monkeypatch.setattr(
        speed, "peak_allocation", lambda call, device: call() and 10**6
    )  # the profiler takes a second each time


@pytest.fixture
def llama(wrap, tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return wrap(transformers.AutoModelForCausalLM.from_config(config))


def make_context(lm, tmp_path, **options):
    suite = SpeedSuite(
        name="speed",
        **{"batches": [1, 2], "lengths": [8, 16], "decode_tokens": 3, "rounds": 2} | options,
    )
    return Context(EvalJob(checkpoint="tiny", suite=suite), lm, tmp_path, Reporter())


@pytest.fixture
def measure(summarize):
    def run(context, path=None):
        records = list(speed.answer(context, speed.plan(context)))
        metrics = summarize(speed, context, records, path)
        return records, metrics, {name: row["value"] for name, row in metrics.items()}

    return run


def passes(lm):
    """The shapes of the tokens that a model is given from now on."""
    shapes = []
    lm.model.get_submodule(
        "embed_tokens" if hasattr(lm.model, "embed_tokens") else "model.embed_tokens"
    ).register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("name", ["transformer", "diff_v1", "diff_v2", "llama"])
def test_tokens_a_second_follow_the_clock(name, tiny, llama, measure, tmp_path, monkeypatch):
    lm = llama if name == "llama" else tiny(name)
    clock = count()
    monkeypatch.setattr(
        speed, "_now", lambda device: next(clock) / 2
    )  # every phase seems to last half a second
    records, metrics, figures = measure(make_context(lm, tmp_path))
    assert [record["id"] for record in records] == ["B=1 T=8", "B=1 T=16", "B=2 T=8", "B=2 T=16"]
    assert {row["metric"] for row in records[3]["rows"]} == {
        speed.TRAIN,
        speed.PREFILL,
        speed.DECODE,
        speed.TRAIN_MEMORY,
        speed.MEMORY,
    }
    for batch, length in ((1, 8), (2, 16)):
        group = f"B={batch} T={length}"
        assert figures[group, speed.TRAIN] == figures[group, speed.PREFILL] == 2 * batch * length
        assert figures[group, speed.DECODE] == 2 * batch * 3
    assert figures["model", "parameters"] == sum(
        parameter.numel() for parameter in lm.model.parameters()
    )
    assert ("model", "validation loss") not in figures
    timed = metrics["B=1 T=8", speed.DECODE]
    assert (timed["low"], timed["high"], timed["n"]) == (6, 6, 2)


def test_the_median_over_rounds_counts(tiny, measure, tmp_path, monkeypatch):
    seconds = iter(
        [9, 7, 1, 2, 8]
    )  # for the memory, then a call that does not count, then three rounds
    monkeypatch.setattr(speed, "training", lambda lm, ids: lambda: (next(seconds),))
    records, _, figures = measure(
        make_context(tiny(), tmp_path, batches=[1], lengths=[8], rounds=3)
    )
    assert [row["value"] for row in records[0]["rows"] if row["metric"] == speed.TRAIN] == [8, 4, 1]
    assert figures["B=1 T=8", speed.TRAIN] == 4


def test_a_short_call_is_repeated_within_its_round(monkeypatch):
    monkeypatch.setattr(speed, "_ROUND_SECONDS", 1)
    seconds = iter([0.5, 0.5, 0.2, 0.4, 0.6, 0.8])
    measured, peak = speed._measure(
        lambda: (next(seconds),), lambda: (next(seconds),), 2, torch.device("cpu")
    )
    assert measured.tolist() == [[pytest.approx(0.3)], [pytest.approx(0.7)]] and peak == 10**6


@pytest.mark.parametrize("name", ["diff_v1", "llama"])
def test_tokens_are_decoded_one_at_a_time_behind_a_cache(name, tiny, llama):
    lm = llama if name == "llama" else tiny(name)
    shapes = passes(lm)
    speed.reading(lm, torch.zeros(2, 7, dtype=torch.int64), 3)()
    assert shapes == [(2, 7), (2, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize("name", ["diff_v1", "llama"])
def test_training_computes_gradients_and_leaves_no_trace(name, tiny, llama):
    lm = llama if name == "llama" else tiny(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    seen = set()
    for key, parameter in lm.model.named_parameters():
        parameter.register_hook(lambda grad, key=key: seen.add((key, bool(grad.abs().sum() > 0))))
    ids = torch.randint(50, (2, 9))
    (seconds,) = speed.training(lm, ids)()
    assert seconds > 0 and seen == {(key, True) for key, _ in lm.model.named_parameters()}
    assert (
        all(parameter.grad is None for parameter in lm.model.parameters()) and not lm.model.training
    )
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())


@pytest.mark.slow
def test_memory_holds_the_weights_and_grows_with_the_tokens(tiny, measure, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "peak_allocation", peak_allocation)
    lm = tiny(hidden_size=128)
    weights = sum(parameter.numel() * 4 for parameter in lm.model.parameters()) / 1e6
    _, _, figures = measure(make_context(lm, tmp_path, batches=[1, 4], lengths=[64]))
    small, large = (
        {name: figures[f"B={batch} T=64", name] for name in (speed.MEMORY, speed.TRAIN_MEMORY)}
        for batch in (1, 4)
    )
    assert weights < small[speed.MEMORY] < large[speed.MEMORY]
    assert 2 * weights < small[speed.TRAIN_MEMORY] < large[speed.TRAIN_MEMORY]


def test_a_cell_that_does_not_fit_is_recorded_and_the_others_go_on(
    tiny, measure, tmp_path, monkeypatch, capsys
):
    whole = speed.training

    def training(lm, ids):
        if ids.shape[0] == 1:
            return whole(lm, ids)

        def call():
            raise (
                torch.OutOfMemoryError("too large")
                if ids.shape[1] == 9
                else RuntimeError("DefaultCPUAllocator: can't allocate memory")
            )

        return call

    monkeypatch.setattr(speed, "training", training)
    context = make_context(tiny(), tmp_path)
    records, _, figures = measure(context, tmp_path / "speed.png")
    for group in ("B=2 T=8", "B=2 T=16"):
        record = next(record for record in records if record["id"] == group)
        assert record["out_of_memory"] == [speed.TRAIN, speed.TRAIN_MEMORY] and speed.TRAIN not in {
            row["metric"] for row in record["rows"]
        }
        assert (group, speed.TRAIN) not in figures and figures[group, speed.PREFILL] > 0
    assert figures["B=1 T=16", speed.TRAIN] > 0
    assert "B=2 T=8: train tokens/s cannot be measured: out of memory" in " ".join(
        "".join(capsys.readouterr()).split()
    )
    json.dumps(records, allow_nan=False)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_other_errors_are_not_taken_for_a_lack_of_memory(tiny, measure, tmp_path, monkeypatch):
    lm = tiny()
    monkeypatch.setattr(
        lm.model, "forward", lambda *args, **kwargs: torch.zeros(2) @ torch.zeros(3)
    )
    with pytest.raises(RuntimeError, match="inconsistent"):
        measure(make_context(lm, tmp_path))


def test_training_can_be_left_out(tiny, measure, tmp_path):
    context = make_context(tiny(), tmp_path, train=False, lengths=[8], rounds=1)
    records, _, _ = measure(context, tmp_path / "speed.png")
    assert {row["metric"] for row in records[0]["rows"]} == {
        speed.PREFILL,
        speed.DECODE,
        speed.MEMORY,
    }
    assert (tmp_path / "speed.png").exists()


def test_a_run_shows_its_validation_loss_at_that_step(tiny, summarize, tmp_path):
    lm = tiny()
    lm.loaded.job, lm.loaded.folder, lm.loaded.step = TrainJob(), tmp_path, 20
    (tmp_path / "checkpoints/step_00000020").mkdir(parents=True)
    for value, shown in ((2.5, [2.5]), (None, [])):
        (tmp_path / "checkpoints/step_00000020/state.json").write_text(
            json.dumps({"val_loss": value})
        )
        metrics = summarize(speed, make_context(lm, tmp_path), [])
        assert [
            row["value"] for (_, name), row in metrics.items() if name == "validation loss"
        ] == shown


def test_lengths_that_the_model_cannot_read_are_refused(tiny, tmp_path):
    lm = tiny()
    lm.limit = 18
    with pytest.raises(UserError, match=r"suite.lengths=16 .* 18 tokens at most, and 3 more"):
        speed.plan(make_context(lm, tmp_path))
