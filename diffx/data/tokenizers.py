"""Text to tokens and back. Special tokens in a text are encoded as ordinary text."""

import base64
import itertools
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from diffx.config import UserError
from diffx.config.checks import refuse, refusing
from diffx.config.data import BpeTokenizer, HfTokenizer, TiktokenTokenizer, TokenizerConfig
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.files import json_sha256, read_json, sha256, write_json

END_OF_TEXT = "<|endoftext|>"
_FILE, _RANKS = "diffx_tokenizer.json", "ranks.tiktoken"
_log = logging.getLogger(__name__)


class FastTokenizer:
    """A tokenizer of the ``tokenizers`` library.

    Attributes:
        kind: ``bpe``, ``bytes`` or ``hf``.
        eot_id: the end-of-text token.
        vocab_size: one more than the highest token.
        fingerprint: SHA-256 of the definition.
    """

    def __init__(
        self, kind: str, backend: tokenizers.Tokenizer, eot: str, pretrained: Any = None
    ) -> None:
        # "<|endoftext|>" in a text is five words, not the end of the text.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        eot_id = backend.token_to_id(eot)
        if eot_id is None:
            raise ValueError(f"the vocabulary has no {eot}")
        self.kind = kind
        self.eot_id: int = eot_id
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self._backend, self._eot, self._pretrained = backend, eot, pretrained
        definition = json.loads(backend.to_str())
        del definition["post_processor"]  # never used, and rewritten by transformers when it saves
        self.fingerprint = json_sha256([definition, self.eot_id])

    def encode(self, text: str) -> list[int]:
        """Encode one text, without an end-of-text token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode several texts at once."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        """Map tokens to text, special tokens included."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def save(self, folder: str | Path, begin: bool = False) -> None:
        """Write files for ``load_tokenizer`` and ``transformers.AutoTokenizer``.

        With ``begin``, ``transformers`` puts end of text before every text, as training does.
        """
        from transformers import PreTrainedTokenizerFast  # slow to import

        backend, pretrained, eot = self._backend, self._pretrained, self._eot
        if begin:
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.post_processor = processors.TemplateProcessing(
                single=f"{eot} $A", pair=f"{eot} $A $B:1", special_tokens=[(eot, self.eot_id)]
            )
        if begin or pretrained is None:
            special = {"eos_token": eot} | ({"bos_token": eot} if begin else {})
            inputs = ["input_ids", "attention_mask"]
            pretrained = PreTrainedTokenizerFast(
                tokenizer_object=backend, model_input_names=inputs, **special
            )
        pretrained.save_pretrained(folder)
        saved = {"kind": self.kind, "eot": eot, "fingerprint": self.fingerprint}
        write_json(Path(folder) / _FILE, saved)


class TiktokenEncoding:
    """A tokenizer of the optional ``tiktoken`` library, with ``FastTokenizer``'s attributes."""

    kind = "tiktoken"

    def __init__(self, encoding: Any) -> None:
        self.eot_id: int = encoding.eot_token
        self.vocab_size: int = encoding.n_vocab
        self._encoding = encoding
        definition = [sha256(self._ranks()), encoding._pat_str, encoding._special_tokens]
        self.fingerprint = json_sha256(definition, sort_keys=False)

    def encode(self, text: str) -> list[int]:
        """See ``FastTokenizer``."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See ``FastTokenizer``."""
        return self._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: list[int]) -> str:
        """See ``FastTokenizer``."""
        return self._encoding.decode(ids)

    def save(self, folder: str | Path, begin: bool = False) -> None:
        """Write the vocabulary for ``load_tokenizer``; ``transformers`` cannot read it."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _RANKS).write_bytes(self._ranks())
        saved = {
            "kind": self.kind,
            "name": self._encoding.name,
            "pat_str": self._encoding._pat_str,
            "special_tokens": self._encoding._special_tokens,
            "fingerprint": self.fingerprint,
        }
        write_json(Path(folder) / _FILE, saved)

    def _ranks(self) -> bytes:
        ranks = sorted(self._encoding._mergeable_ranks.items(), key=lambda item: item[1])
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks)


Tokenizer = FastTokenizer | TiktokenEncoding


def decode_documents(tokenizer: Tokenizer, tokens: np.ndarray) -> list[str]:
    """Return the texts after each end-of-text token."""
    ends = np.flatnonzero(tokens == tokenizer.eot_id).tolist()
    spans = itertools.pairwise([*ends, len(tokens)])
    return [tokenizer.decode(tokens[start + 1 : end].tolist()) for start, end in spans]


def make_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Make the tokenizer of a config; ``bpe`` alone is trained, on ``texts``.

    Raises:
        UserError: the tokenizer does not exist, cannot be reached, or has no end-of-text token.
    """
    if isinstance(config, HfTokenizer):
        return _from_hf(config.name, config.revision)
    if isinstance(config, TiktokenTokenizer):
        return _from_tiktoken(config.name)
    alphabet, bpe = pre_tokenizers.ByteLevel.alphabet(), isinstance(config, BpeTokenizer)
    vocab = {} if bpe else {char: index for index, char in enumerate(sorted(alphabet))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bpe)
    backend.decoder = decoders.ByteLevel()
    if isinstance(config, BpeTokenizer):
        trainer = trainers.BpeTrainer(
            vocab_size=config.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=alphabet,
            min_frequency=2,
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([END_OF_TEXT])
    tokenizer = FastTokenizer(config.kind, backend, END_OF_TEXT)
    if isinstance(config, BpeTokenizer) and tokenizer.vocab_size < config.vocab_size:
        more = "tokenizer.vocab_size=%d is more than the text gives: the vocabulary has %d"
        _log.warning(more, config.vocab_size, tokenizer.vocab_size)
    return tokenizer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a tokenizer that ``save`` wrote, without the network.

    Raises:
        UserError: the folder holds no such tokenizer, or a damaged one.
    """
    folder = Path(folder)
    refused = f"{folder} cannot be used as a tokenizer"
    try:
        saved = read_json(folder / _FILE, {"kind": str, "fingerprint": str})
        tokenizer: Tokenizer
        if saved["kind"] == "tiktoken":
            lines = (line.split() for line in (folder / _RANKS).read_bytes().splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            options = {key: saved[key] for key in ("name", "pat_str", "special_tokens")}
            encoding = _tiktoken().Encoding(mergeable_ranks=ranks, **options)
            tokenizer = TiktokenEncoding(encoding)
        elif saved["kind"] == "hf":
            tokenizer = _from_hf(str(folder), None)
        else:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer = FastTokenizer(saved["kind"], backend, saved["eot"])
    except Exception as error:  # a damaged file makes `tokenizers` raise no narrower one
        raise UserError(f"{refused}: {reason(error)}") from error
    if tokenizer.fingerprint != saved["fingerprint"]:
        raise UserError(f"{refused}: the fingerprint differs")
    return tokenizer


def _from_hf(name: str, revision: str | None) -> FastTokenizer:
    from transformers import AutoTokenizer

    setting, load = f"tokenizer.name={name}", AutoTokenizer.from_pretrained
    accepted = "it must be a local folder or a hub name that can be reached"
    # Each library below has other exceptions.
    with refusing(setting, Exception, accepted=accepted), asking_hub(name):
        pretrained = load(name, revision=revision, trust_remote_code=False)
    refuse(not pretrained.is_fast, setting, "it has no tokenizer.json; choose one that has")
    eot = pretrained.eos_token
    refuse(eot is None, setting, "it has no end-of-text token (eos_token)")
    return FastTokenizer("hf", pretrained.backend_tokenizer, eot, pretrained)


def _tiktoken() -> Any:
    install = "run pip install 'diffx[tiktoken]'"
    with refusing("tokenizer=tiktoken", ImportError, accepted=install):
        import tiktoken
    return tiktoken


def _from_tiktoken(name: str) -> TiktokenEncoding:
    tiktoken, setting = _tiktoken(), f"tokenizer.name={name}"
    names = tiktoken.list_encoding_names()
    refuse(name not in names, setting, f"it must be one of {', '.join(names)}")
    fetched = "its vocabulary has to be fetched once from the network: "
    with refusing(setting, (OSError, ValueError), fetched):
        encoding = tiktoken.get_encoding(name)
    with refusing(setting, KeyError, "it has no end-of-text token: "):
        return TiktokenEncoding(encoding)
