import json

import pytest
import torch

from diffx.bench import attention as bench
from diffx.bench import timing
from diffx.cli import main
from diffx.config import UserError
from diffx.ops import differential_attention


@pytest.mark.slow
def test_figures_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)
    out = tmp_path / "bench.json"
    report = bench.bench_attention(
        out, heads=4, width=8, seq_lens=[32, 48], rounds=2, dtype="auto", device="cpu"
    )
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert list(report["seconds"]) == ["T=32", "T=48"]
    assert [list(own) for own in report["seconds"].values()] == [
        ["baseline", "padded", "four calls", "ours"]
    ] * 2
    assert all(memory > 0 for own in report["bytes"].values() for memory in own.values())
    assert report["flops_per_second"]["matrix product"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "T=48, of a plain matrix product's operations a second: baseline" in printed
    assert "ours / four calls" in printed and "ours / baseline" in printed


def test_the_four_calls_are_differential_attention():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 9, 6, 4, generator=generator) for _ in range(2))
    v, lam = torch.randn(2, 9, 3, 8, generator=generator), torch.tensor(0.3)
    torch.testing.assert_close(
        bench._four_calls(q, k, v, lam), differential_attention(q, k, v, lam, impl="reference")
    )


def test_what_cannot_be_used_is_one_line(capsys):
    with pytest.raises(UserError, match="heads=3"):
        bench.bench_attention(
            None, heads=3, width=8, seq_lens=[16], rounds=1, dtype="auto", device="cpu"
        )
    assert main(["bench", "attention", "--out", "no/folder/x.json"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
