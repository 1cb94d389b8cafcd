"""Where training text comes from, and how it becomes tokens."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import POSITIVE, check_fields, count_fields, require


@dataclass
class DataConfig:
    """What every source shares.

    Attributes:
        val_fraction: share of the documents held out, chosen by a hash of their text; of 150 or
            fewer the share of bytes. A text file of over 2% of the corpus is cut into pieces of 1%.
        val_tokens: held-out tokens measured at most: whole documents, or the beginning of one where
            none is as short.
    """

    kind: str = MISSING
    val_fraction: float = 0.05
    val_tokens: int | str = 65536

    def __post_init__(self) -> None:
        check_fields(self, "data", "val_fraction", "between 0 and 1")
        count_fields(self, "data", "val_tokens")


@dataclass
class StdlibData(DataConfig):
    """The source of Python's standard library, without its tests."""

    kind: str = "stdlib"


@dataclass
class TextData(DataConfig):
    """Local files.

    Attributes:
        path: files, folders or globs (.txt, .md, .jsonl, .jsonl.gz, .jsonl.zst, .parquet).
        text_key: the field of a JSON line or parquet row that holds the text.
        prompt_key: a field with text before it that carries no loss, or ``null``.
    """

    kind: str = "text"
    path: Any = MISSING
    text_key: str = "text"
    prompt_key: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        paths = [self.path] if isinstance(self.path, str) else self.path
        good = isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)
        require(good and paths != [], "data.path", self.path, "a path or a list of paths")
        self.path = paths


@dataclass
class HubData(DataConfig):
    """A streamed data set of the Hugging Face hub, or a local folder in its layout.

    Attributes:
        name: as ``datasets.load_dataset`` takes it.
        subset: the data set's configuration, if it has several.
        split: of training and, by ``val_fraction``, of validation.
        revision: a git revision, for reproducibility.
        text_key: the column that holds the text.
        prompt_key: a column with text before it that carries no loss, or ``null``.
        shuffle_buffer: documents held to shuffle the stream; 0 keeps its order.
        tokenizer_documents: documents that train a ``bpe`` tokenizer, and that may be held out.
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


@dataclass
class ShardsData(DataConfig):
    """Memory-mapped token shards of ``diffx data prepare``, with their tokenizer.

    Attributes:
        path: the folder.
    """

    kind: str = "shards"
    path: str = MISSING


@dataclass
class RetrievalData(DataConfig):
    """Endless samples of the retrieval task; the loss is on the numbers alone.

    Attributes:
        path: the text, as in ``data=text``; ``null`` is the standard library's source.
        length: tokens of a sample; the same as ``train.seq_len``.
        needles: in a sample, at most.
        asked: needles that a question asks for, at most.
        digits: digits of a number.
        curriculum: samples at the start that are bare pairs, from ``city number`` to ``city is
            number.``: from these small models learn the lookup in some hundred steps, from text
            alone hardly ever.
    """

    kind: str = "retrieval"
    path: Any = None
    length: int = 128
    needles: int = 4
    asked: int = 2
    digits: int = 2
    curriculum: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
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


@dataclass
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
        super().__post_init__()
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


@dataclass
class TokenizerConfig:
    """How text becomes tokens; ``kind`` is set by ``tokenizer=``."""

    kind: str = MISSING


@dataclass
class BpeTokenizer(TokenizerConfig):
    """Byte-level BPE trained on the training split.

    Attributes:
        vocab_size: entries, with the 256 bytes and the end-of-text token.
    """

    kind: str = "bpe"
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        good = 257 <= self.vocab_size <= 2**20
        accepted = "from 257 (all bytes and end of text) to 1048576"
        require(good, "tokenizer.vocab_size", self.vocab_size, accepted)


@dataclass
class BytesTokenizer(TokenizerConfig):
    """One token a byte, and the end-of-text token."""

    kind: str = "bytes"


@dataclass
class HfTokenizer(TokenizerConfig):
    """A Hugging Face tokenizer.

    Attributes:
        name: hub name or local folder.
        revision: a git revision, for reproducibility.
    """

    kind: str = "hf"
    name: str = MISSING
    revision: str | None = None


@dataclass
class TiktokenTokenizer(TokenizerConfig):
    """A tiktoken encoding.

    Attributes:
        name: of the encoding; the papers' 3B models use ``cl100k_base``.
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
