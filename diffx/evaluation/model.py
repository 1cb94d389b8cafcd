"""A causal language model as the suites see it: a decoder, or a model of ``transformers``.

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
        tokens: the texts.
        cache: keys and values of the texts, padded to one length; None where texts are read again.
        valid: for ``transformers``, places of the cache that are no padding, bool (B, S).
    """

    logits: Tensor
    tokens: list[list[int]]
    cache: Any = None
    valid: Tensor | None = None


class LanguageModel:
    """Reads texts, scores continuations, and shows its attention, all without gradients.

    Args:
        loaded: from ``diffx.loading.load``.
        caches: keep keys and values. Without, each text is read whole each time, as needed by a
            quantization whose scale is that of a whole text; give it one text at a time then.

    Attributes:
        loaded: as given.
        caches: as given.
        model: the decoder or the pretrained model.
        tokenizer: text to tokens and back.
        device: the model's device.
        context: tokens it was trained to read at once.
        limit: tokens it can read at once; None if there is no bound (rotary positions).
        prefix: tokens that every text begins with; may be none.
        suffix: tokens between a text and its answer; none without a chat template.
        closing: tokens that end an answer; none without a chat template.
        ends: tokens that end a generation.
        pads: whether texts of different lengths can share a cache.
    """

    def __init__(self, loaded: Loaded, caches: bool = True):
        self.loaded, self.caches = loaded, caches
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.context, self.limit = loaded.context, loaded.limit
        self.prefix, self.ends = loaded.prefix, loaded.ends
        self.suffix: list[int] = []
        self.closing: list[int] = []
        self.device = next(loaded.model.parameters()).device
        self.pads = True
        self._decoder = isinstance(loaded.model, Decoder)
        if not self._decoder:
            self.pads = _full_attention(loaded.model.config)
            self._cache = cache_keyword(loaded.model)
            self._keeps = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    @property
    def name(self) -> str:
        """The model's name, for tables."""
        return self.loaded.name

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        if self._decoder:
            return int(self.model.config.num_layers)
        return int(self.model.config.get_text_config().num_hidden_layers)

    def encode(self, text: str) -> list[int]:
        """Encode a text, without special tokens."""
        return self.tokenizer.encode(text)

    def prompt(self, text: str, answer: str = "") -> list[int]:
        """Tokens of an input: ``prefix``, text, ``suffix`` and the beginning of the answer."""
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
        """Logits after the last ``keep`` tokens (all, if None) of ids (B, T), fp32 (B, keep, V).

        Rows may end in padding.
        """
        return self._forward(ids.to(self.device), keep or ids.shape[1])

    @torch.inference_mode()
    def score(
        self, ids: Tensor, rows: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of ``targets`` (n,) after tokens of ids (B, T), and if each is greedy.

        ``rows`` and ``places`` (n,) index the tokens; rows of ids may end in padding.
        """
        ids, rows, places, targets = (x.to(self.device) for x in (ids, rows, places, targets))
        if not self._decoder:
            first = int(places.min())  # device sync
            logits = self._forward(ids, ids.shape[1] - first)[rows, places - first]
            return log_probabilities(logits, targets)
        hidden = self.model.forward_hidden(ids)[rows, places]  # (n, D)
        parts = [
            log_probabilities(self._project(part), part_targets)
            for part, part_targets in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
        scores, greedy = zip(*parts, strict=True)
        return torch.cat(scores), torch.cat(greedy)

    @torch.inference_mode()
    def start(self, texts: list[list[int]]) -> Prefix:
        """Read texts of one token or more into a cache."""
        if not self.caches or (not self.pads and len({len(text) for text in texts}) > 1):
            return self._reread(texts)
        ids, padding = self._padded(texts)
        if self._decoder:
            dtype = self.model.output_weight.dtype
            cache: Any = KVCache(self.model.config, len(ids), ids.shape[1], self.device, dtype)
        else:
            cache = DynamicCache(config=self.model.config)
        prefix = Prefix(torch.empty(0), [list(text) for text in texts], cache)
        prefix.logits = self._append(prefix, ids, padding, keep=None)[:, 0]
        return prefix

    @torch.inference_mode()
    def extend(
        self, prefix: Prefix, rows: list[int], tokens: list[list[int]]
    ) -> tuple[Prefix, Tensor]:
        """Continue row ``rows[i]`` of a prefix, which is not changed, with ``tokens[i]``.

        Returns:
            The new prefix, and the logits after each new token, fp32 (len(rows), longest, V), where
            shorter rows end in padding.
        """
        texts = [prefix.tokens[row] + list(new) for row, new in zip(rows, tokens, strict=True)]
        longest = max(map(len, tokens))
        if prefix.cache is None:
            ids, padding = self._padded(texts)
            logits = self._forward(ids, ids.shape[1])
            firsts = [len(text) - len(new) for text, new in zip(texts, tokens, strict=True)]
            places = torch.tensor(firsts)[:, None] + torch.arange(longest)
            places = places.clamp(max=ids.shape[1] - 1).to(self.device)
            chosen = logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))
            return Prefix(_last(logits, padding), texts), chosen
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
        """Continue prompts greedily: to an end of text, past a stop string, to ``max_tokens``."""
        if not self.pads and len({len(prompt) for prompt in prompts}) > 1:
            return [self.generate([prompt], max_tokens, stop)[0] for prompt in prompts]
        tail = max(map(len, stop or ()), default=0) + 8  # tokens that may hold a stop string
        state = self.start(prompts)
        self._reserve(state, max_tokens)
        drawn: list[list[int]] = [[] for _ in prompts]
        active = set(range(len(prompts)))
        for step in range(max_tokens):
            chosen = state.logits.argmax(-1)  # (B,)
            tokens = chosen.tolist()  # device sync
            for row in list(active):
                if tokens[row] in self.ends:
                    active.remove(row)
                    continue
                drawn[row].append(tokens[row])
                if stop and any(text in self.decode(drawn[row][-tail:]) for text in stop):
                    active.remove(row)
            if not active or step + 1 == max_tokens:
                break
            self._read(state, chosen)
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
        """Continue a prompt, yielding each token at once; see ``diffx.models.generate``."""
        generator = torch.Generator().manual_seed(seed)
        state = self.start([prompt])
        self._reserve(state, max_tokens)
        for _ in range(max_tokens):
            token = sample(state.logits[0], temperature, top_k, top_p, generator)
            if token in self.ends:
                return
            yield token
            with torch.inference_mode():  # not around the yield, where the caller's code runs
                self._read(state, torch.tensor([token], device=self.device))

    @torch.inference_mode()
    def observe(
        self,
        ids: Tensor,
        attention: Callable[[int, AttentionView], None] | None = None,
        hidden: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Read ids (B, T), calling ``attention(layer, view)`` and ``hidden(layer, (B, T, D))``.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        with observing(self.model, attention, hidden):
            self._forward(ids.to(self.device), 1)

    def attention_maps(self, ids: Tensor) -> list[Tensor]:
        """The map of each layer for ids (B, T), fp32 (B, heads, T, T): A1 - lambda A2.

        A DEX branch works on the output of attention, so that an adapted model's maps are ordinary.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        maps: list[Tensor] = []

        def attention(layer: int, view: AttentionView) -> None:
            heads = range(view.num_heads)
            maps.append(torch.stack([view.head_map(j, 0, ids.shape[1]) for j in heads], 1))

        self.observe(ids, attention)
        return maps

    def lambdas(self, ids: Tensor) -> list[Tensor | None]:
        """Lambda of each layer for ids (B, T), broadcastable to (B, T, heads).

        None without a difference; of an adapted model the lambda of the branch.

        Raises:
            UserError: the model's attention cannot be seen.
        """
        if self.loaded.adapted is not None:
            branches = self.loaded.adapted.branches
            lambdas: list[Tensor | None] = [branch.lambda_value().detach() for branch in branches]
            return lambdas or [None] * self.num_layers
        lambdas = []
        self.observe(ids, lambda layer, view: lambdas.append(view.lam))
        return lambdas

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        if self._decoder:
            return self._project(self.model.forward_hidden(ids)[:, -keep:])
        options = {"logits_to_keep": keep} if self._keeps else {}
        return self.model(input_ids=ids, use_cache=False, **options).logits[:, -keep:].float()

    def _project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.output_weight).float()

    def _append(self, prefix: Prefix, ids: Tensor, padding: list[int], keep: int | None) -> Tensor:
        """Read ids (B, T) after a prefix, in place.

        Returns logits after the last ``keep`` tokens, or (None) after the last that is no padding.
        """
        if self._decoder:
            hidden = self.model.forward_hidden(ids, cache=prefix.cache)
            chosen = _last(hidden, padding)[:, None] if keep is None else hidden[:, -keep:]
            prefix.cache.drop_padding(padding)
            return self._project(chosen)
        if keep is None:
            return _last(self._append(prefix, ids, padding, max(padding) + 1), padding)[:, None]
        options: dict[str, Any] = {self._cache: prefix.cache}
        if self._keeps:
            options["logits_to_keep"] = keep
        new, steps = torch.ones_like(ids, dtype=torch.bool), torch.arange(ids.shape[1]).to(ids)
        valid = prefix.valid
        if valid is not None:
            options["attention_mask"] = torch.cat([valid, new], dim=1).long()
            options["position_ids"] = valid.sum(1, keepdim=True) + steps
        elif any(padding):
            valid = new.new_ones(len(ids), prefix.cache.get_seq_length())
        if valid is not None:
            ends = ids.shape[1] - torch.tensor(padding, device=self.device)
            prefix.valid = torch.cat([valid, steps < ends[:, None]], dim=1)
        return self.model(input_ids=ids, use_cache=True, **options).logits[:, -keep:].float()

    def _reserve(self, prefix: Prefix, tokens: int) -> None:
        """Let a decoder's cache hold more tokens; that of ``transformers`` grows by itself."""
        if self._decoder and prefix.cache is not None:
            rows = torch.arange(len(prefix.tokens), device=self.device)
            prefix.cache = prefix.cache.select(rows, tokens)

    def _read(self, prefix: Prefix, chosen: Tensor) -> None:
        """Read one more token of each text, chosen (B,), in place."""
        if prefix.cache is not None:
            prefix.logits = self._append(prefix, chosen[:, None], [0] * len(chosen), keep=1)[:, -1]
            return
        for text, token in zip(prefix.tokens, chosen.tolist(), strict=True):  # device sync
            text.append(token)
        prefix.logits = self._reread(prefix.tokens).logits

    def _select(self, prefix: Prefix, rows: list[int], tokens: int) -> Prefix:
        """Copy rows of a prefix into one that can hold more tokens."""
        index = torch.tensor(rows, device=self.device)
        if self._decoder:
            cache = prefix.cache.select(index, tokens)
        else:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_select_indices(index)
        valid = None if prefix.valid is None else prefix.valid[index]
        return Prefix(prefix.logits[index], prefix.tokens, cache, valid)

    def _reread(self, texts: list[list[int]]) -> Prefix:
        ids, padding = self._padded(texts)
        logits = _last(self._forward(ids, max(padding) + 1), padding)
        return Prefix(logits, [list(text) for text in texts])

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, list[int]]:
        longest = max(map(len, texts))
        padding = [longest - len(text) for text in texts]
        rows = [
            [*text, *[self.tokenizer.eot_id] * pad]
            for text, pad in zip(texts, padding, strict=True)
        ]
        return torch.tensor(rows, device=self.device), padding


def log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets (n,), and if each is greedy; overwrites logits (n, V)."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    most, likeliest = logits.max(-1)
    return chosen - most - logits.sub_(most[:, None]).exp_().sum(-1).log(), likeliest == targets


def _last(values: Tensor, padding: list[int]) -> Tensor:
    """The values (B, V) at each row's last token but padding, of values (B, keep, V)."""
    rows = torch.arange(len(padding), device=values.device)
    return values[rows, values.shape[1] - 1 - torch.tensor(padding, device=values.device)]


def _full_attention(config: Any) -> bool:
    """Whether every layer sees all earlier tokens; a sliding window counts padding as text."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return not getattr(config, "sliding_window", None)
