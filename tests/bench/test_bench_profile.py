import json

import pytest

from diffx.bench import profile
from diffx.bench.profile import PARTS, bench_profile
from diffx.cli import main
from diffx.train.loop import token_losses

WORDS = [
    "tokenizer=bytes",
    "size=pico",
    "train.seq_len=32",
    "train.batch_tokens=64",
    "device=cpu",
    "data=text",
]


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ({"text": f"Note {n}. The square of {n} is {n * n}. " * 9} for n in range(200))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.path=text.jsonl"


@pytest.mark.slow
def test_parts_operators_and_a_trace(text, tmp_path, capsys):
    report = bench_profile([*WORDS, text, "data.val_tokens=2000"], tmp_path / "trace.json", steps=2)
    assert tuple(report["seconds"]) == PARTS and min(report["seconds"].values()) > 0
    assert report["tokens_per_second"] == pytest.approx(64 / sum(report["seconds"].values()))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event.get("name") for event in events} >= set(PARTS)
    printed = capsys.readouterr().out
    assert "aten::" in printed and "loader" in printed and "checkpoints" in printed


@pytest.mark.slow
def test_micro_batches_and_documents_are_those_of_the_loop(text, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        profile,
        "token_losses",
        lambda model, *args: (seen.append(args), token_losses(model, *args))[1],
    )
    words = [
        *WORDS,
        text,
        "data.val_tokens=2000",
        "train.micro_batch_size=1",
        "train.mask_documents=true",
    ]
    report = bench_profile(words, tmp_path / "trace.json", steps=1)
    assert {inputs.shape for inputs, _, _ in seen} == {(1, 32)} and len(seen) == 2 * (
        profile._WARM + 1 + profile.TRACED
    )
    assert all(boundaries[0] == 0 and boundaries[-1] == 32 for _, _, boundaries in seen)
    assert min(report["seconds"].values()) > 0


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("model=magic", "magic"),
        ("train.lr=-1", "train.lr"),
        ("--trace no/x.json", "no/x.json"),
        ("--trace x", ".json"),
    ],
)
def test_what_cannot_be_used_is_one_line(text, more, part, capsys):
    assert main(["bench", "profile", *WORDS, text, *more.split()]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and part in said
