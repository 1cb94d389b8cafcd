import pytest
import torch
import transformers
from torch import nn

from diffx.config import UserError
from diffx.config.model import MODEL_CONFIGS, LambdaForm, LambdaScope, Pairing, Sign, Sink
from diffx.hub.attention import observing, quantizing_logits
from diffx.hub.convert import to_diffllama
from diffx.models import build_model, init_weights
from diffx.models.attention import Attention
from diffx.ops import QuantizedLogits, attention, differential_attention

B, T, D = 2, 13, 64
VOCAB = 50


def ours(kind, num_kv_heads=4, **options):
    torch.manual_seed(0)
    config = MODEL_CONFIGS[kind](
        vocab_size=VOCAB,
        hidden_size=D,
        num_layers=2,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        intermediate_size=48,
        **options,
    )
    model = build_model(config)
    init_weights(model, seed=0)
    for parameter in model.parameters():  # no parameter at a value that hides a mistake
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tokens():
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def look(model, ids):
    views, states = {}, {}
    with observing(model, views.__setitem__, states.__setitem__):
        logits = model(ids)
    return views, states, getattr(logits, "logits", logits)


def maps(view):
    """All head maps, put together from uneven blocks of rows: (B, heads, T, T)."""
    blocks = [
        torch.cat([view.head_map(j, a, b) for a, b in ((0, 1), (1, 6), (6, T))], dim=1)
        for j in range(view.num_heads)
    ]
    return torch.stack(blocks, dim=1)


OPTIONS = {
    **{kind: (kind, {}) for kind in MODEL_CONFIGS},
    "plus": ("diff_v1", {"sign": Sign.plus}),
    "diff_gda of 2": ("diff_gda", {"ratio": 2}),
    "diff_v2 of 2": ("diff_v2", {"ratio": 2, "lambda_form": LambdaForm.linear}),
    "sinks of zero": ("transformer_sink", {"sink": Sink.zero}),
}


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_maps_of_our_models_weigh_values_as_the_reference_does(name, num_kv_heads):
    """What ``o_proj`` or the norm before it reads, and what the views say of it."""
    kind, options = OPTIONS[name]
    model, ids = ours(kind, num_kv_heads, **options), tokens()
    inputs = {}
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(
                lambda module, args: inputs.__setitem__(module.layer, (module, args[:3]))
            )
    views, _, _ = look(model, ids)
    assert sorted(views) == [0, 1]
    for layer, (module, (x, cos, sin)) in inputs.items():
        q, k, v = module.project(x, cos, sin)
        view = views[layer]
        if kind.startswith("diff"):
            expected = differential_attention(
                q, k, v, module.lambda_value(x), ratio=view.ratio, impl="reference"
            )
            assert (options.get("sign") is Sign.plus) == bool((view.lam < 0).all())
        else:
            expected = attention(q, k, v, sinks=view.sinks, impl="reference")  # (B, T, M, dv)
        values = v.repeat_interleave(view.num_heads // v.shape[2], dim=2)
        torch.testing.assert_close(
            torch.einsum("bhqk,bkhd->bqhd", maps(view), values), expected, rtol=1e-4, atol=1e-5
        )


def test_lambda_for_each_head_reaches_its_head():
    view = look(ours("diff_v1", lambda_scope=LambdaScope.head), tokens())[0][0]
    assert view.lam.shape == (4,)
    torch.testing.assert_close(
        maps(view).sum(-1), (1 - view.lam)[None, :, None].expand(B, 4, T), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("ratio", [1, 2])
@torch.no_grad()
def test_heads_across_key_heads_are_shown_with_the_maps_that_they_subtract(ratio):
    model = ours("diff_v2", 4, pairing=Pairing.across, ratio=ratio)
    module, inputs = model.layers[0].self_attn, []
    module.register_forward_pre_hook(lambda module, args: inputs.extend(args[:3]))
    view = look(model, tokens())[0][0]
    q, k, _ = module.project(*inputs)
    k = k.repeat_interleave(q.shape[2] // 4, 2)
    future = torch.ones(T, T).triu(1).bool()
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    plain = logits.masked_fill(future, -torch.inf).softmax(-1)
    lam = module.lambda_value(inputs[0]).transpose(1, 2)[..., None]
    expected = plain[:, :8] - lam * plain[:, 8:].repeat_interleave(ratio, 1)
    torch.testing.assert_close(maps(view), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_scaled_and_causal():
    view = look(ours("transformer", 2), tokens())[0][1]
    logits = view.logits(3, 2, 7)  # of 8 query heads on 2 key heads
    assert logits.shape == (B, 5, T) and logits.dtype == torch.float32
    expected = torch.einsum("bqd,bkd->bqk", view.q[:, 2:7, 3], view.k[:, :, 0]) / 8**0.5
    seen = torch.arange(T) <= torch.arange(2, 7)[:, None]
    torch.testing.assert_close(logits[:, seen], expected[:, seen])
    assert torch.isneginf(logits[:, ~seen]).all()


SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
GQA = SHAPE | {"num_key_value_heads": 2}
THEIRS = {
    "llama": lambda: transformers.LlamaConfig(**GQA),
    "qwen2": lambda: transformers.Qwen2Config(**GQA),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SHAPE),
    "mistral, a window of 4": lambda: transformers.MistralConfig(**GQA, sliding_window=4),
    "gemma2, softcap and windows": lambda: transformers.Gemma2Config(
        **GQA, head_dim=16, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=7
    ),
    "mixtral, experts": lambda: transformers.MixtralConfig(
        **GQA, num_local_experts=2, num_experts_per_tok=1
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=D,
    ),
    "gemma3, windows": lambda: transformers.Gemma3TextConfig(**GQA, head_dim=16, sliding_window=4),
}


def theirs(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_maps_and_states_of_transformers_are_those_it_reports(name):
    model, ids = theirs(THEIRS[name]()), tokens()
    before = model.config._attn_implementation
    views, states, logits = look(model, ids)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    expected = model(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert sorted(views) == sorted(states) == [0, 1, 2]
    for layer, attentions in enumerate(expected.attentions):
        torch.testing.assert_close(maps(views[layer]), attentions, rtol=1e-5, atol=1e-5)
    for layer in (0, 1):  # the last one reported is behind the final norm
        torch.testing.assert_close(
            states[layer], expected.hidden_states[layer + 1], rtol=1e-4, atol=1e-4
        )
    assert states[2].shape == (B, T, D)


@torch.no_grad()
def test_states_of_our_models_lead_to_the_logits():
    model, ids = ours("diff_v1"), tokens()
    _, states, logits = look(model, ids)
    torch.testing.assert_close(model.norm(states[1]) @ model.output_weight.T, logits)
    assert not torch.equal(states[0], states[1])


def test_an_exported_diff_shows_the_same_maps_as_ours():
    model, ids = ours("diff_v1", 2, sublayer_norm_gain=False), tokens()
    mine, exported = look(model, ids), look(to_diffllama(model), ids)
    torch.testing.assert_close(exported[2], mine[2], rtol=1e-4, atol=1e-4)
    for layer in (0, 1):
        assert exported[0][layer].num_heads == 4 and exported[0][layer].num_maps == 8
        torch.testing.assert_close(
            maps(exported[0][layer]), maps(mine[0][layer]), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(exported[1][layer], mine[1][layer], rtol=1e-4, atol=1e-4)


def test_one_call_a_layer_and_pass_and_none_after_it():
    for model in (ours("diff_v1"), to_diffllama(ours("diff_v1")), theirs(THEIRS["llama"]())):
        calls = []

        def add(layer, _, calls=calls):
            calls.append(layer)

        with torch.no_grad():
            with observing(model, add, add):
                model(tokens())
                model(tokens())
            first = sorted(calls)
            model(tokens())
        layers = len(set(first))
        assert first == sorted(list(range(layers)) * 4) and len(calls) == len(first)


def test_an_error_leaves_the_model_as_it_was():
    for model in (ours("transformer"), theirs(THEIRS["llama"]())):
        before = getattr(model.config, "_attn_implementation", None)

        def fail(layer, seen):
            raise KeyError("stop")

        for kinds in ({"attention": fail}, {"hidden": fail}):
            with pytest.raises(KeyError), observing(model, **kinds):
                model(tokens())
        assert getattr(model.config, "_attn_implementation", None) == before
        model(tokens())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=D, n_layer=2, n_head=4),
            "BloomForCausalLM",
        ),
        (
            lambda: transformers.GptOssConfig(
                **GQA, head_dim=16, num_local_experts=2, num_experts_per_tok=1
            ),
            "GptOssForCausalLM",
        ),
    ],
)
def test_attention_that_cannot_be_seen_is_refused(config, named):
    model = theirs(config())
    with pytest.raises(UserError, match=named), observing(model, lambda layer, view: None):
        model(tokens())
    model(tokens())


def test_a_model_of_neither_kind_is_refused():
    for kinds in ({"attention": print}, {"hidden": print}):
        with pytest.raises(UserError, match="Linear"), observing(nn.Linear(2, 2), **kinds):
            pass


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("s_aux", torch.zeros(4)), ("cu_seq_lens_q", torch.tensor([0, 13, 26])), ("unheard_of", 0.5)],
)
@pytest.mark.parametrize(
    "look_on",
    [
        lambda model: observing(model, print),
        lambda model: quantizing_logits(model, QuantizedLogits(8)),
    ],
)
def test_a_keyword_of_attention_that_is_not_known_is_refused_by_name(keyword, value, look_on):
    model = theirs(THEIRS["llama"]())
    with (
        torch.no_grad(),
        pytest.raises(UserError, match=f"{keyword} to its attention"),
        look_on(model),
    ):
        model(tokens(), **{keyword: value})  # Llama passes on what it does not know


def test_quantized_attention_without_dropout_alone():
    config = transformers.LlamaConfig(**GQA, attention_dropout=0.5)
    model, quantized = theirs(config), QuantizedLogits(8)
    with torch.no_grad(), quantizing_logits(model, quantized):
        model(tokens())
        with pytest.raises(UserError, match="dropout"):
            model.train()(tokens())
