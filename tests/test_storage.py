"""A full disk, an unwritable folder, files of a killed process: one line, no work lost."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess

import pytest
import zstandard
from filelock import FileLock
from matplotlib.figure import Figure
from safetensors import SafetensorError

from diffx.cli import main
from diffx.config import launch
from diffx.errors import UserError
from diffx.files import (
    append_lines,
    checked_line,
    json_sha256,
    locked,
    open_text,
    read_json_lines,
    sha256,
)

TRAIN = (
    "train model=transformer tokenizer=bytes model.hidden_size=32 model.num_layers=1 "
    "model.num_heads=4 model.num_kv_heads=2 train.steps=2 train.seq_len=64 "
    "train.batch_tokens=128 train.warmup=1 train.sample_tokens=0 data=text "
    "data.path=text.jsonl data.val_tokens=500"
)
ICL = "suite=icl suite.shots=[1] suite.queries=12 suite.labels=3"
QUIET = "wandb.mode=disabled device=cpu"
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        rows = (
            {"text": f"Note {n}. The square of {n} is {n * n}. Nothing else is known of it. " * 3}
            for n in range(60)
        )
        (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main([*TRAIN.split(), *QUIET.split(), "run.dir=run"]) == 0
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made / "run", "run")
    shutil.copy(made / "text.jsonl", "text.jsonl")
    return tmp_path


@pytest.fixture
def fails(capfd):
    """Run a command that must fail: ``fails(code, command, parts of its one line)``."""

    def run(code, command, *parts):
        capfd.readouterr()
        assert main(command.split()) == code
        err = [
            line
            for line in capfd.readouterr().err.splitlines()
            if line.startswith("error: ") or "Traceback" in line
        ]
        assert len(err) == 1 and all(part in err[0] for part in parts), err

    return run


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


def visible(folder):
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


class Filling:
    """A file of which the disk takes some lines."""

    def __init__(self, file, lines):
        self.file, self.lines = file, lines

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def flush(self):
        self.file.flush()

    def write(self, text):
        if not self.lines:
            self.file.write(text[: len(text) // 2])
            raise FULL
        self.lines -= 1
        self.file.write(text)


def test_lines_that_were_torn_or_altered_are_left_out(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    rows = [
        {"id": str(n), "text": 'a", "checksum": "b', "value": n / 7, "none": None} for n in range(4)
    ]
    assert read_json_lines(path, skip_damaged=True) == []
    for row in rows:
        with append_lines(path) as file:
            file.write(checked_line(row))
    assert read_json_lines(path, skip_damaged=True) == rows and not caplog.text
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b'"0"', b'"1"') + lines[1] + b'{"old": 1}\n' + lines[2][:30])
    with append_lines(path) as file:
        file.write(checked_line(rows[3]))
    assert (
        read_json_lines(path, skip_damaged=True) == [rows[1], {"old": 1}, rows[3]]
        and "2 damaged lines" in caplog.text
    )


def test_a_line_without_its_newline_is_left_out_and_a_damaged_one_refused(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n' + checked_line({"step": 2}) + '{"step": 3}')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n' + checked_line({"step": 2}).replace("2", "4", 1))
    with pytest.raises(UserError, match="line 2"):
        read_json_lines(path)


@pytest.mark.parametrize(
    "suffix, opener", [("", open), (".gz", gzip.open), (".zst", zstandard.open)]
)
def test_text_is_opened_whatever_compressed_it(tmp_path, suffix, opener):
    path = tmp_path / f"text.jsonl{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("é\n2\n")
    with open_text(path) as file:
        assert list(file) == ["é\n", "2\n"]


def test_one_hash_of_files_bytes_and_text(tmp_path):
    (tmp_path / "file").write_bytes(b"b" * (1 << 21))
    assert (
        sha256("é", tmp_path / "file", b"c")
        == hashlib.sha256("é".encode() + b"b" * (1 << 21) + b"c").hexdigest()
    )
    assert (
        json_sha256({"b": 1, "a": 2})
        == sha256('{"a": 2, "b": 1}')
        != json_sha256({"b": 1, "a": 2}, sort_keys=False)
    )


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    with locked(tmp_path / ".lock", "the folder a"):
        with (
            pytest.raises(UserError, match=r"the folder a .* another process"),
            locked(tmp_path / ".lock", "the folder a"),
        ):
            pass
        assert visible(tmp_path) == [".lock"]
    assert visible(tmp_path) == []


def test_an_evaluation_on_a_full_disk_goes_on(here, fails, monkeypatch, capfd):
    command = f"eval checkpoint=run {ICL} {QUIET}"
    with monkeypatch.context() as patch:
        patch.setattr(
            "diffx.evaluation.run.append_lines", lambda path: Filling(append_lines(path), 5)
        )
        fails(1, command, "run/evals", "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", raiser(FULL))
        fails(1, command, "run/evals", "No space left on device")
    assert main(command.split()) == 0
    (folder,) = (here / "run/evals/2/icl").iterdir()
    files = ["icl.png", "records.jsonl.zst", "results.json", "rows.parquet", "settings.json"]
    assert visible(folder) == files
    assert json.loads((folder / "results.json").read_text())["examples"] == 12


def test_an_export_that_fails_leaves_nothing_and_names_out(here, fails, monkeypatch):
    stale = here / "models" / ".x.tmp"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_text("")
    command = "export checkpoint=run out=models/x"
    for error in (
        SafetensorError("Error: No space left on device (os error 28)"),
        FULL,
        OSError(errno.EROFS, "Read-only file system"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("transformers.PreTrainedModel.save_pretrained", raiser(error))
            fails(
                1,
                command,
                "out=models/x cannot be written: ",
                "Read-only" if "Read-only" in str(error) else "No space left",
            )
        assert visible(here / "models") == []
    with FileLock(here / "models" / ".x.lock"):
        fails(2, command, "out=models/x", "another process")
    stale.mkdir()
    (stale / "half.safetensors").write_text("")
    assert main(command.split()) == 0
    assert visible(here / "models") == ["x"] and not (here / "models/x/half.safetensors").exists()


@pytest.mark.slow
def test_quantized_weights_that_fail_leave_nothing(here, fails, monkeypatch):
    command = f"quantize checkpoint=run method=weights bits=[8] suite.texts=2 {QUIET}"
    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedModel.save_pretrained", raiser(FULL))
        fails(1, command, "quantized/2/", "No space left on device")
    assert visible(here / "run/quantized/2") == []
    from diffx.quantization import weights

    def killed(*arguments):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(weights, "load_pretrained", killed)
        patch.setattr("diffx.files.shutil.rmtree", lambda *_, **__: None)  # as SIGKILL leaves it
        with pytest.raises(SystemExit):
            main(command.split())
    assert [name for name in visible(here / "run/quantized/2") if name.endswith(".tmp")]
    assert main(command.split()) == 0
    (name,) = visible(here / "run/quantized/2")
    assert (
        name.startswith("weight_only-8bit-")
        and not (here / "run/quantized/2" / name / "plain").exists()
    )


def test_a_comparison_that_fails_leaves_nothing(here, fails, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / ".c.png.tmp.png").write_text("of a killed process")
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", raiser(FULL))
        fails(
            1,
            "compare run --out out/c.png",
            "out/c.png cannot be written",
            "No space left on device",
        )
    (here / "out" / ".c.png.tmp.png").write_text("of a killed process")
    assert main(["compare", "run", "--out", "out/c.png"]) == 0
    assert visible(here / "out") == ["c.json", "c.png"]


def test_a_sweep_on_a_full_disk_goes_on_and_counts(here, monkeypatch, capfd):
    monkeypatch.setattr("diffx.config.launch.append_lines", raiser(FULL))
    command = "params -m model=transformer,diff_v1 model.num_kv_heads=3 hydra.sweep.dir=sweep"
    assert main(command.split()) == 2
    err = capfd.readouterr().err.splitlines()
    assert (
        len(err) == 3
        and err[0].startswith("error: job 0")
        and err[1].startswith("error: job 1")
        and "2 jobs" in err[2]
    )


def test_a_result_that_cannot_be_written_is_a_failed_job(here, monkeypatch, capfd):
    def full_for_results(path, entry, of=launch._append):
        if path.name == "jobs.jsonl":
            raise FULL
        of(path, entry)

    monkeypatch.setattr(launch, "_append", full_for_results)
    monkeypatch.setattr("diffx.quantization.run.quantize", lambda job: {16: here})
    command = (
        f"quantize -m checkpoint=run seed=0,1 bits=[8] suite.texts=2 hydra.sweep.dir=sweep {QUIET}"
    )
    assert main(command.split()) == 1
    err = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(err) == 3 and "No space left" in err[0] and "2 jobs" in err[2]
    assert len((here / "sweep/failed.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0, reason="a file system is mounted by root alone"
)
@pytest.mark.parametrize("room", [0, 8 << 10, 40 << 10, None])
def test_a_file_system_without_room_and_one_that_is_read_only(here, fails, room):
    disk = here / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree("run", disk / "run")
        if room is None:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            free = os.statvfs(disk)
            (disk / "filler").write_bytes(b"x" * max(free.f_bavail * free.f_bsize - room, 0))
        reason = "Read-only file system" if room is None else "No space left on device"
        data = "data=text data.path=text.jsonl tokenizer=bytes"
        fails(1, f"export checkpoint=run out={disk}/x", f"{disk}/x", reason)
        fails(
            1,
            f"quantize checkpoint={disk}/run method=weights bits=[8] suite.texts=2 {QUIET}",
            str(disk),
            reason,
        )
        fails(1, f"eval checkpoint={disk}/run {ICL} suite.queries=200 {QUIET}", str(disk), reason)
        if room in (0, None):
            fails(1, f"data prepare {data} out={disk}/shards workers=1", f"{disk}/shards", reason)
            fails(1, f"compare run --out {disk}/c.png", f"{disk}/c.png", reason)
            fails(1, f"params -m seed=0,1 hydra.sweep.dir={disk}/sweep", reason)
        assert not [name for name in visible(disk) if name.startswith(".")]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
