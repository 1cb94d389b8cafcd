"""A tiny random model of each family, made from its own config: nothing of these models is ours."""

import pytest
import torch
import transformers as t
from transformers import AutoModel, AutoModelForCausalLM

from diffx.config.dex import DexConfig, Init, Variant
from diffx.dex.attach import attach
from diffx.dex.layout import find_layers

V = 48
ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": V,
}
GROUPED = ROTARY | {"num_key_value_heads": 2}
ENDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
DENSE = {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
WIDE = GROUPED | {"head_dim": 12}  # not 32 / 4
FAMILIES = {
    "llama": lambda: t.LlamaConfig(**GROUPED, attention_bias=True),
    "qwen2": lambda: t.Qwen2Config(**GROUPED),
    "qwen3": lambda: t.Qwen3Config(**WIDE),
    "mistral": lambda: t.MistralConfig(**WIDE, sliding_window=4),
    "gemma": lambda: t.GemmaConfig(**WIDE),
    "gemma2": lambda: t.Gemma2Config(**WIDE, sliding_window=4),
    "gemma3": lambda: t.Gemma3TextConfig(**WIDE, sliding_window=4),
    "phi": lambda: t.PhiConfig(**ROTARY),
    "phi3": lambda: t.Phi3Config(**GROUPED, **ENDS),
    "gpt2": lambda: t.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=V, **ENDS
    ),
    "gpt_neox": lambda: t.GPTNeoXConfig(**ROTARY),
    "opt": lambda: t.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=V,
        word_embed_proj_dim=32,
        pad_token_id=0,
    ),
    "olmo2": lambda: t.Olmo2Config(**GROUPED, **ENDS),
    "starcoder2": lambda: t.Starcoder2Config(**GROUPED),
    "stablelm": lambda: t.StableLmConfig(**GROUPED),
    "gpt_bigcode": lambda: t.GPTBigCodeConfig(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=V, **ENDS
    ),
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **ROTARY,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        **DENSE,
    ),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **WIDE,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        experts_implementation="eager",
    ),
}
OTHERS = {
    "bert": lambda: t.BertConfig(**ROTARY),
    "vit": lambda: t.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    ),
}
IDS = torch.randint(1, V, (2, 12), generator=torch.Generator().manual_seed(5))


QUICK = (
    "llama",
    "phi3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "opt",
    "deepseek_v3",
    "qwen3_moe",
)  # one of each kind; the others are slow


@pytest.fixture(
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ]
)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def make_model():
    """Make a model of a family; its biases and gains are random, so that each has an effect."""

    def make(family, **changes):
        config = {**FAMILIES, **OTHERS}[family]()
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        model = (AutoModelForCausalLM if family in FAMILIES else AutoModel).from_config(config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def inputs_of():
    """Give what a model reads."""

    def inputs(model):
        if model.config.model_type == "vit":
            return {
                "pixel_values": torch.randn(
                    2, 3, 16, 16, generator=torch.Generator().manual_seed(7)
                ).to(model.dtype)
            }
        return {"input_ids": IDS}

    return inputs


@pytest.fixture(scope="session")
def read(inputs_of):
    """Give a causal model's logits, another's last states."""

    @torch.no_grad()
    def read(model):
        output = model(**inputs_of(model))
        return output.logits if "logits" in output else output.last_hidden_state

    return read


@pytest.fixture(scope="session")
def put(inputs_of):
    """Put a variant into a model: ``put(model, "dex", heads=[[0, 2]] * 2, init="linear")``."""

    def put(model, variant="dex", heads=None, anneal_steps=8, seed=0, **options):
        layers = find_layers(model, inputs_of(model))
        if heads is None:
            heads = [[1, layer.num_heads - 1] for layer in layers]
        config = DexConfig(variant=Variant(variant), **({"init": Init.linear} | options))
        return attach(model, layers, config, heads, anneal_steps, seed)

    return put


@pytest.fixture(scope="session")
def shake():
    """Change the values of all trained parameters, so that none keeps its initial value."""

    @torch.no_grad()
    def shake(adapted, size=0.1):
        generator = torch.Generator().manual_seed(3)
        for parameter in adapted.trained().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))

    return shake
