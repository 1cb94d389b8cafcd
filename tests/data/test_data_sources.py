import gzip
import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from diffx.config import UserError
from diffx.config.data import BytesTokenizer, HubData, StdlibData, TextData
from diffx.data import open_data
from diffx.data.sources import documents, file_hashes, source_files


def texts(path, **options):
    return [
        document.text
        for document in documents(
            TextData(path=path if isinstance(path, list) else str(path), **options)
        )
    ]


def test_stdlib_is_source_without_tests():
    files = source_files(StdlibData())
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(files)
    assert not [
        name
        for name in files
        if {"test", "tests", "site-packages"} & set(name.split("/")) or not name.endswith(".py")
    ]
    assert list(files.values()) == sorted(files.values())
    found = list(documents(StdlibData()))
    text = files["os.py"].read_text(encoding="utf-8")
    (document,) = [document for document in found if document.text == text]
    assert document.n_bytes == files["os.py"].stat().st_size
    assert sum(document.n_bytes for document in found) > 5e6


def test_every_format_gives_the_same_documents(tmp_path, rows, jsonl):
    lines = jsonl.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    half = len(lines) // 2
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    )  # two frames
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    expected = [row["text"] for row in rows]
    for path in (jsonl, tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl.zst", tmp_path / "a.parquet"):
        data = TextData(path=str(path), prompt_key="prompt")
        found = list(documents(data))
        assert [document.text for document in found] == expected
        assert [document.prompt for document in found] == [row["prompt"] for row in rows]
        assert found[-1].read == path.stat().st_size
        assert all(one.read <= two.read for one, two in itertools.pairwise(found))


def test_paths(tmp_path):
    for name in (
        "b/two.md",
        "b/one.txt",
        "b/deep/three.txt",
        "b/.hidden/no.txt",
        "b/image.png",
        "c.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n", newline="")
    assert texts(tmp_path / "b") == [
        f"text of b/{name}\r\n" for name in ("deep/three.txt", "one.txt", "two.md")
    ]
    assert texts(tmp_path / "b/*.txt") == ["text of b/one.txt\r\n"]
    assert texts(tmp_path / "**/one.*") == ["text of b/one.txt\r\n"]
    assert texts(
        [str(tmp_path / "c.txt"), str(tmp_path / "b/one.txt"), str(tmp_path / "*.txt")]
    ) == [
        "text of c.txt\r\n",
        "text of b/one.txt\r\n",
    ]


def test_a_lone_text_file_is_cut_into_documents(tmp_path):
    text = "".join(f"Paragraph {i}.\nIt has two lines, with é.\n\n" for i in range(400))
    (tmp_path / "book.txt").write_text(text)
    pieces = texts(tmp_path / "book.txt")
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(piece.endswith("\n\n") for piece in pieces)
    corpus = open_data(TextData(path=str(tmp_path / "book.txt")), BytesTokenizer())
    assert corpus.info["val"]["documents"] >= 1 and corpus.info["train"]["documents"] >= 1


def test_hashes_are_of_the_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert [digest for _, digest in file_hashes(source_files(TextData(path=str(tmp_path))))] == [
        known
    ]


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("nope.txt", None, {}, ["nope.txt", "no such file"]),
        ("*.md", None, {}, ["*.md", "matches no file", ".jsonl.zst"]),
        ("empty/", None, {}, ["empty", "holds no file"]),
        ("a.csv", b"text", {}, ["a.csv", "suffix", ".parquet"]),
        ("a.txt", b"caf\xe9", {}, ["a.txt", "not UTF-8 at byte 3"]),
        ("a.txt", b"one line\n" * 400 + b"\xff", {}, ["a.txt", "not UTF-8 at byte 3600"]),
        ("a.txt", b"", {}, ["a.txt", "no text"]),
        ("a.txt", b"too small to share", {}, ["a.txt", "one document"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', {}, ["a.jsonl", "line 2 is not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', {}, ["a.jsonl", "line 3 is not a JSON object"]),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            {},
            ["a.jsonl", "line 2", "'text'", "data.text_key", "'body'"],
        ),
        ("a.jsonl", b'{"text": "a"}\n', {"prompt_key": "q"}, ["line 1", "'q'", "data.prompt_key"]),
        ("a.jsonl", b'{"text": 1}\n', {}, ["line 1", "not text but int"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', {}, ["a.jsonl", "not UTF-8 at byte 24"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, ["line 1", "surrogate"]),
        ("a.jsonl", b'{"text": "same"}\n{"text": "same"}\n', {}, ["a.jsonl", "one document"]),
        ("a.jsonl.gz", b"not compressed", {}, ["a.jsonl.gz", "Not a gzipped file"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            {},
            ["a.jsonl.gz", "ended before"],
        ),
        ("a.jsonl.zst", b"not compressed", {}, ["a.jsonl.zst", "cannot be read"]),
        ("a.parquet", b"not parquet", {}, ["a.parquet", "parquet"]),
    ],
)
def test_errors_name_the_place(tmp_path, name, content, options, words):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_data(TextData(path=str(path), **options), BytesTokenizer())
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_parquet_without_the_column(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"'text'.*data.text_key.*'body'"):
        texts(tmp_path / "a.parquet")


def test_hub_reads_local_folders_and_says_what_is_wrong(tmp_path, jsonl, rows):
    folder = str(jsonl.parent)
    assert [document.text for document in documents(HubData(name=folder))] == [
        row["text"] for row in rows
    ]
    for data, words in (
        (HubData(name=folder, split="nope"), ["nope", "train"]),
        (HubData(name=folder, text_key="body"), ["'body'", "'prompt'", "'text'"]),
        (HubData(name=str(tmp_path / "nope")), ["nope", "local folder"]),
        (HubData(name="some/dataset"), ["some/dataset", "hub"]),
    ):
        with pytest.raises(UserError) as caught:
            list(documents(data))
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), (
            caught.value
        )


def test_a_document_is_known_by_prompt_and_text(tmp_path):
    lines = [
        {"p": "a", "text": "b"},
        {"p": "a", "text": "c"},
        {"p": None, "text": "b"},
        {"p": "a", "text": "b"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two, three, four = (
        document.key
        for document in documents(TextData(path=str(tmp_path / "a.jsonl"), prompt_key="p"))
    )
    assert one == four and len({one, two, three}) == 3
