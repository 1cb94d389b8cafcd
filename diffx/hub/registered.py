"""Our decoders as models of ``transformers``: what an exported run that is neither a Llama nor a DiffLlama loads as."""

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from diffx.hub.configs import DiffxConfig
from diffx.models import Decoder, build_model


class DiffxForCausalLM(PreTrainedModel, GenerationMixin):
    """Any of our decoders, with ``generate`` and a cache of ``transformers``."""

    config_class = DiffxConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
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

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token; padding stands on the left, as ``generate`` wants it, or on the right.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 at padding, over what is cached and what is new.
            past_key_values: the cache.
            use_cache: give one back.
            labels: (B, T), -100 where there is no loss; shifted by one here.
            logits_to_keep: the last so many tokens' logits alone; 0 is all.
        """
        if past_key_values is None and (use_cache or (attention_mask is not None and not bool(attention_mask.all()))):
            past_key_values = DynamicCache()
        cache: Any = None if past_key_values is None else _TheirCache(past_key_values, attention_mask)
        hidden = self.decoder.forward_hidden(input_ids, cache=cache)
        logits = F.linear(hidden[:, -logits_to_keep:], self.decoder.output_weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


class _TheirCache:
    """A cache of ``transformers`` as our attention modules use one (``diffx.models.KVCache``)."""

    positions = None

    def __init__(self, theirs: DynamicCache, attention_mask: Tensor | None):
        self._theirs = theirs
        self.length = theirs.get_seq_length()
        self.valid = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._theirs.update(k.transpose(1, 2), v.transpose(1, 2), layer)
        return k.transpose(1, 2), v.transpose(1, 2)

    def advance(self, tokens: int) -> None:
        self.length += tokens


def to_registered(model: Decoder, max_position_embeddings: int | None = None) -> DiffxForCausalLM:
    """The decoder itself, in the class that ``transformers`` loads it as after ``import diffx``."""
    fields = {key: getattr(value, "value", value) for key, value in asdict(model.config).items()}
    theirs = DiffxForCausalLM(DiffxConfig(fields, max_position_embeddings=max_position_embeddings))
    theirs.decoder = model
    return theirs
