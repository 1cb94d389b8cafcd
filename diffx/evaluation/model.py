"""A causal language model as the probes see it, whether it is ours or one of ``transformers``.

Notation: B batch, T tokens, V vocabulary, D model width.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from diffx.hub.attention import cache_keyword, observing
from diffx.loading import Loaded
from diffx.models import Decoder, KVCache
from diffx.models.generation import sample
from diffx.models.view import AttentionView

_ROWS = 512  # tokens whose logits are formed at once where texts are scored


@dataclass
class Prefix:
    """Texts that a model has read, to be continued.

    Attributes:
        logits: of the token after each text, fp32 (B, V).
        tokens: the texts; what a model is given whole whose cache cannot hold padding.
        cache: keys and values of the texts, padded to one length; None for such a model.
        valid: for ``transformers``, which places of the cache are no padding, bool (B, S).
    """

    logits: Tensor
    tokens: list[list[int]]
    cache: Any = None
    valid: Tensor | None = None


class LanguageModel:
    """Reads texts, scores what follows, and lets its attention be seen. Everything runs without gradients.

    Args:
        loaded: what ``diffx.loading.load`` gave.
        caches: keep keys and values of what was read. Without, each text is read whole each time, as a quantization needs whose scale
            is that of a whole text; give it one text at a time then.

    Attributes:
        loaded: what it was given.
        caches: the same.
        model: the decoder or the pretrained model.
        tokenizer: text to tokens and back.
        device: where the model is.
        context: tokens it was trained to read at once.
        limit: tokens it can read at once; None if there is no bound (rotary positions).
        prefix: tokens that every text begins with; may be none.
        suffix: tokens between a text and its answer; none without a chat template.
        closing: tokens that end an answer; none without a chat template.
        ends: tokens that end a generation.
        pads: whether texts of different lengths can share a cache.
    """

    def __init__(self, loaded: Loaded, caches: bool = True):
        self.caches = caches
        self.loaded, self.model, self.tokenizer = loaded, loaded.model, loaded.tokenizer
        self.device = next(loaded.model.parameters()).device
        self.context, self.limit, self.prefix, self.ends = (
            loaded.context,
            loaded.limit,
            loaded.prefix,
            loaded.ends,
        )
        self.suffix: list[int] = []
        self.closing: list[int] = []
        self._theirs = None if isinstance(loaded.model, Decoder) else loaded.model
        self.pads = self._theirs is None or _full_attention(self._theirs.config)
        self._cache = "" if self._theirs is None else cache_keyword(self._theirs)
        self._keeps = (
            self._theirs is not None
            and "logits_to_keep" in inspect.signature(self._theirs.forward).parameters
        )

    @property
    def name(self) -> str:
        """The model's name, for tables."""
        return self.loaded.name

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(
            self.model.config.num_layers
            if self._theirs is None
            else self.model.config.get_text_config().num_hidden_layers
        )

    def encode(self, text: str) -> list[int]:
        """Encode a text, without special tokens."""
        return self.tokenizer.encode(text)

    def prompt(self, text: str, answer: str = "") -> list[int]:
        """Tokens of a whole input: ``prefix``, a text, ``suffix`` and the beginning of the answer."""
        if not self.suffix:
            return self.prefix + self.encode(text + answer)
        return self.prefix + self.encode(text) + self.suffix + self.encode(answer.lstrip())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode several texts."""
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: list[int]) -> str:
        """Turn tokens into text."""
        return self.tokenizer.decode(ids)

    @torch.inference_mode()
    def logits(self, ids: Tensor, keep: int | None = None) -> Tensor:
        """Logits after the last ``keep`` tokens (all, if None) of ids (B, T), in fp32 (B, keep, V); padding at a row's end does no harm."""
        return self._forward(ids.to(self.device), keep or ids.shape[1])

    @torch.inference_mode()
    def score(
        self, ids: Tensor, rows: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of ``targets`` (n,) after tokens of ids (B, T), given by row and place, and whether each is the likeliest.

        Padding at a row's end does no harm. Our decoders form the logits of ``_ROWS`` tokens at a time.
        """
        ids, rows, places, targets = (x.to(self.device) for x in (ids, rows, places, targets))
        if self._theirs is None:
            hidden = self.model.forward_hidden(ids)[rows, places]  # (n, D)
            parts = [
                log_probabilities(self._project(part), own)
                for part, own in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
            ]
            return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts])
        first = int(places.min())  # device sync
        return log_probabilities(
            self._forward(ids, ids.shape[1] - first)[rows, places - first], targets
        )

    @torch.inference_mode()
    def start(self, texts: list[list[int]]) -> Prefix:
        """Read texts of one token or more into a cache."""
        if not self.caches or (not self.pads and len({len(text) for text in texts}) > 1):
            return self._reread(texts)
        ids, padding = self._padded(texts)
        if self._theirs is None:
            cache: Any = KVCache(
                self.model.config,
                len(texts),
                ids.shape[1],
                self.device,
                self.model.output_weight.dtype,
            )
        else:
            cache = DynamicCache(config=self._theirs.config)
        prefix = Prefix(torch.empty(0), [list(text) for text in texts], cache)
        prefix.logits = self._append(prefix, ids, padding, keep=None)[:, 0]
        return prefix

    @torch.inference_mode()
    def extend(
        self, prefix: Prefix, rows: list[int], tokens: list[list[int]]
    ) -> tuple[Prefix, Tensor]:
        """Continue row ``rows[i]`` of a prefix, which stays as it is, with ``tokens[i]``, one or more.

        Returns:
            The new prefix, and the logits after each new token, fp32 (len(rows), longest, V), where shorter rows end in padding.
        """
        texts = [prefix.tokens[row] + list(new) for row, new in zip(rows, tokens, strict=True)]
        longest = max(map(len, tokens))
        if prefix.cache is None:
            ids, padding = self._padded(texts)
            logits = self._forward(ids, ids.shape[1])
            steps = torch.arange(longest, device=self.device)
            first = torch.tensor(
                [len(text) - len(new) for text, new in zip(texts, tokens, strict=True)],
                device=self.device,
            )
            chosen = (first[:, None] + steps).clamp(max=ids.shape[1] - 1)
            return Prefix(_last(logits, padding), texts), logits.gather(
                1, chosen[..., None].expand(-1, -1, logits.shape[2])
            )
        ids, padding = self._padded(tokens)
        new = self._select(prefix, rows, longest)
        new.tokens = texts
        logits = self._append(new, ids, padding, keep=longest)
        new.logits = _last(logits, padding)
        if any(padding) and not self.pads:
            new.cache = None
        return new, logits

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: list[str] | None = None
    ) -> list[list[int]]:
        """Continue prompts greedily, together: each to an end-of-text token, past a stop string, or to ``max_tokens`` tokens."""
        if not self.pads and len({len(prompt) for prompt in prompts}) > 1:
            return [self.generate([prompt], max_tokens, stop)[0] for prompt in prompts]
        stop = stop or []
        tail = (
            max(map(len, stop), default=0) + 8
        )  # tokens that may hold a stop string that ends now
        state = self.start(prompts)
        self._make_room(state, max_tokens)
        drawn: list[list[int]] = [[] for _ in prompts]
        active = set(range(len(prompts)))
        for step in range(max_tokens):
            chosen = state.logits.argmax(-1)  # (B,)
            for row, token in enumerate(chosen.tolist()):  # device sync
                if row in active:
                    if token in self.ends:
                        active.remove(row)
                        continue
                    drawn[row].append(token)
                    if stop and any(text in self.decode(drawn[row][-tail:]) for text in stop):
                        active.remove(row)
            if not active or step + 1 == max_tokens:
                break
            self._read_on(state, chosen)
        return drawn

    def sample(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> Iterator[int]:
        """Continue a prompt, yielding each token as soon as it is drawn; see ``diffx.models.generate`` for the arguments."""
        generator = torch.Generator().manual_seed(seed)
        state = self.start([prompt])
        self._make_room(state, max_tokens)
        for _ in range(max_tokens):
            token = sample(state.logits[0], temperature, top_k, top_p, generator)
            if token in self.ends:
                return
            yield token
            with torch.inference_mode():  # not around the yield, where the caller's code runs
                self._read_on(state, torch.tensor([token], device=self.device))

    @torch.inference_mode()
    def observe(
        self,
        ids: Tensor,
        attention: Callable[[int, AttentionView], None] | None = None,
        hidden: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Read ids (B, T), calling ``attention(layer, view)`` and ``hidden(layer, states (B, T, D))`` for each layer as it runs.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        with observing(self.model, attention, hidden):
            self._forward(ids.to(self.device), 1)

    def attention_maps(self, ids: Tensor) -> list[Tensor]:
        """The maps of each layer for ids (B, T): (B, heads, T, T) in fp32, row by query; of differential attention A1 - lambda A2.

        All of them are held at once. A DEX branch works on the output of attention, so that an adapted model's maps are ordinary ones.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        maps: list[Tensor] = []
        length = ids.shape[1]
        self.observe(
            ids,
            lambda layer, view: maps.append(
                torch.stack([view.head_map(j, 0, length) for j in range(view.num_heads)], 1)
            ),
        )
        return maps

    def lambdas(self, ids: Tensor) -> list[Tensor | None]:
        """Lambda of each layer for ids (B, T), broadcastable to (B, T, heads); of an adapted model that of its branch.

        None for a layer that subtracts nothing.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        if self.loaded.adapted is not None:
            return [branch.lambda_value().detach() for branch in self.loaded.adapted.branches] or [
                None
            ] * self.num_layers
        found: list[Tensor | None] = []
        self.observe(ids, lambda layer, view: found.append(view.lam))
        return found

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        if self._theirs is None:
            return self._project(self.model.forward_hidden(ids)[:, -keep:])
        options = {"logits_to_keep": keep} if self._keeps else {}
        return self._theirs(input_ids=ids, use_cache=False, **options).logits[:, -keep:].float()

    def _project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.output_weight).float()

    def _append(self, prefix: Prefix, ids: Tensor, padding: list[int], keep: int | None) -> Tensor:
        """Read ids (B, T) behind a prefix, in its place: logits after the last ``keep`` of them, or (None) after the last but padding."""
        if self._theirs is None:
            hidden = self.model.forward_hidden(ids, cache=prefix.cache)
            logits = self._project(
                _last(hidden, padding)[:, None] if keep is None else hidden[:, -keep:]
            )
            prefix.cache.drop_padding(padding)
            return logits
        if keep is None:
            return _last(self._append(prefix, ids, padding, max(padding) + 1), padding)[:, None]
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps else {}
        new = torch.ones_like(ids, dtype=torch.bool)
        if prefix.valid is not None:
            options["attention_mask"] = torch.cat([prefix.valid, new], dim=1).long()
            options["position_ids"] = prefix.valid.sum(1, keepdim=True) + torch.arange(
                ids.shape[1], device=self.device
            )
        if prefix.valid is not None or any(padding):
            before = torch.ones(
                len(ids), prefix.cache.get_seq_length(), dtype=torch.bool, device=self.device
            )
            ends = ids.shape[1] - torch.tensor(padding, device=self.device)
            real = torch.arange(ids.shape[1], device=self.device) < ends[:, None]
            prefix.valid = torch.cat(
                [before if prefix.valid is None else prefix.valid, real], dim=1
            )
        assert self._theirs is not None
        options[self._cache] = prefix.cache
        return self._theirs(input_ids=ids, use_cache=True, **options).logits[:, -keep:].float()

    def _make_room(self, prefix: Prefix, tokens: int) -> None:
        """Let our cache hold more tokens; theirs grows by itself."""
        if self._theirs is None and prefix.cache is not None:
            prefix.cache = prefix.cache.select(
                torch.arange(len(prefix.tokens), device=self.device), tokens
            )

    def _read_on(self, prefix: Prefix, chosen: Tensor) -> None:
        """Read one token more of each text, chosen (B,), in the prefix's place."""
        if prefix.cache is None:
            prefix.tokens = [
                [*text, token] for text, token in zip(prefix.tokens, chosen.tolist(), strict=True)
            ]  # device sync
            prefix.logits = self._reread(prefix.tokens).logits
        else:
            prefix.logits = self._append(prefix, chosen[:, None], [0] * len(chosen), keep=1)[:, -1]

    def _select(self, prefix: Prefix, rows: list[int], room: int) -> Prefix:
        index = torch.tensor(rows, device=self.device)
        if self._theirs is None:
            cache = prefix.cache.select(index, room)
        else:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_select_indices(index)
        return Prefix(
            prefix.logits[index],
            prefix.tokens,
            cache,
            None if prefix.valid is None else prefix.valid[index],
        )

    def _reread(self, texts: list[list[int]]) -> Prefix:
        ids, padding = self._padded(texts)
        return Prefix(
            _last(self._forward(ids, max(padding) + 1), padding), [list(text) for text in texts]
        )

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, list[int]]:
        longest = max(map(len, texts))
        padding = [longest - len(text) for text in texts]
        rows = [
            [*text, *[self.tokenizer.eot_id] * pad]
            for text, pad in zip(texts, padding, strict=True)
        ]
        return torch.tensor(rows, device=self.device), padding


def log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of targets (n,) under logits (n, V), and whether each is the likeliest; the logits are overwritten."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    most, likeliest = logits.max(-1)
    return chosen - most - logits.sub_(most[:, None]).exp_().sum(-1).log(), likeliest == targets


def _last(logits: Tensor, padding: list[int]) -> Tensor:
    """What stands (B, V) at each row's last token that is no padding, in what stands at the last tokens (B, keep, V)."""
    rows = torch.arange(len(padding), device=logits.device)
    return logits[rows, logits.shape[1] - 1 - torch.tensor(padding, device=logits.device)]


def _full_attention(config: Any) -> bool:
    """Whether every layer of a pretrained model sees all that came before; a sliding window would count padding as text."""
    config = config.get_text_config()
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
    )
    return kinds == {"full_attention"}
