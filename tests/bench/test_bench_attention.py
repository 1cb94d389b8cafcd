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
    assert [list(times) for times in report["seconds"].values()] == [
        ["baseline", "padded", "four calls", "diffx"]
    ] * 2
    assert all(size > 0 for memory in report["bytes"].values() for size in memory.values())
    assert report["matmul_ceiling"] > 0 and list(report["flops_per_second"]) == ["T=32", "T=48"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "of a plain matrix product" in printed
    assert "diffx / four calls" in printed and "diffx / baseline" in printed


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
