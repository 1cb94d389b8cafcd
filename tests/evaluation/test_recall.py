"""The recall suite: its figures against `transformers`, beyond the training number, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffx.cli import main
from diffx.evaluation.run import read_records
from diffx.files import read_json
from diffx.results.read import read_results

SUITE = "suite=recall suite.samples=12 wandb.mode=disabled device=cpu"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of `diffx train` on samples of 1 to 3 pairs, of 5 keys and 5 values."""
    folder = tmp_path_factory.mktemp("recall") / "run"
    words = (
        "model=transformer model.hidden_size=16 model.num_layers=1 model.num_heads=2 "
        "model.num_kv_heads=2 model.intermediate_size=16 model.init_std=0.5 data=recall "
        "data.length=24 data.pairs=3 data.keys=5 data.values=5 data.val_tokens=96 train.seq_len=24 "
        "train.batch_tokens=96 train.steps=3 train.sample_tokens=0 wandb.mode=disabled device=cpu"
    )
    assert main(["train", *words.split(), f"run.dir={folder}"]) == 0
    return folder


def evaluate(checkpoint, words):
    assert main(["eval", f"checkpoint={checkpoint}", *SUITE.split(), *words.split()]) == 0
    base = checkpoint if (checkpoint / "evals").exists() else checkpoint.parent / "runs" / "hub"
    (newest,) = sorted(base.rglob("results.json"), key=lambda path: path.stat().st_mtime)[-1:]
    metrics = read_json(newest)["metrics"]
    figures = {(row["length"], row["pairs"], row["metric"]): row["value"] for row in metrics}
    return figures, newest.parent


def test_figures_are_those_of_transformers(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    figures, folder = evaluate(run, "")
    assert {key[:2] for key in figures} == {(24, 1), (24, 2), (24, 4)}, "4 is beyond the training"
    exported = run.parent / "exported"
    assert main(["export", f"checkpoint={run}", f"out={exported}"]) == 0
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported, add_bos_token=False)
    measured: dict = {}
    samples = set()
    for record in read_records(folder):
        words = record["sample"].split()
        pairs = record["by"]["pairs"]
        ids = tokenizer.convert_tokens_to_ids(words)
        told = dict(zip(words[1 : 2 * pairs : 2], words[2 : 2 * pairs + 1 : 2], strict=True))
        places = [
            place
            for place in range(2 * pairs + 1, 23)
            if told.get(words[place]) == words[place + 1]
        ]
        assert sorted(words[place] for place in places) == sorted(told) and len(told) == pairs
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, places]
        targets = torch.tensor(ids)[torch.tensor(places) + 1]
        right = (logits.argmax(-1) == targets).double().mean()
        loss = F.cross_entropy(logits, targets)
        measured.setdefault((24, pairs, "accuracy"), []).append(float(right))
        measured.setdefault((24, pairs, "nll"), []).append(float(loss))
        samples.add(record["sample"])
    assert len(samples) == 36 and all(len(values) == 12 for values in measured.values())
    for key, values in measured.items():
        assert figures[key] == pytest.approx(np.mean(values), abs=1e-5), key
    assert 0 < figures[24, 4, "accuracy"] < 1
    again, _ = evaluate(exported, "batch=5")
    assert again == pytest.approx(figures, abs=1e-5), "an exported model, and other batches"


def test_rows_have_the_number_of_pairs(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    figures, folder = evaluate(run, "suite.pairs=[3,2] suite.length=40 limit=2 seed=1")
    assert {key[:2] for key in figures} == {(40, 2), (40, 3)}
    frame = read_results([run])
    rows = frame[(frame["source"] == "recall") & (frame["length"] == 40)]
    assert rows["pairs"].value_counts().to_dict() == {2: 4, 3: 4}
    assert set(rows["metric"]) == {"accuracy", "nll"} and set(rows["architecture"]) == {
        "transformer"
    }
    assert (folder / "recall.png").stat().st_size > 10_000
    results = read_json(folder / "results.json")
    assert "1 to 3 pairs" in results["declaration"]["notes"][0]
    guess = {row["pairs"]: row["published"] for row in results["metrics"] if row["published"]}
    assert [*guess[2].values(), *guess[3].values()] == [1 / 2, 1 / 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("suite=recall suite.pairs=[2,6]", ["suite.pairs=6", "data.keys=5", "23 tokens"]),
        ("suite=recall suite.pairs=0", ["suite.pairs=0"]),
        ("suite=recall suite.length=4", ["suite.length=4", "5 or more"]),
        ("suite=outliers", ["data=recall", "not text"]),
        ("suite=retrieval", ["data=recall", "not text"]),
    ],
)
def test_refusals(run, words, said, capsys):
    before = sorted(run.rglob("*"))
    command = ["eval", f"checkpoint={run}", "wandb.mode=disabled", "device=cpu", *words.split()]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in said), error
    assert sorted(run.rglob("*")) == before
