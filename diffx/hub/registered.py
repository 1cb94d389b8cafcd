"""Our decoders as models of ``transformers``: what an exported run that is neither a Llama nor a DiffLlama loads as."""

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from diffx.hub.attention import CACHE
from diffx.hub.configs import DiffxConfig
from diffx.models import Decoder, build_model


class DiffxForCausalLM(PreTrainedModel, GenerationMixin):
    """Any of our decoders, with ``generate`` and a cache of ``transformers``."""

    config_class = DiffxConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    accepts_loss_kwargs = True  # tells transformers' Trainer that num_items_in_batch is honoured
    _no_split_modules = ["Block"]  # noqa: RUF012  # the type that the base class gives it

    def __init__(self, config: DiffxConfig):
        super().__init__(config)
        self.decoder = build_model(config.decoder_config(), device=torch.get_default_device())
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The output projection; None where it is the embedding."""
        return self.decoder.lm_head

    @can_return_tuple  # takes return_dict
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token. Padding is on the left, as ``generate`` wants it, or on the right.

        The arguments are those of Llama's ``forward``, with the same defaults. There are no other keywords: each is a ``TypeError``.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 at padding, over what is cached and what is new.
            position_ids: (B, T) or (1, T); None counts from the cache's length. Without a mask and a cache, a position that does not
                follow the one before it begins a document, which attends to itself alone.
            cache: keys and values of the S - T tokens before.
            inputs_embeds: (B, T, D), in place of ``input_ids``.
            labels: (B, T), -100 where there is no loss; shifted by one here.
            use_cache: return a cache; None is the config's ``use_cache``, as it is with ``output_hidden_states``.
            logits_to_keep: the last so many tokens' logits alone, 0 is all; or (n,) the tokens whose logits are formed.
            output_hidden_states: return the input of each layer and the normalized output of the last one, each (B, T, D).
            output_attentions: must not be true; ``diffx.hub.attention.observing`` gives the maps.
            num_items_in_batch: targets that the loss is divided by, in place of those in ``labels``: transformers' Trainer gives
                the number in all micro-batches of a step.
            past_key_values: ``cache`` by the name that it has before transformers 5.24.

        Raises:
            ValueError: the cache is no ``DynamicCache``, or given twice; the mask is not (B, S); both or neither of ``input_ids`` and
                ``inputs_embeds`` are given; attention maps are asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given, and not both")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions=True is not supported: diffx.hub.attention.observing gives the attention maps"
            )
        x = (
            self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        )  # (B, T, D)
        cache = _pick_cache(cache, past_key_values)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        output_hidden_states = (
            self.config.output_hidden_states
            if output_hidden_states is None
            else output_hidden_states
        )
        if cache is None and use_cache:
            cache = DynamicCache()
        length = 0 if cache is None else cache.get_seq_length()
        view: Any = None if cache is None else _CacheView(cache)
        if attention_mask is not None:
            if attention_mask.shape != (len(x), length + x.shape[1]):
                wanted, shape = (len(x), length + x.shape[1]), tuple(attention_mask.shape)
                raise ValueError(
                    f"attention_mask has the shape {shape}: it must be {wanted}, of all cached and new tokens"
                )
            if not bool(attention_mask.all()):  # device sync
                view = _CacheView(DynamicCache()) if view is None else view
                view.valid = attention_mask.bool()
        cu_seqlens = None
        if position_ids is None:
            position_ids = torch.arange(length, length + x.shape[1], device=x.device)
        elif attention_mask is None and cache is None:
            cu_seqlens = _document_bounds(position_ids.expand(x.shape[:2]))
        states: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self.decoder.layers if output_hidden_states else ():
                stack.enter_context(
                    layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
                )
            hidden = self.decoder.run_layers(x, position_ids, view, cu_seqlens)
        kept = (
            hidden[:, -logits_to_keep:]
            if isinstance(logits_to_keep, int)
            else hidden[:, logits_to_keep]
        )
        logits = F.linear(kept, self.decoder.output_weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
        fields: dict[str, Any] = {
            "hidden_states": (*states, hidden) if output_hidden_states else None,
            CACHE: cache,
        }
        return CausalLMOutputWithPast(loss=loss, logits=logits, **fields)


def _pick_cache(
    cache: DynamicCache | None, past_key_values: DynamicCache | None
) -> DynamicCache | None:
    """The cache by either name."""
    if cache is not None and past_key_values is not None:
        raise ValueError(
            "cache and past_key_values are two names of one argument: give one of them"
        )
    cache = past_key_values if cache is None else cache
    # A cache of fixed length returns places that are not filled yet, one with a window loses tokens.
    if cache is not None and (not isinstance(cache, DynamicCache) or any(cache.is_sliding)):
        raise ValueError(
            f"cache cannot be a {type(cache).__name__}: it must be a DynamicCache without a window"
        )
    return cache


def _document_bounds(positions: Tensor) -> Tensor | None:
    """``cu_seqlens`` of the documents that positions (B, T) count through; None if each row is one document."""
    starts = (
        F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True).flatten().nonzero().flatten()
    )  # device sync
    return None if len(starts) == len(positions) else F.pad(starts, (0, 1), value=positions.numel())


class _CacheView:
    """A cache of ``transformers`` with the interface of ``diffx.models.KVCache`` that the attention modules use."""

    def __init__(self, cache: DynamicCache):
        self._cache = cache
        self.valid: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)


def to_diffx(model: Decoder) -> DiffxForCausalLM:
    """The decoder itself, in the class that ``transformers`` loads it as after ``import diffx``."""
    fields = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    theirs = DiffxForCausalLM(DiffxConfig(fields))
    theirs.decoder = model
    return theirs
