import json

import pytest

from diffx.bench import quantize as bench
from diffx.bench import timing
from diffx.cli import main
from diffx.config import UserError


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    monkeypatch.setattr(timing, "DECODED", 2)


@pytest.mark.slow
def test_figures_and_table(hf_folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    report = bench.bench_quantize(out, str(hf_folder), seq_len=16, batch=2, rounds=2, device="cpu")
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    names = ["original", "int8", "int8_dynamic"]
    for work in ("prefill", "decoding"):
        assert list(report["seconds"][work]) == names
    for work in ("attention", "differential attention"):
        assert list(report["seconds"][work]) == ["reference", "scope map", "scope row"]
    assert {len(times) for seconds in report["seconds"].values() for times in seconds.values()} == {
        2
    }
    size, memory = report["bytes"]["on disk"], report["bytes"]["prefill"]
    assert list(size) == list(memory) == names
    # 4 bytes of a weight become 1, and each row has a scale of 4 bytes;
    # the embedding and the output projection, two matrices, are not quantized.
    whole = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    saved = 3 * whole - 4 * rows
    assert (
        0 < size["int8"] - (size["original"] - saved) < 14 * 1000
    )  # a file has a header, of less than 1000 bytes for each matrix
    assert 0 < memory["int8"] < 2 * memory["original"]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "int8 / original" in printed
        and "scope map / reference" in printed
        and "at most 2.50" in printed
    )
    with pytest.raises(UserError, match="seq_len=300"):
        bench.bench_quantize(None, str(hf_folder), seq_len=300, batch=1, rounds=1, device="cpu")


@pytest.mark.parametrize(
    "words", [["--checkpoint", "missing"], ["--checkpoint", "{hub}", "--out", "no/folder/x.json"]]
)
def test_what_cannot_be_used_is_one_line(words, hf_folder, capsys):
    assert main(["bench", "quantize", *(word.format(hub=hf_folder) for word in words)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
