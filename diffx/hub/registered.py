"""A decoder as a model of ``transformers``, for a run that is neither Llama nor DiffLlama."""

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
    """A ``Decoder`` with ``generate`` and a cache of ``transformers``."""

    config_class: Any = DiffxConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    accepts_loss_kwargs = True  # Trainer gives num_items_in_batch
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
        """The output projection; None where it is tied to the embedding."""
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
        """Compute the logits of the next token; the arguments are those of Llama's ``forward``.

        Any other keyword is a ``TypeError``. ``attention_mask`` (B, S) is of all cached and new
        tokens, 0 at padding on either side. Without it and a cache, a position of ``position_ids``
        (B or 1, T) that does not follow the one before it begins a document. Hidden states are the
        input of each layer and the normalized output of the last one, (B, T, D) each.
        ``output_attentions`` must not be true: ``diffx.hub.attention.observing`` gives the maps.
        ``past_key_values`` is the name of ``cache`` before transformers 5.24.

        Raises:
            ValueError: an argument cannot be used, such as a cache that is no ``DynamicCache``.
        """
        config, decoder = self.config, self.decoder
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given, and not both")
        if config.output_attentions if output_attentions is None else output_attentions:
            instead = "diffx.hub.attention.observing gives maps"
            raise ValueError(f"output_attentions=True is not supported: {instead}")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        x = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        cache = _pick_cache(cache, past_key_values)
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        length = 0 if cache is None else cache.get_seq_length()
        view: Any = None if cache is None else _CacheView(cache)
        if attention_mask is not None:
            shape, needed = tuple(attention_mask.shape), (len(x), length + x.shape[1])
            if shape != needed:
                raise ValueError(f"attention_mask has the shape {shape}: it must be {needed}")
            if not bool(attention_mask.all()):  # device sync
                view = view or _CacheView(DynamicCache())
                view.valid = attention_mask.bool()
        cu_seqlens = None
        if position_ids is None:
            position_ids = torch.arange(length, length + x.shape[1], device=x.device)
        elif attention_mask is None and cache is None:
            cu_seqlens = _document_bounds(position_ids.expand(x.shape[:2]))
        states: list[Tensor] = []
        with ExitStack() as stack:
            for layer in decoder.layers if output_hidden_states else ():
                hook = layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
                stack.enter_context(hook)
            hidden = decoder.run_layers(x, position_ids, view, cu_seqlens)
        last = isinstance(logits_to_keep, int)
        kept = hidden[:, -logits_to_keep:] if last else hidden[:, logits_to_keep]
        logits = F.linear(kept, decoder.output_weight)
        fields: dict[str, Any] = {CACHE: cache}
        if output_hidden_states:
            fields["hidden_states"] = (*states, hidden)
        if labels is not None:
            sizes = {"vocab_size": config.vocab_size, "num_items_in_batch": num_items_in_batch}
            fields["loss"] = self.loss_function(logits=logits, labels=labels, **sizes)
        return CausalLMOutputWithPast(logits=logits, **fields)


def _pick_cache(cache: DynamicCache | None, older_name: DynamicCache | None) -> DynamicCache | None:
    if cache is not None and older_name is not None:
        raise ValueError("cache and past_key_values are two names of one argument: give one")
    cache = older_name if cache is None else cache
    # A fixed cache returns positions that are not filled yet; one with a window loses tokens.
    if cache is not None and (not isinstance(cache, DynamicCache) or any(cache.is_sliding)):
        raise ValueError(
            f"cache cannot be a {type(cache).__name__}: it must be a DynamicCache without a window"
        )
    return cache


def _document_bounds(positions: Tensor) -> Tensor | None:
    """``cu_seqlens`` of the documents in rows of positions (B, T); None if each row is one."""
    first = F.pad(positions.diff(dim=-1) != 1, (1, 0), value=True)
    starts = first.flatten().nonzero().flatten()  # device sync
    return None if len(starts) == len(positions) else F.pad(starts, (0, 1), value=positions.numel())


class _CacheView:
    """A cache of ``transformers`` with the interface of ``diffx.models.KVCache``."""

    def __init__(self, cache: DynamicCache):
        self._cache = cache
        self.valid: Tensor | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)


def to_diffx(model: Decoder) -> DiffxForCausalLM:
    """Wrap a decoder, which is not copied."""
    fields = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    wrapped = DiffxForCausalLM(DiffxConfig(fields))
    wrapped.decoder = model
    return wrapped
