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
from torch.nn.utils.rnn import pad_sequence
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
        caches: keep keys and values. Without, a text is read whole each time, as needed by a
            quantization whose scale is that of a whole text; give it one text at a time then.

    Attributes:
        context: tokens it was trained to read at once.
        limit: tokens it can read at once; None if there is no bound (rotary positions).
        prefix: tokens that every text begins with.
        suffix: tokens between a text and its answer, with a chat template.
        closing: tokens that end an answer, with a chat template.
        ends: tokens that end a generation.
        encode, encode_batch, decode: texts to tokens without special ones, and back.
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
        self.name = loaded.name
        self.encode, self.encode_batch = self.tokenizer.encode, self.tokenizer.encode_batch
        self.decode = self.tokenizer.decode
        config = loaded.model.config
        self._decoder = isinstance(loaded.model, Decoder)
        self.pads = self._decoder or _full_attention(config)
        if self._decoder:
            self.num_layers = config.num_layers
        else:
            self.num_layers = config.get_text_config().num_hidden_layers
            self._cache = cache_keyword(loaded.model)
            self._keeps = "logits_to_keep" in inspect.signature(loaded.model.forward).parameters

    def prompt(self, text: str, answer: str = "") -> list[int]:
        """Tokens of an input: ``prefix``, text, ``suffix`` and the beginning of the answer."""
        if not self.suffix:
            return self.prefix + self.encode(text + answer)
        return self.prefix + self.encode(text) + self.suffix + self.encode(answer.lstrip())

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits after each token of ids (B, T), fp32 (B, T, V)."""
        return self._forward(ids.to(self.device), ids.shape[1])

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

    def start(self, texts: list[list[int]], free: int = 0) -> Prefix:
        """Read texts of one token or more into a cache with room for ``free`` more tokens."""
        texts = [list(text) for text in texts]
        ids, padding = self._padded(texts)
        if not self.caches or (any(padding) and not self.pads):
            return self._reread(texts)
        prefix = self.read(ids, padding, free)
        prefix.tokens = texts
        return prefix

    @torch.inference_mode()
    def read(self, ids: Tensor, padding: list[int] | None = None, free: int = 0) -> Prefix:
        """Read ids (B, T), whose rows end in so much padding; the prefix has no ``tokens``."""
        config = self.model.config
        cache: Any = None if self._decoder else DynamicCache(config=config)
        if self._decoder:
            dtype = self.model.output_weight.dtype
            cache = KVCache(config, len(ids), ids.shape[1] + free, self.device, dtype)
        prefix = Prefix(torch.empty(0), [], cache)
        prefix.logits = self._append(prefix, ids, padding or [0] * len(ids))[:, 0]
        return prefix

    @torch.inference_mode()
    def extend(
        self, prefix: Prefix, rows: list[int], tokens: list[list[int]]
    ) -> tuple[Prefix, Tensor]:
        """Continue row ``rows[i]`` of a prefix, which is not changed, with ``tokens[i]``.

        Returns:
            The new prefix, and the logits after each new token, fp32 (len(rows), longest, V);
            shorter rows end in padding.
        """
        texts = [prefix.tokens[row] + list(new) for row, new in zip(rows, tokens, strict=True)]
        if prefix.cache is None:
            ids, padding = self._padded(texts)
            logits = self._forward(ids, ids.shape[1])
            pairs = zip(logits, texts, tokens, strict=True)
            parts = [row[len(text) - len(new) : len(text)] for row, text, new in pairs]
            return Prefix(_last(logits, padding), texts), pad_sequence(parts, batch_first=True)
        ids, padding = self._padded(tokens)
        index = torch.tensor(rows, device=self.device)
        if self._decoder:
            cache = prefix.cache.select(index, ids.shape[1])
        else:
            cache = copy.deepcopy(prefix.cache)
            cache.batch_select_indices(index)
        valid = None if prefix.valid is None else prefix.valid[index]
        extended = Prefix(prefix.logits, texts, cache, valid)
        logits = self._append(extended, ids, padding, ids.shape[1])
        extended.logits = _last(logits, padding)
        if any(padding) and not self.pads:
            extended.cache = None
        return extended, logits

    @torch.inference_mode()
    def step(self, prefix: Prefix, chosen: Tensor) -> None:
        """Read one more token of each text, chosen (B,), in place."""
        if prefix.cache is not None:
            prefix.logits = self._append(prefix, chosen[:, None], [0] * len(chosen), 1)[:, -1]
            return
        for text, token in zip(prefix.tokens, chosen.tolist(), strict=True):  # device sync
            text.append(token)
        prefix.logits = self._reread(prefix.tokens).logits

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], max_tokens: int, stop: list[str] | None = None
    ) -> list[list[int]]:
        """Continue prompts greedily: to an end of text, past a stop string, to ``max_tokens``."""
        if not self.pads and len({len(prompt) for prompt in prompts}) > 1:
            return [self.generate([prompt], max_tokens, stop)[0] for prompt in prompts]
        tail = max(map(len, stop or ()), default=0) + 8  # tokens that may hold a stop string
        prefix = self.start(prompts, max_tokens)
        drawn: list[list[int]] = [[] for _ in prompts]
        active = set(range(len(prompts)))
        for count in range(1, max_tokens + 1):
            chosen = prefix.logits.argmax(-1)  # (B,)
            tokens = chosen.tolist()  # device sync
            for row in list(active):
                if tokens[row] in self.ends:
                    active.remove(row)
                    continue
                drawn[row].append(tokens[row])
                if stop and any(text in self.decode(drawn[row][-tail:]) for text in stop):
                    active.remove(row)
            if not active or count == max_tokens:
                break
            self.step(prefix, chosen)
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
        prefix = self.start([prompt], max_tokens)
        for _ in range(max_tokens):
            token = sample(prefix.logits[0], temperature, top_k, top_p, generator)
            if token in self.ends:
                return
            yield token
            self.step(prefix, torch.tensor([token], device=self.device))

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

        DEX works on the output of attention: an adapted model's maps are ordinary. Raises as
        ``observe``.
        """
        maps: list[Tensor] = []

        def attention(layer: int, view: AttentionView) -> None:
            heads = range(view.num_heads)
            maps.append(torch.stack([view.head_map(j, 0, ids.shape[1]) for j in heads], 1))

        self.observe(ids, attention)
        return maps

    def lambdas(self, ids: Tensor) -> list[Tensor | None]:
        """Lambda of each layer for ids (B, T), broadcastable to (B, T, heads).

        None without a difference; of an adapted model, of its branch. Raises as ``observe``.
        """
        lambdas: list[Tensor | None] = []
        if self.loaded.adapted is None:
            self.observe(ids, lambda layer, view: lambdas.append(view.lam))
            return lambdas
        lambdas += [branch.lambda_value().detach() for branch in self.loaded.adapted.branches]
        return lambdas or [None] * self.num_layers

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        if self._decoder:
            return self._project(self.model.forward_hidden(ids)[:, -keep:])
        options = {"logits_to_keep": keep} if self._keeps else {}
        return self.model(input_ids=ids, use_cache=False, **options).logits[:, -keep:].float()

    def _project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.output_weight).float()

    def _append(self, prefix: Prefix, ids: Tensor, padding: list[int], keep: int = 0) -> Tensor:
        """Read ids (B, T) after a prefix, in place.

        Returns logits after the last ``keep`` tokens, or (0) after the last that is no padding.
        """
        if self._decoder:
            hidden = self.model.forward_hidden(ids, cache=prefix.cache)
            hidden = hidden[:, -keep:] if keep else _last(hidden, padding)[:, None]
            prefix.cache.drop_padding(padding)
            return self._project(hidden)
        if not keep:
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

    @torch.inference_mode()
    def _reread(self, texts: list[list[int]]) -> Prefix:
        ids, padding = self._padded(texts)
        return Prefix(_last(self._forward(ids, max(padding) + 1), padding), texts)

    def _padded(self, texts: list[list[int]]) -> tuple[Tensor, list[int]]:
        rows = [torch.tensor(text) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.eot_id)
        return ids.to(self.device), [ids.shape[1] - len(text) for text in texts]


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
    if kinds := getattr(config, "layer_types", None):
        return set(kinds) == {"full_attention"}
    return not getattr(config, "sliding_window", None)
