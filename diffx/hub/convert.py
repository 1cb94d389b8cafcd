"""Conversion of ``transformer`` to and from Llama, and of ``diff_v1`` to and from DiffLlama.

The models compute the same function with another order of rows. A ``Decoder`` rotates features 2i
and 2i+1 of a head, Llama i and i + d/2. Differential head j of a ``Decoder`` has maps 2j and 2j+1;
in DiffLlama it has maps j and j + H/2, and the wide value is split into heads g and g + H_kv/2. So
the second row of each pair is in the second half in ``transformers``. DiffLlama's head norm has no
gain: the gain is multiplied into ``o_proj``.

Notation: H and H_kv the baseline's heads, d = D/H their width, h = H/2 differential heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from diffx.config.model import DiffV1Config, Halve, LambdaScope, ModelConfig, TransformerConfig
from diffx.models import Decoder, build_model


def to_llama(model: Decoder) -> LlamaForCausalLM:
    """Convert a ``transformer`` to a Llama with copied weights.

    Raises:
        ValueError: the model is not a ``transformer``.
    """
    config = model.config
    if config.kind != "transformer":
        raise ValueError(
            f"model={config.kind} cannot be written as a Llama: only model=transformer can"
        )
    state = _reorder(model.state_dict(), config, _halves, pairs=False)
    return _fill_transformers(
        LlamaForCausalLM(LlamaConfig(**_transformers_shape(config))), state, model.output_weight
    )


def from_llama(llama: LlamaForCausalLM) -> Decoder:
    """Convert a Llama to a ``transformer`` with copied weights.

    Raises:
        ValueError: biases, scaled RoPE, another activation, or heads whose widths do not sum to the
            hidden size.
    """
    config = TransformerConfig(**_decoder_shape(llama.config))
    return _fill_decoder(
        config, _reorder(_decoder_state(llama), config, _pairs, pairs=False), llama.dtype
    )


def to_diffllama(model: Decoder) -> DiffLlamaForCausalLM:
    """Convert a ``diff_v1`` to a DiffLlama with copied weights.

    Raises:
        ValueError: the model is not the ``diff_v1`` of the paper; DiffLlama has no options.
    """
    config = model.config
    if not isinstance(config, DiffV1Config):
        raise ValueError(
            f"model={config.kind} cannot be written as a DiffLlama: only model=diff_v1 can"
        )
    for key, needed in (
        ("lambda_init", "depth"),
        ("lambda_scope", LambdaScope.layer),
        ("sublayer_norm", True),
        ("halve", Halve.head_count),
    ):
        value = getattr(config, key)
        if value != needed:
            raise ValueError(
                f"model.{key}={value} cannot be written as a DiffLlama, which always has {needed}"
            )
    state = _reorder(model.state_dict(), config, _halves, pairs=True)
    for name in [name for name in state if name.endswith("sublayer_norm.weight")]:
        gain = state.pop(name)  # (2d,)
        o_proj = name.replace("sublayer_norm", "o_proj")
        state[o_proj] = state[o_proj] * gain.repeat(config.num_heads // 2)
    return _fill_transformers(
        DiffLlamaForCausalLM(DiffLlamaConfig(**_transformers_shape(config))),
        state,
        model.output_weight,
    )


def from_diffllama(llama: DiffLlamaForCausalLM) -> Decoder:
    """Convert a DiffLlama to a ``diff_v1`` without sublayer norm gain, with copied weights.

    Raises:
        ValueError: biases, scaled RoPE, another activation, or heads whose widths do not sum to the
            hidden size.
    """
    config = DiffV1Config(**_decoder_shape(llama.config), sublayer_norm_gain=False)
    return _fill_decoder(
        config, _reorder(_decoder_state(llama), config, _pairs, pairs=True), llama.dtype
    )


def _halves(rows: Tensor, groups: int, unit: int) -> Tensor:
    """Reorder each group, in units of rows, from pairs (0 1, 2 3, …) to halves (0 2 …, 1 3 …)."""
    return rows.unflatten(0, (groups, -1, 2, unit)).transpose(1, 2).flatten(0, 3)


def _pairs(rows: Tensor, groups: int, unit: int) -> Tensor:
    """Undo ``_halves``."""
    return rows.unflatten(0, (groups, 2, -1, unit)).transpose(1, 2).flatten(0, 3)


def _reorder(
    state: dict[str, Tensor],
    config: ModelConfig,
    order: Callable[[Tensor, int, int], Tensor],
    *,
    pairs: bool,
) -> dict[str, Tensor]:
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    reordered = {}
    for name, weight in state.items():
        layer = name.split(".")[-2]
        if layer in heads:  # the features of a head, for RoPE
            weight = order(weight, heads[layer], 1)
        if pairs and layer in ("q_proj", "k_proj", "v_proj"):  # the heads, for the difference
            weight = order(weight, 1, config.head_dim)
        reordered[name] = weight
    return reordered


def _transformers_shape(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _decoder_shape(config: PretrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None) or {
        "rope_theta": config.rope_theta,
        **(config.rope_scaling or {}),
    }
    for key, value, needed in (
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", getattr(config, "mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("head_dim", config.head_dim, config.hidden_size // config.num_attention_heads),
    ):
        if value != needed:
            raise ValueError(
                f"a {config.model_type} with {key}={value} cannot be converted: it must be {needed}"
            )
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "tie_embeddings": config.tie_word_embeddings,
    }


def _decoder_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = {name.removeprefix("model."): weight for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _fill_transformers(model: Any, state: dict[str, Tensor], output_weight: Tensor) -> Any:
    state = {f"model.{name}": weight for name, weight in state.items() if name != "lm_head.weight"}
    model = model.to(output_weight.device, output_weight.dtype)
    model.load_state_dict(state | {"lm_head.weight": output_weight})
    return model.eval()


def _fill_decoder(config: ModelConfig, state: dict[str, Tensor], dtype: torch.dtype) -> Decoder:
    model = build_model(config, device=state["embed_tokens.weight"].device).to(dtype)
    model.load_state_dict(state)
    return model.eval()
