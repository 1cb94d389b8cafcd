"""Sources of documents: the standard library's code, local files, the Hugging Face hub."""

import glob
import gzip
import hashlib
import io
import itertools
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from diffx.config import RunError, UserError
from diffx.config.checks import refuse, refusing
from diffx.config.data import DataConfig, HubData, RecallData, RetrievalData, StdlibData, TextData
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.files import parse_json, sha256

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
NO_TEXT = "data=recall cannot be used: its samples are not text; choose data=text, hub or stdlib"
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_UNREADABLE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
_PIECES, _PIECE_MIN, _PIECE_MAX = 100, 1 << 10, 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text, which carries loss.
        prompt: text before it, which carries no loss; may be empty.
        digest: SHA-256 of prompt and text.
        n_bytes: UTF-8 bytes of ``text``.
        read: bytes of the source's files up to its end, for a progress bar; 0 if unknown.
    """

    text: str
    prompt: str
    digest: bytes
    n_bytes: int
    read: int = 0

    @property
    def key(self) -> int:
        """The first 64 bits of the digest; they decide whether the document is held out."""
        return int.from_bytes(self.digest[:8], "big")


def documents(data: DataConfig) -> Iterator[Document]:
    """Read a source's documents one at a time, in a fixed order, without empty ones.

    A text of ``data=text`` that is more than 2% of its corpus is cut into documents of about 1%, so
    that ``data.val_fraction`` can be met. A text with a prompt stays whole.

    Raises:
        UserError: a file or data set cannot be read, text is not UTF-8, or a row has no such field.
    """
    if isinstance(data, RetrievalData):
        data = data.text()
    if isinstance(data, HubData):
        yield from hub_documents(data, hub_dataset(data))
        return
    paths = source_files(data).values()
    before, total = 0, sum(path.stat().st_size for path in paths)
    size = max(total // _PIECES, _PIECE_MIN)
    for path in paths:
        with refusing(f"data.path={path}", _UNREADABLE, "it cannot be read: "):
            for text, prompt, read in _read(path, data, alone=len(paths) == 1):
                cut = isinstance(data, TextData) and not prompt and len(text) >= 2 * size
                for piece in _pieces(text.splitlines(keepends=True), size) if cut else [text]:
                    if piece:
                        yield _document(piece, prompt, before + read)
            before += path.stat().st_size


def source_files(data: DataConfig) -> dict[str, Path]:
    """List a local source's files in reading order, by the name in the run folder's record.

    Raises:
        UserError: a path does not exist, holds nothing usable, or has an unknown suffix.
    """
    if isinstance(data, StdlibData):
        root = Path(sysconfig.get_paths()["stdlib"])
        sources = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in _NOT_STDLIB]
            sources += [Path(folder, name) for name in names if name.endswith(".py")]
        why = f"{root} holds no Python source; choose data=text data.path=FOLDER"
        refuse(not sources, "data=stdlib", why)
        return {path.relative_to(root).as_posix(): path for path in sorted(sources)}
    if isinstance(data, RecallData):
        raise UserError(NO_TEXT)
    assert isinstance(data, TextData)
    paths: dict[Path, Path] = {}
    for path in itertools.chain.from_iterable(map(_expand, data.path)):
        paths.setdefault(path.resolve(), path)  # a file that two entries name is read once
    return {path.as_posix(): path for path in paths.values()}


def file_hashes(files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield the name and the SHA-256 of each file, computed in several threads."""
    try:
        with ThreadPoolExecutor() as pool:
            yield from zip(files, pool.map(sha256, files.values()), strict=True)
    except OSError as error:
        raise UserError(f"{_cannot(error.filename)}: it cannot be read: {reason(error)}") from error


def label(data: DataConfig) -> str:
    """Return a source's name for messages, as a user would type it."""
    if isinstance(data, TextData):
        return f"data.path={','.join(data.path)}"
    return f"data.name={data.name}" if isinstance(data, HubData) else f"data={data.kind}"


def _cannot(path: Any) -> str:
    return f"data.path={path} cannot be used"


def _document(text: str, prompt: str, read: int = 0) -> Document:
    content = text.encode()
    digest = hashlib.sha256(prompt.encode() + b"\0" + content).digest()
    return Document(text, prompt, digest, len(content), read)


def _expand(entry: str) -> list[Path]:
    path, setting = Path(entry).expanduser(), f"data.path={entry}"
    accepted = f"accepted are {', '.join(SUFFIXES)}"
    if path.is_file():
        other = not path.name.endswith(SUFFIXES)
        refuse(other, setting, f"its suffix is not supported; {accepted}")
        return [path]
    if path.is_dir():
        inside = [(file, file.relative_to(path).parts) for file in path.rglob("*")]
        paths = [file for file, parts in inside if not any(part[0] == "." for part in parts)]
    else:
        paths = [Path(name) for name in glob.iglob(str(path), recursive=True)]
        missing = not glob.has_magic(entry)
        refuse(missing, setting, "there is no such file or directory")
    paths = sorted(file for file in paths if file.name.endswith(SUFFIXES) and file.is_file())
    verb = "holds" if path.is_dir() else "matches"
    refuse(not paths, setting, f"it {verb} no file that can be read; {accepted}")
    return paths


def _read(path: Path, data: DataConfig, alone: bool) -> Iterator[tuple[str, str, int]]:
    """Yield text, prompt, and the bytes of the file read so far."""
    size = path.stat().st_size
    if isinstance(data, TextData) and path.suffix not in (".txt", ".md"):
        read_rows = _read_parquet if path.suffix == ".parquet" else _read_jsonl
        for where, row, read in read_rows(path, data):
            yield *_fields(row, data, where), read
    elif alone:
        # One document could not be split into training and held-out text.
        size, read = min(max(size // _PIECES, _PIECE_MIN), _PIECE_MAX), 0
        for piece in _pieces((line for line, _ in _lines(path)), size):
            read += len(piece.encode())
            yield piece, "", read
    else:
        yield _decode(path.read_bytes(), path), "", size


def _decode(content: bytes, path: Path, start: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        raise UserError(f"{_cannot(path)}: it is not UTF-8 at byte {at}; convert it") from error


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the lines of a file, decompressed, and the bytes of the file read so far."""
    with path.open("rb") as raw:
        stream: Any = raw
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            reader: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            stream = io.BufferedReader(reader, 1 << 16)
        start = 0
        for line in stream:
            yield _decode(line, path, start), raw.tell()
            start += len(line)


def _pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Join lines to texts of ``size`` bytes or more that end at a blank line or ``2 * size``."""
    taken, length = [], 0
    for line in lines:
        taken.append(line)
        length += len(line.encode())
        if length >= 2 * size or (length >= size and not line.strip()):
            yield "".join(taken)
            taken, length = [], 0
    yield "".join(taken)


def _read_jsonl(path: Path, data: TextData) -> Iterator[tuple[str, dict[str, Any], int]]:
    for number, (text, read) in enumerate(_lines(path), 1):
        where = f"{_cannot(path)}: line {number}"
        if not text.strip():
            continue
        with refusing(f"data.path={path}", ValueError, f"line {number} is not JSON: "):
            row = parse_json(text)
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object with a field {data.text_key!r}")
        yield where, row, read


def _read_parquet(path: Path, data: TextData) -> Iterator[tuple[str, dict[str, Any], int]]:
    from pyarrow import ArrowException  # slow to import, and most runs need no parquet
    from pyarrow.parquet import ParquetFile

    with refusing(f"data.path={path}", ArrowException, "it cannot be read as parquet: "):
        file = ParquetFile(path)
        names, total = file.schema_arrow.names, file.metadata.num_rows
        columns = [name for name in names if name in (data.text_key, data.prompt_key)]
        rows, size = 0, path.stat().st_size
        for batch in file.iter_batches(columns=columns, batch_size=1024):
            for row in batch.to_pylist() if batch.num_columns else [dict.fromkeys(names)]:
                rows += 1
                yield f"{_cannot(path)}: row {rows}", row, size * rows // total


def _fields(row: dict[str, Any], data: TextData | HubData, where: str) -> tuple[str, str]:
    """Return text and prompt of a row; a prompt that is null is empty."""
    values = []
    for setting, key in (("text_key", data.text_key), ("prompt_key", data.prompt_key)):
        if key is not None and key not in row:
            names = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where} has no field {key!r} (data.{setting}); it has {names}")
        value = "" if key is None or (setting == "prompt_key" and row[key] is None) else row[key]
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{where}: {key!r} (data.{setting}) is not text but {kind}")
        if value.encode(errors="ignore").decode() != value:
            why = "has half of a surrogate pair, which is no text"
            raise UserError(f"{where}: {key!r} (data.{setting}) {why}")
        values.append(value)
    return values[0], values[1]


def hub_dataset(data: HubData) -> Any:
    """Open a data set of the hub as a ``datasets.IterableDataset``; ``UserError`` if it cannot."""
    import datasets  # slow to import, and most runs need no hub

    asked = f"data.name={data.name} with data.subset={data.subset} and data.split={data.split}"
    accepted = "it must be a data set of the hub that can be reached, or a local folder"
    options: Any = {"split": data.split, "revision": data.revision, "streaming": True}
    # Each library below has other exceptions.
    with refusing(asked, Exception, accepted=accepted), asking_hub(data.name):
        return datasets.load_dataset(data.name, data.subset, **options)


def hub_documents(data: HubData, dataset: Any) -> Iterator[Document]:
    """Read a data set's documents, without empty ones; ``RunError`` if the stream breaks."""
    where = f"{label(data)} cannot be used: a row"
    try:
        for row in dataset:
            text, prompt = _fields(row, data, where)
            if text:
                yield _document(text, prompt)
    except UserError:
        raise
    except Exception as error:  # each library below has other exceptions
        raise RunError(f"{label(data)} could not be read to its end: {reason(error)}") from error
