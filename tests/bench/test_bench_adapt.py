import json

import pytest
import torch

from diffx.bench import adapt as bench
from diffx.bench import targets, timing
from diffx.cli import main
from diffx.config import UserError
from diffx.results.table import read_frame


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    monkeypatch.setattr(timing, "DECODED", 2)


@pytest.mark.slow
def test_figures_and_table(hf_folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    report = bench.bench_adapt(out, str(hf_folder), seq_len=16, batch=2, rounds=2, device="cpu")
    saved = json.loads(out.read_text())
    assert saved == json.loads(json.dumps(report))  # tuples become lists
    assert report["seconds"].keys() == {"training step", "prefill", "decoding"}
    assert (
        list(report["seconds"]["training step"])
        == list(report["bytes"]["training step"])
        == ["dex", "attn_only", "lora"]
    )
    for work in ("prefill", "decoding"):
        assert list(report["seconds"][work]) == ["base", "folded", "unfolded"]
    rounds = {
        work: {len(times) for times in seconds.values()}
        for work, seconds in report["seconds"].items()
    }
    assert rounds == {"training step": {2}, "prefill": {8}, "decoding": {8}}
    # W_D of 8 x 8 and lambda in each of two layers are all that dex trains more.
    counts = report["parameters"]
    assert counts["dex"]["trained"] - counts["attn_only"]["trained"] == 2 * (64 + 1)
    assert (
        counts["attn_only"]["trained"] == 2 * (2 * 32 * 16 + 32 * 32) and counts["lora"]["W_D"] == 0
    )
    memory = report["bytes"]["training step"]
    assert memory["dex"] > memory["attn_only"] > 4 * counts["attn_only"]["total"]
    printed = " ".join(capsys.readouterr().out.split())
    rows = read_frame(out.with_suffix(".parquet"))
    assert set(rows.source) == {"bench"} and set(rows.variant) == {
        "dex",
        "attn_only",
        "lora",
        "base",
        "folded",
        "unfolded",
    }
    seconds = rows[
        (rows.metric == "seconds") & (rows.task == "prefill") & (rows.variant == "folded")
    ]
    assert seconds.value.tolist() == report["seconds"]["prefill"][
        "folded"
    ] and seconds.example.tolist() == [str(n) for n in range(8)]
    assert rows[(rows.metric == "bytes") & (rows.variant == "dex")].value.tolist() == [
        memory["dex"]
    ]
    assert (
        "dex / attn_only" in printed
        and "at most 1.10" in printed
        and "at least 0.93" in printed
        and "0.98 to 1.02" in printed
    )


@pytest.mark.parametrize(
    ("met", "said"),
    [([None], ""), ([None, True], "all targets are met"), ([True, False], "targets not met")],
)
def test_targets_are_spoken_of_where_there_are_some(met, said, capsys):
    accepted = {None: (None, None), True: (None, 1.0), False: (1.1, None)}
    report = {"seconds": {"w": {"a": [1.0], "b": [1.0]}}}
    targets.show_ratios(
        report, [("w", "time", "a", "b", accepted[one]) for one in met], "title", None
    )
    assert [ratio["met"] for ratio in report["ratios"]] == met
    printed = capsys.readouterr().out
    assert said in printed and ("target" in printed.replace("target ", "", 1)) is bool(said)


def test_ratios_and_whether_targets_are_met():
    report = {
        "seconds": {
            "training step": {"dex": [2.4, 2.2, 2.0], "attn_only": [2.0] * 3},
            "prefill": {"base": [1.0], "folded": [1.25]},
        },
        "bytes": {"training step": {"dex": 105, "attn_only": 100}},
    }
    time = targets.target_ratio(report, "training step", "time", "dex", "attn_only", (None, 1.10))
    assert [time[key] for key in ("low", "median", "high", "met")] == [
        1.0,
        1.1,
        pytest.approx(1.2),
        True,
    ]
    assert (
        targets.target_ratio(report, "training step", "time", "dex", "attn_only", (None, 1.09))[
            "met"
        ]
        is False
    )
    memory = targets.target_ratio(
        report, "training step", "peak memory", "dex", "attn_only", (None, 1.05)
    )
    assert (memory["median"], memory["met"], memory["low"]) == (1.05, True, 1.05)
    speed = targets.target_ratio(report, "prefill", "speed", "folded", "base", (0.98, 1.02))
    assert (speed["median"], speed["met"]) == (0.8, False)
    assert (
        targets.target_ratio(report, "prefill", "speed", "base", "folded", (0.98, 1.02))["met"]
        is False
    )  # too fast is not equal either
    assert (
        targets.target_ratio(report, "prefill", "speed", "base", "folded", (None, None))["met"]
        is None
    )
    report["bytes"]["training step"] = {"dex": None, "attn_only": None}  # on MPS
    assert (
        targets.target_ratio(
            report, "training step", "peak memory", "dex", "attn_only", (None, 1.05)
        )["met"]
        is None
    )


def test_contestants_do_the_same_and_start_from_the_same_weights(hf_folder):
    found = bench.load_pretrained("base", str(hf_folder), torch.float32, torch.device("cpu"))
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    ids = torch.arange(20).view(2, 10)
    layers = bench.find_layers(found.model, {"input_ids": ids[:, :2]})
    unfolded, again = (bench._adapted(found, layers, "dex") for _ in range(2))
    with torch.no_grad():
        plain, branch, folded = (
            model(input_ids=ids).logits
            for model in (found.model, unfolded.model, bench.fold(again))
        )
    torch.testing.assert_close(folded, branch, atol=1e-4, rtol=1e-4)
    assert (plain - branch).abs().max() > 0.01  # lambda is not 0: the branch works
    assert all(torch.equal(value, before[name]) for name, value in found.model.state_dict().items())


def test_input_that_cannot_be_used(hf_folder, tmp_path, capsys):
    with pytest.raises(UserError, match=r"out=.* cannot be used: it must be the name"):
        bench.bench_adapt(tmp_path, str(hf_folder), 8, 1, 1, "cpu")
    with pytest.raises(
        UserError, match=r"seq_len=257 cannot be used: .*256 tokens at most, which tiny-llama reads"
    ):
        bench.bench_adapt(None, str(hf_folder), 257, 1, 1, "cpu")
    assert main(["bench", "adapt", "--base", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: base={tmp_path} cannot be used")
