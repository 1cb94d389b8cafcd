import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from diffx.config import RunError, UserError
from diffx.config.data import (
    BpeTokenizer,
    BytesTokenizer,
    HubData,
    ShardsData,
    StdlibData,
    TextData,
)
from diffx.config.train import PrepareJob
from diffx.data import open_data
from diffx.data import prepare as preparation
from diffx.data.corpus import read_texts
from diffx.data.prepare import encode_documents, prepare
from diffx.data.shards import TokenArray
from diffx.data.sources import Document
from diffx.data.tokenizers import make_tokenizer

BPE = BpeTokenizer(vocab_size=280)


def text(path, **options):
    return TextData(path=str(path), **{"val_fraction": 0.2} | options)


def job(path, out, tokenizer=BPE, **options):
    return PrepareJob(
        data=text(path, prompt_key="prompt"),
        tokenizer=tokenizer,
        out=str(out),
        **{"workers": 1, "shard_tokens": 500} | options,
    )


def contents(folder):
    """Every byte that a prepared folder holds, by name."""
    assert not [
        path
        for path in folder.parent.iterdir()
        if path.name.startswith(f".{folder.name}.") and path.is_dir()
    ]
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_token_array_reads_across_parts():
    parts = [np.arange(0, 5), np.arange(5, 5), np.arange(5, 6), np.arange(6, 10)]
    array = TokenArray(parts, [part % 2 for part in parts])
    assert len(array) == 10
    for start in range(11):
        for stop in range(start, 11):
            tokens, mask = array.read(start, stop)
            assert tokens.tolist() == list(range(start, stop)) and mask.tolist() == [
                i % 2 for i in range(start, stop)
            ]
    assert TokenArray(parts).read(0, 3)[1] is None


def test_splits_hold_every_document_once_and_share_none(jsonl, rows, texts_of):
    corpus = open_data(text(jsonl), BPE)
    train, val = (texts_of(tokens, corpus.tokenizer) for tokens in (corpus.train, corpus.val))
    assert sorted(train + val) == sorted(row["text"] for row in rows)
    assert not set(train) & set(val), "identical documents are on one side"
    assert 0.05 < len(val) / len(rows) < 0.4
    assert corpus.val.n_bytes == sum(len(document.encode()) for document in val)
    assert corpus.val.n_tokens == len(corpus.val) - 1
    for split, held in (("train", train), ("val", val)):
        assert corpus.info[split]["documents"] == len(held)
        assert corpus.info[split]["bytes"] == sum(len(document.encode()) for document in held)
    assert corpus.info["train"]["tokens"] == len(corpus.train)
    assert corpus.info["val"]["measured"] == {
        "documents": len(val),
        "tokens": corpus.val.n_tokens,
        "bytes": corpus.val.n_bytes,
    }
    assert corpus.info["files"][0]["bytes"] == jsonl.stat().st_size


def test_bpe_sees_training_text_alone(tmp_path, texts_of):
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"document number {i} {chr(0x4E00 + i) * 50}")
    corpus = open_data(text(tmp_path), BpeTokenizer(vocab_size=2000))
    held_out = texts_of(corpus.val, corpus.tokenizer)
    assert held_out and all(
        len(corpus.tokenizer.encode(document[-50:])) > 50 for document in held_out
    )
    assert all(
        len(corpus.tokenizer.encode(document[-50:])) <= 50
        for document in texts_of(corpus.train, corpus.tokenizer)
    )


def test_prompts_carry_no_loss(jsonl, rows, texts_of):
    corpus = open_data(text(jsonl, prompt_key="prompt"), BPE)
    whole = {row["prompt"] + row["text"]: row["text"] for row in rows}
    val = texts_of(corpus.val, corpus.tokenizer)
    assert set(val + texts_of(corpus.train, corpus.tokenizer)) == set(whole)
    assert corpus.val.n_bytes == sum(len(whole[document].encode()) for document in val)
    for array in (corpus.train, corpus.val):
        tokens, mask = array.read(0, len(array))
        scored = [
            token
            for token, scores in zip(tokens.tolist(), mask, strict=True)
            if scores and token != corpus.tokenizer.eot_id
        ]
        assert corpus.tokenizer.decode(scored) == "".join(
            whole[document] for document in texts_of(array, corpus.tokenizer)
        )
        assert mask[tokens == corpus.tokenizer.eot_id].all()
    assert corpus.val.n_tokens == int(corpus.val.read(1, len(corpus.val))[1].sum())


def test_a_long_document_is_measured_in_part(tmp_path):
    """Books longer than the cap are cut between characters, alike for every tokenizer."""
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"Büchér {name} sind läng. " * 500)
    data, bytes_tokenizer = text(tmp_path, val_tokens=100), make_tokenizer(BytesTokenizer(), ())
    for cap in (100, 101, 102):
        val = open_data(dataclasses.replace(data, val_tokens=cap), BytesTokenizer()).val
        whole = bytes_tokenizer.decode(val.read(1, len(val) - 1)[0].tolist())
        assert (
            cap - 2 <= val.n_tokens <= cap
            and val.n_bytes == len(whole.encode())
            and whole.startswith("Büchér")
        )
    other = open_data(data, BPE).shards.held_out(like=val)
    assert other.n_bytes == val.n_bytes and other.n_tokens < val.n_tokens and other.keys == val.keys


def test_val_is_capped_by_whole_documents(jsonl, texts_of):
    every = open_data(text(jsonl), BPE)
    documents = texts_of(every.val, every.tokenizer)
    for cap in (60, 200, 10**6):
        corpus = open_data(text(jsonl, val_tokens=cap), BPE)
        chosen = texts_of(corpus.val, corpus.tokenizer)
        assert set(chosen) <= set(documents) and len(corpus.train) == len(every.train)
        assert chosen and len(corpus.val) - 1 <= cap
    assert chosen == documents


def test_at_least_one_document_is_held_out(tmp_path, texts_of):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    for fraction, held_out in ((1e-9, 1), (0.999999999, 2)):
        corpus = open_data(text(tmp_path, val_fraction=fraction), BytesTokenizer())
        val, train = (texts_of(tokens, corpus.tokenizer) for tokens in (corpus.val, corpus.train))
        assert (len(val), len(train)) == (held_out, 3 - held_out)


@pytest.mark.parametrize("form", ["txt", "jsonl"])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_fraction_is_met_with_four_books(tmp_path, texts_of, form, fraction):
    books = {
        name: "".join(
            f"{name} {line} of the book.\n" + "\n" * (line % 5 == 0) for line in range(length)
        )
        for name, length in (("a", 2000), ("b", 1500), ("c", 2500), ("d", 40))
    }
    for name, book in books.items():
        (tmp_path / f"{name}.{form}").write_text(
            book if form == "txt" else json.dumps({"text": book})
        )
    corpus = open_data(text(tmp_path, val_fraction=fraction), BytesTokenizer())
    val, train = (texts_of(tokens, corpus.tokenizer) for tokens in (corpus.val, corpus.train))
    total = sum(map(len, books.values()))
    assert abs(sum(map(len, val)) - fraction * total) <= 0.02 * total / 2 + 30
    assert (
        sorted("".join(val + train)) == sorted("".join(books.values()))
        and books["d"] in val + train
    )
    assert sorted(read_texts(corpus.data, held_out=True)[0]) == sorted(val)
    assert not set("".join(val).splitlines()) & set("".join(train).splitlines()) - {""}


def test_a_prompts_text_is_not_cut(tmp_path, texts_of):
    rows = [{"text": f"{name} says.\n" * 500, "prompt": "Who?"} for name in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = open_data(text(tmp_path, prompt_key="prompt"), BytesTokenizer())
    assert (
        len(texts_of(corpus.val, corpus.tokenizer) + texts_of(corpus.train, corpus.tokenizer)) == 3
    )


def test_wide_vocabularies_take_32_bits(jsonl):
    class Wide:
        vocab_size, eot_id = 70000, 69999

        def encode_batch(self, texts):
            return [[65536 + len(text)] for text in texts]

    ((tokens, mask),) = encode_documents(Wide(), [Document("abc", "", b"", 3)], masked=False)
    assert tokens.dtype == np.dtype("<u4") and tokens.tolist() == [69999, 65539] and mask is None


def test_cache_is_used_keyed_by_contents_and_rebuilt_when_damaged(jsonl, cache, caplog):
    stages = []
    first = open_data(
        text(jsonl), BPE, progress=lambda stage, done, total: stages.append((stage, done, total))
    )
    assert {stage for stage, _, _ in stages} == {"training the tokenizer", "tokenizing"}
    assert stages[-1] == ("tokenizing", jsonl.stat().st_size, jsonl.stat().st_size)
    folder = first.shards.folder
    built = contents(folder)

    def reopened(**options):
        stages.clear()
        return open_data(text(jsonl, **options), BPE, progress=lambda *stage: stages.append(stage))

    assert reopened().shards.folder == folder and not stages
    assert reopened(val_tokens=50).shards.folder == folder
    assert reopened(val_fraction=0.3).shards.folder != folder and stages

    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        lambda path: path.unlink(),
    ):
        for name in (
            "train-00000.bin",
            "val-00000.docs.bin",
            "meta.json",
            "tokenizer/tokenizer.json",
        ):
            damage(folder / name)
            caplog.clear()
            reopened()
            assert stages and "built again" in caplog.text and contents(folder) == built

    jsonl.write_text(jsonl.read_text().replace("fox", "fax"))
    assert reopened().shards.folder != folder and stages
    assert not [path.name for path in cache.iterdir() if path.suffix == ".tmp"]


def test_processes_that_start_together_build_once(jsonl):
    stages = []
    with ThreadPoolExecutor(4) as pool:
        opened = list(
            pool.map(
                lambda _: open_data(text(jsonl), BPE, progress=lambda *stage: stages.append(stage)),
                range(4),
            )
        )
    assert len({corpus.shards.folder for corpus in opened}) == 1
    assert len([stage for stage in stages if stage[0] == "tokenizing"]) == 1


def test_a_cache_that_cannot_be_written(jsonl, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFX_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="DIFFX_CACHE"):
        open_data(text(jsonl), BPE)


def test_shards_equal_direct(jsonl, tmp_path):
    out = prepare(job(jsonl, tmp_path / "out"))
    meta = json.loads((out / "meta.json").read_text())
    assert meta["shards"] > 3 and meta["complete"]
    direct = open_data(text(jsonl, prompt_key="prompt"), BPE)
    shards = open_data(ShardsData(path=str(out)), BytesTokenizer())
    assert shards.tokenizer.fingerprint == direct.tokenizer.fingerprint
    for split in ("train", "val"):
        ours, theirs = (getattr(corpus, split) for corpus in (shards, direct))
        for one, two in zip(ours.read(0, len(ours)), theirs.read(0, len(theirs)), strict=True):
            assert np.array_equal(one, two)
    assert shards.val.n_bytes == direct.val.n_bytes
    assert {key: shards.info[key] for key in ("sha256", "train", "val")} == {
        key: direct.info[key] for key in ("sha256", "train", "val")
    }
    one, two = (corpus.batches(16, 4, seed=3) for corpus in (shards, direct))
    assert all(next(one).targets.equal(next(two).targets) for _ in range(20))


@pytest.mark.slow
def test_processes_do_not_change_the_result(jsonl, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(job(jsonl, one))
    monkeypatch.setattr(preparation, "_GROUP_DOCUMENTS", 7)
    prepare(job(jsonl, two, workers=2))
    assert contents(one) == contents(two)


def test_an_interrupted_prepare_goes_on(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_GROUP_DOCUMENTS", 5)
    prepare(job(jsonl, tmp_path / "whole"))
    groups = 0

    def interrupt(stage, done, total):
        nonlocal groups
        groups += stage == "tokenizing"
        if stage == "tokenizing" and groups % 6 == 0:
            raise KeyboardInterrupt

    for _ in range(20):
        try:
            prepare(job(jsonl, tmp_path / "out"), progress=interrupt)
            break
        except KeyboardInterrupt:
            with pytest.raises(UserError, match="not finished"):
                open_data(ShardsData(path=str(tmp_path / "out")), BPE)
    assert groups > 12
    assert contents(tmp_path / "whole") == contents(tmp_path / "out")


@pytest.mark.slow
def test_a_killed_prepare_goes_on(jsonl, tmp_path):
    script = (
        "import sys, time; import diffx.data.prepare as p; from diffx.config.data import *; "
        "from diffx.config.train import PrepareJob\n"
        "p._GROUP_DOCUMENTS = 5\n"
        "data = TextData(path=sys.argv[1], val_fraction=0.2, prompt_key='prompt')\n"
        "job = PrepareJob(data=data, tokenizer=BpeTokenizer(vocab_size=280), out=sys.argv[2], "
        "workers=1, shard_tokens=500)\n"
        "p.prepare(job, progress=lambda stage, done, total: "
        "time.sleep(0.1 if stage == 'tokenizing' else 0))"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, str(jsonl), str(out)], env=os.environ)
    while (
        not (out / "meta.json").exists()
        or json.loads((out / "meta.json").read_text())["shards"] < 2
    ):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = json.loads((out / "meta.json").read_text())
    assert not finished["complete"]
    prepare(job(jsonl, tmp_path / "whole"))
    prepare(job(jsonl, out))
    assert contents(tmp_path / "whole") == contents(out)


def test_out_that_is_something_else_is_refused(jsonl, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no token shards"):
        prepare(job(jsonl, out))
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    prepare(job(jsonl, out))  # an empty folder will do
    stamp = (out / "meta.json").stat().st_mtime_ns
    prepare(job(jsonl, out))  # finished: nothing to do
    assert (out / "meta.json").stat().st_mtime_ns == stamp
    for changed, key in (
        (job(jsonl, out, shard_tokens=600), "shard_tokens"),
        (job(jsonl, out, tokenizer=BpeTokenizer(vocab_size=270)), "tokenizer.vocab_size"),
        (job(jsonl, out, tokenizer=BytesTokenizer()), "tokenizer.kind"),
        (PrepareJob(data=StdlibData(), tokenizer=BPE, out=str(out)), "data.kind"),
    ):
        with pytest.raises(UserError, match=f"another {key}"):
            prepare(changed)
    jsonl.write_text(jsonl.read_text() + '{"prompt": "", "text": "more"}\n')
    with pytest.raises(UserError, match="state of the files"):
        prepare(job(jsonl, out))


def test_failing_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="no text"):
        prepare(PrepareJob(data=text(tmp_path / "a.txt"), tokenizer=BPE, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_prepare_reads_the_hub(jsonl, tmp_path, rows):
    data = HubData(name=str(jsonl.parent), val_fraction=0.2)
    out = prepare(
        PrepareJob(data=data, tokenizer=BytesTokenizer(), out=str(tmp_path / "out"), workers=1)
    )
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train"]["documents"] + meta["val"]["documents"] == len(rows)


def test_shards_that_are_damaged_or_none_are_refused(jsonl, tmp_path):
    with pytest.raises(UserError, match="holds no token shards"):
        open_data(ShardsData(path=str(tmp_path)), BPE)
    out = prepare(job(jsonl, tmp_path / "out"))
    shutil.copytree(out, tmp_path / "copy")
    name = "train-00001.bin"
    (Path(tmp_path) / "copy" / name).write_bytes(b"\0\0")
    with pytest.raises(UserError, match=f"{name} has 2 bytes"):
        open_data(ShardsData(path=str(tmp_path / "copy")), BPE)
