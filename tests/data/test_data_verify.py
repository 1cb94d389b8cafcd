"""Altered shards are detected; shards that were verified are not read again."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from filelock import FileLock

from diffx.config import UserError
from diffx.config.data import BpeTokenizer, BytesTokenizer, ShardsData, TextData
from diffx.config.train import PrepareJob
from diffx.data import open_data, sources
from diffx.data import shards as shards_module
from diffx.data.prepare import build, prepare
from diffx.data.shards import read_meta
from diffx.data.tokenizers import make_tokenizer

BPE = BpeTokenizer(vocab_size=280)


def job(jsonl, out, **options):
    data = TextData(path=str(jsonl), val_fraction=0.2, prompt_key="prompt")
    return PrepareJob(
        data=data, out=str(out), **{"tokenizer": BPE, "workers": 1, "shard_tokens": 2000} | options
    )


@pytest.fixture
def folder(jsonl, tmp_path):
    return prepare(job(jsonl, tmp_path / "shards"))


def opened(folder, **options):
    return open_data(ShardsData(path=str(folder)), BPE, **options)


def alter(path):
    """Change one bit; the size and the time of the last change stay."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns


def rewrite(folder, checksum=True, **values):
    """Write ``meta.json`` with other values, and with the right checksum or none."""
    path = folder / "meta.json"
    meta = json.loads(path.read_text()) | values
    meta.pop("checksum")
    if checksum:
        meta["checksum"] = shards_module.json_checksum(meta)
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("verified_before", [False, True])
@pytest.mark.parametrize(
    "name", ["train-00001.bin", "train-00000.mask.bin", "val-00000.bin", "val-00000.docs.bin"]
)
def test_an_altered_file_of_the_same_size_and_time_is_refused(folder, name, verified_before):
    if verified_before:
        opened(folder)
    alter(folder / name)
    for _ in range(2):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            opened(folder)


def test_what_was_verified_is_not_hashed_again(folder, monkeypatch):
    hashed = []
    sha256 = sources.sha256
    monkeypatch.setattr(sources, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    stages = []
    opened(folder, progress=lambda *stage: stages.append(stage))
    names = {path.name for path in folder.glob("*.bin")}
    assert len(names) >= 5 and set(hashed) == names and len(hashed) == len(names)
    assert stages[-1] == (
        "verifying",
        *[sum(path.stat().st_size for path in folder.glob("*.bin"))] * 2,
    )
    hashed.clear()
    opened(folder)
    assert not hashed
    (folder / "val-00000.bin").touch()
    opened(folder)
    assert hashed == ["val-00000.bin"]
    hashed.clear()
    shutil.copytree(folder, folder.with_name("copy"))
    opened(folder.with_name("copy"))
    assert set(hashed) == names


@pytest.mark.parametrize("damage", ["", "[" * 100_000, '{"train-00000.bin": 5}', "[]"])
def test_a_damaged_stamp_is_as_none(folder, cache, damage):
    opened(folder)
    (stamp,) = (cache / "verified").glob("*.json")
    whole = stamp.read_text()
    stamp.write_text(damage)
    opened(folder)
    assert stamp.read_text() == whole


def test_without_a_cache_everything_is_verified_each_time(
    folder, cache, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        caplog.clear()
        opened(folder)
        assert "hashed again" in caplog.text
    alter(folder / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged"):
        opened(folder)


def test_a_finished_prepare_verifies(folder, jsonl):
    alter(folder / "train-00000.bin")
    with pytest.raises(UserError, match=r"train-00000\.bin is damaged"):
        prepare(job(jsonl, folder))


@pytest.mark.parametrize(
    "values",
    [
        {"format": 2},
        {"format": "1"},
        {"complete": "yes"},
        {"files": []},
        {"files": {}},
        {"shards": 10**15},
        {"shards": 0},
        {"dtype": "object"},
        {"masked": None},
        {"masked": False},
        {"tokenizer": {}},
        {"train": {"documents": -1, "tokens": 0, "bytes": 0}},
        {"val": {"documents": "1", "tokens": 0, "bytes": 0}},
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused_though_the_checksum_is_right(folder, values):
    rewrite(folder, **values)
    with pytest.raises(UserError, match=r"meta\.json"):
        opened(folder)


def test_names_of_files_are_those_of_shards(folder):
    files = json.loads((folder / "meta.json").read_text())["files"]
    for name in ("../../secret", "/etc/passwd", "train-00099.bin"):
        rewrite(
            folder,
            files={name if key == "train-00000.bin" else key: file for key, file in files.items()},
        )
        with pytest.raises(UserError, match=r"meta\.json is damaged: .* is no name of a file"):
            opened(folder)
    for entry in (None, {}, {"bytes": "8", "sha256": ""}, {"bytes": 8, "sha256": 5}):
        rewrite(folder, files=files | {"train-00000.bin": entry})
        with pytest.raises(UserError, match=r"meta\.json is damaged"):
            opened(folder)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "[" * 100_000, '{"format": 1}', "\xff"])
def test_a_meta_that_is_none_is_refused(folder, jsonl, text):
    (folder / "meta.json").write_text(text, encoding="latin-1")
    for use in (lambda: opened(folder), lambda: prepare(job(jsonl, folder))):
        with pytest.raises(UserError, match=r"meta\.json"):
            use()


def test_an_altered_meta_is_refused_and_an_older_one_read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    train = meta["train"] | {"tokens": meta["train"]["tokens"] + 1}
    (folder / "meta.json").write_text(json.dumps(meta | {"train": train}))
    with pytest.raises(UserError, match="checksum"):
        opened(folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    before = opened(folder).info
    rewrite(folder, checksum=False)
    assert opened(folder).info == before


def test_another_tokenizer_is_refused(folder):
    shutil.rmtree(folder / "tokenizer")
    make_tokenizer(BytesTokenizer(), ()).save(folder / "tokenizer")
    with pytest.raises(UserError, match="fingerprint"):
        opened(folder)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"kind": "bpe", "eot": "<|endoftext|>"}',
        "[" * 100_000,
        '{"kind": "bpe", "fingerprint": ""}',
    ],
)
def test_a_damaged_tokenizer_is_refused(folder, text):
    (folder / "tokenizer" / "diffx_tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="tokenizer"):
        opened(folder)


def test_an_altered_cache_is_built_again(jsonl, caplog):
    data = TextData(path=str(jsonl), val_fraction=0.2)
    folder = open_data(data, BPE).shards.folder
    whole = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    alter(folder / "train-00000.bin")
    open_data(data, BPE)
    assert "built again" in caplog.text and "train-00000.bin is damaged" in caplog.text
    assert {path.name: path.read_bytes() for path in folder.glob("*.bin")} == whole
    caplog.clear()
    open_data(data, BPE)
    assert not caplog.text


@pytest.mark.parametrize("name", ["meta.json", "tokenizer/diffx_tokenizer.json"])
def test_a_damaged_beginning_of_a_cache_is_built_again(jsonl, cache, monkeypatch, caplog, name):
    data = TextData(path=str(jsonl), val_fraction=0.2)

    def killed(folder, *arguments, **options):
        build(folder, *arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffx.data.corpus.build", killed)
        with pytest.raises(KeyboardInterrupt):
            open_data(data, BPE)
    (begun,) = cache.glob("*.tmp")
    (begun / name).write_text("{")
    corpus = open_data(data, BPE)
    assert "from its beginning" in caplog.text and corpus.shards.meta["complete"]
    assert not list(cache.glob("*.tmp"))


def test_what_a_killed_start_has_left_is_removed(jsonl, tmp_path):
    out = tmp_path / "made" / "out"
    stale = out.with_name(".out.tmp") / "tokenizer"
    stale.mkdir(parents=True)
    (stale / "half.json").write_text("{")
    prepare(job(jsonl, out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not (out / "tokenizer" / "half.json").exists() and read_meta(out)["complete"]


def test_two_processes_cannot_prepare_one_folder(jsonl, tmp_path):
    out = Path(tmp_path / "out")
    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="another process"):
        prepare(job(jsonl, out))
    assert not out.exists()
