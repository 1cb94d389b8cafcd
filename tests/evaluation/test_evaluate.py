"""The runner: its folder of results, resumption, forced and repeated evaluations, sweeps."""

import errno
import json
import re
import shutil
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from diffx.cli import main
from diffx.config import RunError, UserError
from diffx.config.launch import compose
from diffx.evaluation import icl, run
from diffx.evaluation.run import evaluate, read_records

TINY = (
    "tokenizer=bytes model.hidden_size=32 model.num_layers=1 model.num_heads=4 "
    "model.num_kv_heads=2 train.steps=4 train.save_every=2 train.eval_every=4 "
    "train.seq_len=128 train.batch_tokens=256 train.warmup=1 train.sample_tokens=0 "
    "data=text data.val_tokens=500 wandb.mode=disabled device=cpu"
)
SUITE = "suite=icl suite.shots=[1,2] suite.queries=6 suite.labels=3 wandb.mode=disabled device=cpu"


@pytest.fixture(scope="module")
def runs(documents, tmp_path_factory):
    """Two trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        for seed, kind in enumerate(["transformer", "diff_v1"]):
            assert (
                main(
                    [
                        "train",
                        *TINY.split(),
                        f"data.path={documents}",
                        f"model={kind}",
                        f"seed={seed}",
                        f"run.dir={folder}/{kind}",
                    ]
                )
                == 0
            )
    return folder


@pytest.fixture
def measure(runs):
    """Evaluate the first run: ``measure("limit=2")``; ``force`` deletes earlier results."""

    def measured(*words, spec="transformer"):
        return evaluate(compose("eval", [f"checkpoint={runs}/{spec}", *SUITE.split(), *words]), [])

    return measured


def results(folder):
    return json.loads((folder / "results.json").read_text())


def without_time(folder):
    return {key: value for key, value in results(folder).items() if key != "seconds"}


def test_the_folder(measure, runs):
    folder = measure()
    assert folder.parent == runs / "transformer" / "evals" / "4" / "icl"
    assert sorted(path.name for path in folder.iterdir()) == [
        "icl.png",
        "records.jsonl.zst",
        "results.json",
        "rows.parquet",
        "settings.json",
    ]
    found, records = results(folder), read_records(folder)
    assert found["examples"] == len(records) == 12 and found["settings_hash"] == folder.name
    assert [record["id"] for record in records] == [
        f"synthetic/{shots}/{query}" for shots in (1, 2) for query in range(6)
    ]
    (metric,) = [metric for metric in found["metrics"] if metric["label"] == "synthetic 2 shots"]
    scores = [record["scores"]["accuracy"] for record in records if record["by"]["shots"] == 2]
    assert (
        metric["value"] == pytest.approx(sum(scores) / 6)
        and metric["n"] == 6
        and metric["low"] <= metric["value"] <= metric["high"]
    )
    assert found["checkpoint"]["step"] == 4 and len(found["checkpoint"]["fingerprint"]) == 64
    assert (folder / "icl.png").read_bytes().startswith(b"\x89PNG")


def test_settings_and_checkpoints_have_folders_of_their_own(measure):
    folders = {
        measure(*words) for words in ([], ["limit=2"], ["seed=1"], ["batch=1"], ["suite.queries=5"])
    }
    assert len(folders) == 4  # how many at once is no setting
    assert measure(spec="transformer@2").parent.parent.name == "2"


SEVERAL = (
    "suite=[icl,icl_order] suite.shots=2 suite.queries=4 suite.labels=3 limit=2 "
    "wandb.mode=disabled device=cpu"
)


def test_several_suites_load_the_model_once(runs, tmp_path, monkeypatch, capsys):
    loads, checkpoint = [], tmp_path / "run"
    ignored = shutil.ignore_patterns("evals")
    shutil.copytree(runs / "diff_v1", checkpoint, ignore=ignored)
    monkeypatch.setattr(run, "load", lambda *args, of=run.load: (loads.append(args), of(*args))[1])
    words = [f"checkpoint={checkpoint}", *SEVERAL.split()[1:]]
    together = {}
    assert main(["eval", *words, "suite=[icl,icl_order]"]) == 0 and len(loads) == 1
    assert (
        "synthetic 2 shots" in (shown := capsys.readouterr().out)
        and "synthetic alternating" in shown
    )
    for name in ("icl", "icl_order"):
        (folder,) = (checkpoint / "evals" / "4" / name).iterdir()
        together[folder] = without_time(folder)
    for (folder, expected), name in zip(together.items(), ("icl", "icl_order"), strict=True):
        assert evaluate(compose("eval", [*words, f"suite={name}", "force=true"]), []) == folder
        assert without_time(folder) == expected


def test_a_suite_that_fails_does_not_stop_the_others(runs, monkeypatch, capsys):
    words = ["eval", f"checkpoint={runs}/diff_v1@2", "limit=2", "wandb.mode=disabled", "device=cpu"]
    suites = "suite=[icl_order,icl]"  # by default icl_order does not fit into the context
    assert main([*words, suites]) == 2
    assert "error: suite=icl_order: suite.shots=null cannot be used" in capsys.readouterr().err
    assert len(list((runs / "diff_v1" / "evals" / "2" / "icl").glob("*/results.json"))) == 1

    def broken(context, examples):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(icl, "answer", broken)
    assert main([*words, suites, "seed=3"]) == 1
    assert "error: suite=icl: ZeroDivisionError: a defect" in capsys.readouterr().err


def test_a_list_of_suites_in_a_sweep(runs, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoints = f"checkpoint={runs}/transformer@2,{runs}/diff_v1@2"
    words = [
        checkpoints,
        "suite=[icl,outliers]",
        "limit=1",
        "wandb.mode=disabled",
        "device=cpu",
        "seed=5",
    ]
    assert main(["eval", "-m", *words]) == 0
    for kind in ("transformer", "diff_v1"):
        for name in ("icl", "outliers"):
            settings = [
                results(path.parent)["settings"]
                for path in (runs / kind / "evals" / "2" / name).glob("*/results.json")
            ]
            assert any(found["seed"] == 5 for found in settings)


def test_what_is_there_is_shown_and_force_measures_again(measure, monkeypatch, capsys):
    folder = measure()
    before = without_time(folder)

    def never(*_):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(icl, "answer", never)
        assert measure() == folder
        assert "measured before" in capsys.readouterr().out
        with pytest.raises(AssertionError, match="measured again"):
            measure("force=true")
    assert not (folder / "results.json").exists()
    assert without_time(measure()) == before


def test_an_interrupted_evaluation_goes_on(measure, monkeypatch):
    whole = measure("seed=2")
    expected, records = without_time(whole), read_records(whole)
    answer = icl.answer

    def stopped(context, examples):
        for number, record in enumerate(answer(context, examples)):
            if number == 5:
                raise KeyboardInterrupt
            yield record

    with monkeypatch.context() as patch:
        patch.setattr(icl, "answer", stopped)
        with pytest.raises(KeyboardInterrupt):
            measure("seed=2", "force=true")
    path = whole / "records.jsonl"
    assert len(path.read_text().splitlines()) == 5 and not (whole / "results.json").exists()
    with path.open("a") as file:
        file.write('{"id": "synthetic/1/5", "gro')  # as a kill leaves it
    asked = []

    def counted(context, examples):
        asked.extend(example.id for example in examples)
        return answer(context, examples)

    with monkeypatch.context() as patch:
        patch.setattr(icl, "answer", counted)
        measure("seed=2")
    assert len(asked) == 7
    assert [{**record, "log_probability": 0} for record in read_records(whole)] == [
        {**record, "log_probability": 0} for record in records
    ]
    assert without_time(whole) == expected and not path.exists()


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(runs):
    words = [
        f"checkpoint={runs}/transformer",
        *SUITE.split(),
        "suite.queries=400",
        "seed=3",
        "batch=1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffx", "eval", *words], stdout=subprocess.DEVNULL
    )
    records = []
    for _ in range(1200):
        time.sleep(0.05)
        records = list(runs.glob("transformer/evals/4/icl/*/records.jsonl"))
        if records and len(records[0].read_text().splitlines()) > 3:
            break
    process.kill()
    process.wait()
    assert records and not (records[0].parent / "results.json").exists()
    folder = evaluate(compose("eval", words), [])
    assert folder == records[0].parent
    killed, fresh = (
        without_time(folder),
        without_time(evaluate(compose("eval", [*words, "force=true"]), [])),
    )
    assert killed == fresh


def test_other_weights_are_measured_again(measure, monkeypatch, capsys):
    folder = measure("seed=4")
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(
        json.dumps(settings | {"fingerprint": "of other weights"})
    )
    measure("seed=4")
    assert "are not those that were measured before" in capsys.readouterr().out
    assert json.loads((folder / "settings.json").read_text()) == settings


def test_one_process_at_a_time(measure):
    folder = measure("seed=5")
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="another process"):
        measure("seed=5")


def test_a_sweep_and_a_model_of_the_hub(runs, hf_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "eval",
                "-m",
                f"checkpoint={runs}/transformer,{runs}/diff_v1,{hf_folder}",
                *SUITE.split(),
                "seed=6",
            ]
        )
        == 0
    )
    names = {
        results(path.parent)["checkpoint"]["name"]
        for path in tmp_path.glob("runs/hub/*/evals/0/icl/*/results.json")
    }
    assert names == {"tiny-llama"}
    assert len(list(runs.glob("diff_v1/evals/4/icl/*/results.json"))) == 1


def test_what_a_killed_process_has_left_goes_when_results_are_shown(measure):
    folder = measure("seed=7")
    kept = sorted(path.name for path in folder.iterdir())
    for name in (
        "records.jsonl",
        "requests.jsonl",
        ".icl.png.tmp.png",
        ".results.json.tmp",
        ".records.jsonl.zst.tmp",
        "verdicts_a.jsonl",
    ):
        (folder / name).write_text("{")
    measure("seed=7")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*kept, "verdicts_a.jsonl"])


def test_an_altered_record_is_measured_again(measure, monkeypatch, caplog):
    folder = measure("seed=8")
    expected, answer, asked = without_time(folder), icl.answer, []

    def stopped(context, examples):
        for number, record in enumerate(answer(context, examples)):
            if number == 6:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield record

    def counted(context, examples):
        asked.extend(example.id for example in examples)
        return answer(context, examples)

    with monkeypatch.context() as patch:
        patch.setattr(icl, "answer", stopped)
        with pytest.raises(RunError, match="No space"):
            measure("seed=8", "force=true")
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert len(lines) == 6
    lines[0] = re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.5', lines[0])
    lines[2] = "[" * 100_000
    lines[3] = '{"id": 5, "by": []}'
    lines[4] = "null"
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(icl, "answer", counted)
    measure("seed=8")
    assert len(asked) == 12 - 2 and "damaged" in caplog.text
    assert without_time(folder) == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"fingerprint": 5}', "{}"])
def test_damaged_settings_are_measured_again(measure, capsys, text):
    folder = measure("limit=1")
    before, settings = without_time(folder), (folder / "settings.json").read_text()
    (folder / "settings.json").write_text(text)
    (folder / "of_unknown_settings.txt").write_text("")
    assert measure("limit=1") == folder
    assert "settings.json" in capsys.readouterr().out.replace("\n", "")
    assert without_time(folder) == before and (folder / "settings.json").read_text() == settings
    assert not (folder / "of_unknown_settings.txt").exists()


METRIC = {"label": "a", "metric": "b", "value": 1.0}


@pytest.mark.parametrize(
    "damaged",
    [
        *(
            "",
            "{",
            "[]",
            "[" * 100_000,
            "{}",
            '{"metrics": 5}',
            '{"metrics": [5]}',
            '{"metrics": [{"label": "a"}]}',
        ),
        *(
            json.dumps({"metrics": [METRIC | {key: value}]})
            for key, value in (("value", "5"), ("label", 5), ("published", [1]), ("low", "x"))
        ),
    ],
)
def test_damaged_results_are_computed_again_from_the_records(measure, monkeypatch, capsys, damaged):
    folder = measure("limit=2")
    before = without_time(folder)
    (folder / "results.json").write_text(damaged)
    with monkeypatch.context() as patch:
        patch.setattr(icl, "answer", lambda *_: pytest.fail("measured again"))
        measure("limit=2")
    assert "computed again" in capsys.readouterr().out.replace("\n", " ")
    assert without_time(folder) == before


@pytest.mark.parametrize(
    "cut",
    [
        lambda content: content[:-20],
        lambda content: content[:40] + b"\0\0" + content[42:],
        lambda content: b"",
    ],
)
def test_damaged_records_of_an_unfinished_evaluation_are_measured_again(measure, cut):
    folder = measure("seed=9")
    before = without_time(folder)
    (folder / "results.json").unlink()
    path = folder / "records.jsonl.zst"
    path.write_bytes(cut(path.read_bytes()))
    measure("seed=9")
    assert without_time(folder) == before and len(read_records(folder)) == 12


def test_text_that_was_held_out_otherwise_is_warned_of(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs / "transformer", run, ignore=shutil.ignore_patterns("evals"))
    words = ["suite=long_context", "suite.texts=1", "suite.length=16", "wandb.mode=disabled"]
    evaluate(compose("eval", [f"checkpoint={run}", *words, "device=cpu"]), [])
    assert "held out" not in capsys.readouterr().out
    data = json.loads((run / "data.json").read_text())
    data["val"]["bytes"] += 1
    (run / "data.json").write_text(json.dumps(data))
    evaluate(compose("eval", [f"checkpoint={run}", *words, "device=cpu", "force=true"]), [])
    assert "may have been trained on a part" in " ".join(capsys.readouterr().out.split())
    (run / "data.json").write_text(json.dumps(data | {"val": 5}))  # says nothing
    evaluate(compose("eval", [f"checkpoint={run}", *words, "device=cpu", "force=true"]), [])
    assert "may have been trained on" not in " ".join(capsys.readouterr().out.split())
