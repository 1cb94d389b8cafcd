"""Conversion of ``transformer`` to and from Llama, and of ``diff_v1`` to and from DiffLlama.

The functions are the same with another order of rows. A ``Decoder`` rotates features 2i and 2i+1 of
a head, Llama i and i + d/2. Differential head j of a ``Decoder`` has maps 2j and 2j+1, that of
DiffLlama j and j + H/2, and its value is heads g and g + H_kv/2. DiffLlama's head norm has no gain:
it is multiplied into ``o_proj``. Notation: H and H_kv heads of the baseline, d = D/H their width.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from diffx.config.model import (
    DiffV1Config,
    Ffn,
    Halve,
    LambdaScope,
    ModelConfig,
    Sign,
    TransformerConfig,
)
from diffx.models import Decoder, build_model

# Fields of a ``ModelConfig`` and of a config of ``transformers``.
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}


def to_llama(model: Decoder) -> LlamaForCausalLM:
    """Convert a ``transformer`` to a Llama with copied weights.

    Raises:
        ValueError: the model is not a ``transformer``.
    """
    config = model.config
    if config.kind != "transformer":
        raise ValueError(f"model={config.kind} cannot be written as a Llama: model=transformer can")
    llama = LlamaForCausalLM(LlamaConfig(**_shape(config)))
    return _fill(llama, model, _reorder(model.state_dict(), config, _halves, pairs=False))


def from_llama(llama: LlamaForCausalLM) -> Decoder:
    """Convert a Llama to a ``transformer`` with copied weights.

    Raises:
        ValueError: biases, scaled RoPE, another activation, or heads of another width than D/H.
    """
    return _decoder(llama, TransformerConfig(**checked_shape(llama.config)), pairs=False)


def to_diffllama(model: Decoder) -> DiffLlamaForCausalLM:
    """Convert a ``diff_v1`` to a DiffLlama with copied weights.

    Raises:
        ValueError: the model is not the ``diff_v1`` of the paper; DiffLlama has no options.
    """
    config = model.config
    if not isinstance(config, DiffV1Config) or config.kind != "diff_v1":
        raise ValueError(f"model={config.kind} cannot be written as a DiffLlama: model=diff_v1 can")
    fixed: dict[str, Any] = {"lambda_init": "depth", "lambda_scope": LambdaScope.layer}
    fixed |= {"sublayer_norm": True, "halve": Halve.head_count}
    fixed |= {"sign": Sign.minus, "sublayer_norm_eps": None}
    for key, needed in fixed.items():
        if (value := getattr(config, key)) != needed:
            raise ValueError(f"model.{key}={value} cannot be in a DiffLlama: it has {needed}")
    state = _reorder(model.state_dict(), config, _halves, pairs=True)
    for name in [name for name in state if name.endswith("sublayer_norm.weight")]:
        gain = state.pop(name)  # (2d,)
        o_proj = name.replace("sublayer_norm", "o_proj")
        state[o_proj] = state[o_proj] * gain.repeat(config.num_heads // 2)
    return _fill(DiffLlamaForCausalLM(DiffLlamaConfig(**_shape(config))), model, state)


def from_diffllama(llama: DiffLlamaForCausalLM) -> Decoder:
    """Convert a DiffLlama to a ``diff_v1`` without sublayer norm gain, with copied weights.

    Raises:
        ValueError: as ``from_llama``.
    """
    config = DiffV1Config(**checked_shape(llama.config), sublayer_norm_gain=False)
    return _decoder(llama, config, pairs=True)


def _halves(rows: Tensor, groups: int, unit: int) -> Tensor:
    """Reorder units of each group of rows from pairs (0 1, 2 3, …) to halves (0 2 …, 1 3 …)."""
    return rows.unflatten(0, (groups, -1, 2, unit)).transpose(1, 2).flatten(0, 3)


def _pairs(rows: Tensor, groups: int, unit: int) -> Tensor:
    """Undo ``_halves``."""
    return rows.unflatten(0, (groups, 2, -1, unit)).transpose(1, 2).flatten(0, 3)


def reorder_features(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Reorder weights for the rotation of features i and i + d/2 to that of a ``Decoder``."""
    return _reorder(state, config, _pairs, pairs=False)


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


def _shape(config: ModelConfig) -> dict[str, Any]:
    if config.ffn is not Ffn.swiglu:
        raise ValueError(f"model.ffn={config.ffn.value} cannot be written for transformers")
    return {name: getattr(config, key) for key, name in NAMES.items()} | {
        "intermediate_size": config.ffn_size,
        "rope_theta": config.rope_theta,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def checked_shape(config: PretrainedConfig, activation: str = "silu") -> dict[str, Any]:
    """Fields of a ``ModelConfig``; ``ValueError`` for biases, scaled RoPE or another activation."""
    rope = getattr(config, "rope_parameters", None)
    rope = rope or {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    for key, value, needed in (
        ("hidden_act", config.hidden_act, activation),
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", getattr(config, "mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
        ("head_dim", config.head_dim, config.hidden_size // config.num_attention_heads),
    ):
        if value != needed:
            raise ValueError(
                f"a {config.model_type} with {key}={value} cannot be converted: it must be {needed}"
            )
    return {key: getattr(config, name) for key, name in NAMES.items()} | {
        "intermediate_size": config.intermediate_size,
        "rope_theta": rope["rope_theta"],
    }


def _fill(target: Any, model: Decoder, state: dict[str, Tensor]) -> Any:
    state = {f"model.{name}": weight for name, weight in state.items() if name != "lm_head.weight"}
    target = target.to(model.output_weight.device, model.output_weight.dtype)
    target.load_state_dict(state | {"lm_head.weight": model.output_weight})
    return target.eval()


def _decoder(source: PreTrainedModel, config: ModelConfig, *, pairs: bool) -> Decoder:
    state = {name.removeprefix("model."): weight for name, weight in source.state_dict().items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    model = build_model(config, device=source.device).to(source.dtype)
    model.load_state_dict(_reorder(state, config, _pairs, pairs=pairs))
    return model.eval()
