"""Where training text comes from, and how it becomes tokens."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import POSITIVE, check_fields, count_fields, require


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What every source shares.

    Attributes:
        kind: the source (set by ``data=``, not by hand).
        val_fraction: share of the corpus held out, in documents chosen by a hash of their text. Of
            150 documents or fewer the share is that of bytes. A text file that is more than 2% of
            its corpus is cut into pieces of 1%.
        val_tokens: at most so many held-out tokens are measured: whole documents, or the beginning
            of one where none is as short.
    """

    kind: str = MISSING
    val_fraction: float = 0.05
    val_tokens: int | str = 65536

    def __post_init__(self) -> None:
        check_fields(self, "data", "val_fraction", "between 0 and 1")
        count_fields(self, "data", "val_tokens")


@dataclass(kw_only=True, slots=True)
class StdlibData(DataConfig):
    """The source of Python's standard library, without its tests; it is on every machine."""

    kind: str = "stdlib"


@dataclass(kw_only=True, slots=True)
class TextData(DataConfig):
    """Local files.

    Attributes:
        path: a file, directory or glob, or a list of them (.txt, .md, .jsonl, .jsonl.gz,
            .jsonl.zst, .parquet).
        text_key: the field of a JSON line or parquet row that holds the text.
        prompt_key: a field whose text precedes the text and carries no loss, or ``null``.
    """

    kind: str = "text"
    path: Any = MISSING
    text_key: str = "text"
    prompt_key: str | None = None

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        paths = [self.path] if isinstance(self.path, str) else self.path
        good = isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)
        require(good and paths != [], "data.path", self.path, "a path or a list of paths")
        self.path = paths


@dataclass(kw_only=True, slots=True)
class HubData(DataConfig):
    """A streamed data set of the Hugging Face hub, or a local folder in its layout.

    Attributes:
        name: as ``datasets.load_dataset`` takes it.
        subset: the data set's configuration, if it has several.
        split: the split to train on; held-out documents are taken from it by ``val_fraction``.
        revision: a git revision, for reproducibility.
        text_key: the column that holds the text.
        prompt_key: a column whose text precedes the text and carries no loss, or ``null``.
        shuffle_buffer: documents held to shuffle the stream; 0 keeps its order.
        tokenizer_documents: documents read to train a ``bpe`` tokenizer and to hold out for
            validation.
    """

    kind: str = "hub"
    name: str = MISSING
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_key: str = "text"
    prompt_key: str | None = None
    shuffle_buffer: int = 1000
    tokenizer_documents: int = 10000


@dataclass(kw_only=True, slots=True)
class ShardsData(DataConfig):
    """Memory-mapped token shards written by ``diffx data prepare``; they bring their own tokenizer.

    Attributes:
        path: the folder.
    """

    kind: str = "shards"
    path: str = MISSING


@dataclass(kw_only=True, slots=True)
class RetrievalData(DataConfig):
    """Endless samples of the retrieval task; the loss is on the numbers alone.

    Attributes:
        path: the text, as in ``data=text``; ``null`` is the standard library's source.
        length: tokens of a sample; the same as ``train.seq_len``.
        needles: needles in a sample, at most.
        asked: how many of them a question asks for, at most.
        digits: digits of a number.
        curriculum: as many samples at the start of training are bare pairs, at first ``city
            number`` alone, at last ``city is number.``: small models learn the lookup from these in
            some hundred steps, and hardly ever from text alone.
    """

    kind: str = "retrieval"
    path: Any = None
    length: int = 128
    needles: int = 4
    asked: int = 2
    digits: int = 2
    curriculum: int = 0

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        check_fields(self, "data", "curriculum", "zero or more")
        check_fields(self, "data", "length", POSITIVE)
        check_fields(self, "data", "digits", "from 1 to 18")
        good = 1 <= self.needles <= min(64, 9 * 10 ** (self.digits - 1))
        require(good, "data.needles", self.needles, "from 1 to 64, of as many numbers")
        accepted = f"from 1 to data.needles={self.needles}"
        require(1 <= self.asked <= self.needles, "data.asked", self.asked, accepted)
        self.text()

    def text(self) -> DataConfig:
        """The source of the text."""
        shared: Any = {"val_fraction": self.val_fraction, "val_tokens": self.val_tokens}
        return StdlibData(**shared) if self.path is None else TextData(path=self.path, **shared)


@dataclass(kw_only=True, slots=True)
class RecallData(DataConfig):
    """Endless samples of multi-query associative recall (MQAR, arXiv 2312.04927), without text.

    A sample gives pairs of a key and a value, and then each key once more with its value behind it.
    The loss is on these values alone. Words of the samples are tokens by themselves, so that
    ``tokenizer=`` is not used; nor is ``data.val_fraction``.

    Attributes:
        length: tokens of a sample; the same as ``train.seq_len``.
        pairs: pairs in a sample, at most; each sample draws its number, from 1.
        keys: different keys.
        values: different values.
        power: a query stands k slots of two tokens behind the pairs with a probability proportional
            to k^(power - 1), among the free slots; 1 is uniform. The default is Zoology's.
        distractors: fill the tokens between the queries with keys and values that the sample does
            not use, at random; ``false`` fills them with one token.
    """

    kind: str = "recall"
    length: int = 256
    pairs: int = 16
    keys: int = 128
    values: int = 128
    power: float = 0.01
    distractors: bool = True

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        check_fields(self, "data", "length", POSITIVE)
        check_fields(self, "data", "power", "positive")
        good = self.pairs >= 1 and max(self.keys, self.values) <= 2**20
        accepted = "1 or more, with at most 1048576 of data.keys and data.values"
        require(good, "data.pairs", self.pairs, accepted)
        require(self.pairs <= self.most, "data.pairs", self.pairs, self.why_most())

    @property
    def most(self) -> int:
        """The largest number of pairs that a sample can hold."""
        unused = int(self.distractors)
        return min(self.keys - unused, self.values - unused, (self.length - 1) // 4)

    def why_most(self) -> str:
        """Tell what bounds the number of pairs."""
        distractors = "below" if self.distractors else "at most"
        return (
            f"{distractors} data.keys={self.keys} and data.values={self.values}, and at most a "
            f"quarter of the {self.length - 1} tokens behind the first"
        )


@dataclass(kw_only=True, slots=True)
class TokenizerConfig:
    """How text becomes tokens; ``kind`` is set by ``tokenizer=``."""

    kind: str = MISSING


@dataclass(kw_only=True, slots=True)
class BpeTokenizer(TokenizerConfig):
    """Byte-level BPE trained on the training split.

    Attributes:
        vocab_size: entries, the 256 bytes and the end-of-text token included.
    """

    kind: str = "bpe"
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        good = 257 <= self.vocab_size <= 2**20
        accepted = "from 257 (all bytes and end of text) to 1048576"
        require(good, "tokenizer.vocab_size", self.vocab_size, accepted)


@dataclass(kw_only=True, slots=True)
class BytesTokenizer(TokenizerConfig):
    """One token a byte, and the end-of-text token."""

    kind: str = "bytes"


@dataclass(kw_only=True, slots=True)
class HfTokenizer(TokenizerConfig):
    """A Hugging Face tokenizer.

    Attributes:
        name: hub name or local folder.
        revision: a git revision, for reproducibility.
    """

    kind: str = "hf"
    name: str = MISSING
    revision: str | None = None


@dataclass(kw_only=True, slots=True)
class TiktokenTokenizer(TokenizerConfig):
    """A tiktoken encoding.

    Attributes:
        name: the encoding's name; the papers' 3B models use ``cl100k_base``.
    """

    kind: str = "tiktoken"
    name: str = "cl100k_base"


DATA_CONFIGS: dict[str, type[DataConfig]] = {
    "stdlib": StdlibData,
    "text": TextData,
    "hub": HubData,
    "shards": ShardsData,
    "retrieval": RetrievalData,
    "recall": RecallData,
}
TOKENIZER_CONFIGS: dict[str, type[TokenizerConfig]] = {
    "bpe": BpeTokenizer,
    "bytes": BytesTokenizer,
    "hf": HfTokenizer,
    "tiktoken": TiktokenTokenizer,
}
