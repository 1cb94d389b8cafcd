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

    accepts_loss_kwargs = True  # tells transformers' Trainer that num_items_in_batch is honoured

    @can_return_tuple  # takes return_dict
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token. Padding is on the left, as ``generate`` wants it, or on the right.

        There are no other keywords: ``position_ids``, ``inputs_embeds``, ``output_attentions`` and the like are a ``TypeError``.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 0 at padding, over what is cached and what is new.
            cache: keys and values of the S - T tokens before.
            labels: (B, T), -100 where there is no loss; shifted by one here.
            use_cache: return a cache.
            logits_to_keep: the last so many tokens' logits alone, 0 is all; or (n,) the tokens whose logits are formed.
            output_hidden_states: return the input of each layer and the normalized output of the last one, each (B, T, D).
            num_items_in_batch: targets that the loss is divided by, in place of those in ``labels``: transformers' Trainer gives
                the number in all micro-batches of a step.
            past_key_values: ``cache`` by the name that it has before transformers 5.24.

        Raises:
            ValueError: the cache is no ``DynamicCache``, or it is given twice, or the mask is not (B, S).
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, DynamicCache):  # one of fixed length returns places that are not filled yet
            raise ValueError(f"cache cannot be a {type(cache).__name__}: it must be a DynamicCache, which cache_implementation=null gives")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask cannot have the shape {tuple(attention_mask.shape)}: it must be (B, S)")
        if cache is None and (use_cache or (attention_mask is not None and not bool(attention_mask.all()))):
            cache = DynamicCache()
        states: list[Tensor] = []
        with ExitStack() as stack:
            for block in self.decoder.layers if output_hidden_states else ():
                stack.enter_context(block.register_forward_pre_hook(lambda module, args: states.append(args[0])))
            view: Any = None if cache is None else _TheirCache(cache, attention_mask)
            hidden = self.decoder.forward_hidden(input_ids, cache=view)
        kept = hidden[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep]
        logits = F.linear(kept, self.decoder.output_weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        fields: dict[str, Any] = {"hidden_states": (*states, hidden) if output_hidden_states else None, CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **fields)


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
