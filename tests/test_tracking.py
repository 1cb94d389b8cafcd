import json
import sys
import time
import types

from matplotlib.figure import Figure

from diffx.config.train import WandbConfig, WandbMode
from diffx.tracking import NullTracker, Tracker, cut_back, show_evaluation


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, said, mode=WandbMode.disabled, **more):
    return Tracker(folder, WandbConfig(mode=mode), "name", {"a": 1}, said.append, **more)


def test_one_object_a_line(tmp_path):
    with run(tmp_path, []) as track:
        track.log(0, 0, {"val/loss": 2.0})
        track.log(10, 640, {"train/loss": 1.5})
    rows = lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["tokens"]) for row in rows] == [(0, 0), (10, 640)]
    assert rows[1]["train/loss"] == 1.5
    assert rows[1]["time"] >= 0


def test_a_resumed_run_cuts_back_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "tokens": 0}) + "\n" for step in (0, 10, 20, 30))
        + '{"step": 4'
    )
    with run(tmp_path, [], resume_step=20, seconds=100.0) as track:
        track.log(30, 0, {})
        assert track.seconds >= 100
    assert [row["step"] for row in lines(path)] == [0, 10, 20, 30]
    cut_back(path, -1)
    assert path.read_text() == ""


def test_wandb_offline_writes_beside_the_run_and_resumes_its_id(tmp_path):
    for step in (0, 1):
        with run(tmp_path, said := [], WandbMode.offline) as track:
            track.log(step, step, {"train/loss": 1.0})
            track.samples(step, [("a", "b")])
            track.summary({"val/loss": 1.0})
        assert said == []
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "wandb_id.txt").read_text().strip()}


def test_a_wandb_failure_is_said_once_and_stops_nothing(tmp_path, monkeypatch):
    class Run:
        id = "x"

        def define_metric(self, *_, **__):
            pass

        def log(self, *_, **__):
            raise ConnectionError("gone")

    broken = types.SimpleNamespace(init=lambda **_: Run(), Settings=lambda **_: None)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with run(tmp_path, said := [], WandbMode.offline) as track:
        for step in range(3):
            track.log(step, step, {"train/loss": 1.0})
    assert len(said) == 1
    assert "gone" in said[0]
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_online_without_a_key_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with run(tmp_path, said := [], WandbMode.online) as track:
        track.log(0, 0, {"train/loss": 1.0})
    assert len(said) == 1
    assert "API key" in said[0]


def test_the_null_tracker_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullTracker() as track:
        track.log(0, 0, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


ROWS = [["N=1 R=1", "greedy", 0.5], ["N=2 R=2", "greedy", 0.25]]


def evaluation(folder, said, mode):
    Figure(figsize=(1, 1)).savefig(picture := folder / "retrieval.png")
    figures, columns = {"accuracy of all": 0.5}, ["group", "metric", "value"]
    show_evaluation(
        folder,
        WandbConfig(mode=mode),
        "x",
        {"suite": "retrieval"},
        columns,
        ROWS,
        figures,
        picture,
        said.append,
    )


def test_an_evaluation_is_a_run_with_a_table_a_picture_and_figures(tmp_path):
    for _ in range(2):
        evaluation(tmp_path, said := [], WandbMode.offline)
        assert said == []
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert {run.name.split("-")[3] for run in runs} == {
        (tmp_path / "wandb_id.txt").read_text().strip()
    }
    for run in runs:
        (table,) = run.glob("files/media/table/*.json")
        content = json.loads(table.read_text())
        assert content["columns"] == ["group", "metric", "value"] and content["data"] == ROWS
        (picture,) = run.glob("files/media/images/*.png")
        assert picture.read_bytes() == (tmp_path / "retrieval.png").read_bytes()
        (log,) = run.glob("*.wandb")
        deadline = time.monotonic() + 30  # W&B's own process writes it a moment later
        while b"accuracy of all" not in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b"eval" in log.read_bytes() and b"accuracy of all" in log.read_bytes()


def test_an_evaluation_survives_wandb(tmp_path, monkeypatch):
    evaluation(tmp_path, said := [], WandbMode.disabled)
    assert said == [] and not (tmp_path / "wandb").exists()
    monkeypatch.setattr("wandb.init", lambda **_: 1 / 0)
    evaluation(tmp_path, said, WandbMode.offline)
    assert len(said) == 1 and "ZeroDivisionError" in said[0] and "files are whole" in said[0]


def test_wandb_is_told_the_axis_the_tags_and_the_lines(tmp_path, monkeypatch):
    given, calls = {}, []
    wandb_run = types.SimpleNamespace(
        id="x",
        log=lambda row, step: calls.append((step, row)),
        define_metric=lambda name, step_metric=None: calls.append((name, step_metric)),
        finish=lambda **_: None,
    )
    stub = types.SimpleNamespace(
        init=lambda **more: given.update(more) or wandb_run, Settings=lambda **_: None
    )
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with run(tmp_path, said := [], WandbMode.offline, tags=["a", "b"]) as track:
        track.constants = {"baselines/unigram/nats": 3.5}
        track.log(0, 0, {"val/loss": 2.0})
        track.log(5, 640, {"train/loss": 1.0})
    assert said == [] and given["tags"] == ["a", "b"]
    assert calls[:2] == [("tokens", None), ("*", "tokens")]
    assert calls[2:] == [
        (0, {"tokens": 0, "val/loss": 2.0, "baselines/unigram/nats": 3.5}),
        (5, {"tokens": 640, "train/loss": 1.0}),
    ]
    assert "baselines/unigram/nats" not in lines(tmp_path / "metrics.jsonl")[0]
