"""The decoder as a whole, for every architecture."""

import math
from itertools import pairwise
from operator import mul

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffx.config.model import (
    MODEL_CONFIGS,
    DiffGDAConfig,
    DiffV1Config,
    DiffV2Config,
    Ffn,
    Gate,
    Halve,
    LambdaForm,
    LambdaScope,
    Pairing,
    Sign,
    Sink,
    TransformerConfig,
    TransformerGatedConfig,
    TransformerSinkConfig,
    TransformerWideHeadConfig,
)
from diffx.models import KVCache, build_model, decoder, init_weights
from diffx.models.layers import apply_rope, rope_tables

SHAPE = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 50,
    "init_std": 0.15,
}
VARIANTS = {
    **{kind: cls(**SHAPE) for kind, cls in MODEL_CONFIGS.items()},
    "wide_head_norm": TransformerWideHeadConfig(**SHAPE, sublayer_norm=True),
    "diff_v1_head_dim": DiffV1Config(**SHAPE, halve=Halve.head_dim),
    "diff_v1_lambda_per_head": DiffV1Config(
        **SHAPE, lambda_scope=LambdaScope.head, lambda_init=0.5
    ),
    "diff_v1_no_norm": DiffV1Config(**SHAPE, sublayer_norm=False),
    "diff_v1_no_gain": DiffV1Config(**SHAPE, sublayer_norm_gain=False),
    "diff_v1_plus": DiffV1Config(**SHAPE, sign=Sign.plus, lambda_init="depth-1"),
    "diff_v1_polynorm": DiffV1Config(**SHAPE, ffn=Ffn.polynorm, sublayer_norm_eps=1e-3),
    "diff_gda_lambda_per_head": DiffGDAConfig(**SHAPE, ratio=2, lambda_scope=LambdaScope.head),
    "diff_gda_head_dim": DiffGDAConfig(**SHAPE, ratio=2, halve=Halve.head_dim),
    "diff_v2_ratio": DiffV2Config(**SHAPE, ratio=2, lambda_form=LambdaForm.linear),
    "diff_v2_one": DiffV2Config(**SHAPE, lambda_form=LambdaForm.one),
    "diff_v2_across": DiffV2Config(**SHAPE, pairing=Pairing.across),
    "diff_v2_across_ratio": DiffV2Config(**SHAPE, pairing=Pairing.across, ratio=2),
    "gated_element": TransformerGatedConfig(**SHAPE, gate=Gate.element),
    "sink_zero": TransformerSinkConfig(**SHAPE, sink=Sink.zero),
    "untied": TransformerConfig(**SHAPE, tie_embeddings=False),
}
pytestmark = pytest.mark.filterwarnings(
    "error:Mismatch dtype"
)  # of a norm's input and gain, which takes it off its fused kernel
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def make(config, dtype=torch.float64, seed=0):
    model = build_model(config)
    init_weights(model, seed)
    return model.to(dtype)


def tokens(*shape):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(7))


@each_variant
def test_trains(config):
    model = make(config, torch.float32)
    logits = model(tokens(2, 12))
    assert logits.shape == (2, 12, 50)
    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


@each_variant
def test_is_causal(config):
    model, ids = make(config), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 7], after[:, 7], atol=1e-3)


@each_variant
def test_cache_equals_full_forward(config):
    """A prompt, single tokens, then a chunk of several against what is cached."""
    model, ids = make(config), tokens(2, 20)
    cache = KVCache(config, 2, 20, dtype=torch.float64)
    with torch.no_grad():
        parts = [
            model(ids[:, start:end], cache=cache) for start, end in pairwise([0, 9, 10, 11, 16, 20])
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-10, atol=1e-10)
        assert cache.length == 20
        with pytest.raises(ValueError, match="20 tokens cannot hold 21"):
            model(ids[:, :1], cache=cache)


@each_variant
def test_documents_do_not_see_each_other(config):
    model, ids = make(config), tokens(2, 15)
    bounds = [0, 4, 5, 15, 22, 30]
    with torch.no_grad():
        packed = model(ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)).flatten(0, 1)
        alone = [model(ids.flatten()[None, start:end])[0] for start, end in pairwise(bounds)]
        # the same angles between tokens, out of other fp32 tables: RoPE is relative
        torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)
        assert not torch.allclose(packed, model(ids).flatten(0, 1), atol=1e-3)


def test_document_boundaries_are_checked():
    model, ids = make(VARIANTS["diff_v1"]), tokens(2, 4)
    for bounds in ([0, 8], [0, 4], [1, 4, 8], [0, 4, 4, 8], [0, 5, 4, 8]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            model(ids, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="cannot be used together"):
        model(ids, cu_seqlens=torch.tensor([0, 4, 8]), cache=KVCache(model.config, 2, 4))


def test_parameter_counts():
    def rest(kind, **options):
        return build_model(MODEL_CONFIGS[kind](**SHAPE, **options), device="meta").num_parameters()[
            "rest"
        ]

    layers, width, heads, d = SHAPE["num_layers"], SHAPE["hidden_size"], SHAPE["num_heads"], 8
    baseline = rest("transformer")
    projections = 2 * width * width + 2 * width * SHAPE["num_kv_heads"] * d
    assert (
        baseline
        == layers * (projections + 3 * width * SHAPE["intermediate_size"] + 2 * width) + width
    )
    assert rest("transformer_wide_head") == baseline
    assert rest("transformer_wide_head", sublayer_norm=True) == baseline + layers * 2 * d
    assert rest("transformer_1p5h") == baseline + layers * width**2
    assert rest("diff_v1") == baseline + layers * 6 * d
    assert rest("diff_v1", sublayer_norm_gain=False) == baseline + layers * 4 * d
    assert rest("diff_v1", lambda_scope=LambdaScope.head) == baseline + layers * (
        4 * d * heads // 2 + 2 * d
    )
    assert rest("diff_v1", halve=Halve.head_dim) == baseline + layers * (4 * d // 2 + d)
    assert rest("diff_v2") == baseline + layers * (width**2 + width * heads)
    assert rest("diff_v2", lambda_form=LambdaForm.one) == baseline + layers * width**2
    assert rest("diff_v2", ratio=2) == baseline + layers * (width**2 // 2 + width * heads)
    assert rest("transformer_gated") == baseline + layers * width * heads
    assert rest("transformer_gated", gate=Gate.element) == baseline + layers * width**2
    assert rest("transformer_sink") == baseline + layers * heads
    assert rest("transformer_sink", sink=Sink.zero) == baseline
    assert rest("diff_gda", ratio=1) == rest("diff_v1")
    assert rest("transformer", ffn=Ffn.polynorm) == baseline + layers * 4


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ratio", "noise_maps"),
    [(8, 4, 1, 4), (8, 4, 3, 2), (16, 4, 3, 4), (32, 4, 4, 4), (32, 8, 2, 8), (40, 2, 4, 6)],
)
def test_parameters_of_gda_are_the_nearest_to_the_baselines(heads, kv_heads, ratio, noise_maps):
    shape = SHAPE | {"hidden_size": 8 * heads, "num_heads": heads, "num_kv_heads": kv_heads}

    def rest(cls, **options):
        model = build_model(cls(**shape, **options), device="meta")
        return model.num_parameters()["rest"]

    config = DiffGDAConfig(**shape, ratio=ratio)
    assert config.noise_maps == noise_maps
    attn = build_model(config, device="meta").layers[0].self_attn
    assert attn.queries == (noise_maps * (ratio + 1), 8)
    assert attn.o_proj.in_features == noise_maps * ratio * 16
    baseline, count = rest(TransformerConfig), rest(DiffGDAConfig, ratio=ratio)
    step = SHAPE["num_layers"] * 8 * heads * 8 * (3 * ratio + 1)  # of a noise map and its signals
    extra = SHAPE["num_layers"] * 6 * 8
    assert abs(count - extra - baseline) <= step * (kv_heads // 2) / 2


@pytest.mark.parametrize(
    ("width", "layers", "diff_heads", "ffn", "billions"),
    [
        (1536, 24, 8, None, 0.83),
        (2048, 24, 8, None, 1.41),
        (2560, 32, 10, None, 2.77),
        (4096, 32, 16, None, 6.85),
        (5120, 40, 20, None, 13.1),
        (3072, 28, 12, 8192, 3.48),
    ],
)
def test_published_sizes(width, layers, diff_heads, ffn, billions):
    """The published shapes on the meta device.

    The published counts take a feed-forward width of 8/3·D, which we round up to be whole.
    """
    heads = 2 * diff_heads
    config = DiffV1Config(
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        intermediate_size=ffn,
        vocab_size=100288,
    )
    with torch.device("meta"):
        model = build_model(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    count = model.num_parameters()
    assert (
        count["embedding"] == 100288 * width
        and count["embedding"] + count["rest"] == count["total"]
    )
    rounding = layers * 3 * width * (config.ffn_size - (ffn or 8 * width / 3))
    assert 0 <= rounding < 0.02 * count["total"]
    assert round((count["total"] - rounding) / 1e9, 1 if billions > 10 else 2) == billions


def test_tied_embeddings_are_held_once():
    tied, untied = build_model(VARIANTS["transformer"]), build_model(VARIANTS["untied"])
    assert "lm_head.weight" not in tied.state_dict() and "lm_head.weight" in untied.state_dict()
    assert (
        tied.output_weight is tied.embed_tokens.weight
        and untied.output_weight is untied.lm_head.weight
    )
    assert (
        untied.num_parameters()["embedding"]
        == 2 * tied.num_parameters()["embedding"]
        == 2 * 50 * 64
    )
    assert untied.num_parameters()["rest"] == tied.num_parameters()["rest"]


def test_vocabulary_must_be_known():
    with pytest.raises(ValueError, match="vocab_size is not set"):
        build_model(TransformerConfig())


@pytest.mark.parametrize(
    ("kind", "attention"),  # multiply-adds of a layer for each query-key pair, in units of D
    [
        ("transformer", 2),
        ("transformer_wide_head", 2),
        ("transformer_1p5h", 3),
        ("transformer_gated", 2),
        ("transformer_sink", 2),
        ("diff_v1", 3),
        ("diff_gda", 3),  # 2 noise and 6 signal maps of d, with values of 2d
        ("diff_v2", 4),
    ],
)
def test_flops(kind, attention):
    model = build_model(MODEL_CONFIGS[kind](**SHAPE), device="meta")
    counted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.endswith("proj.weight") or name.startswith("embed")
    )
    expected = 6 * counted + 6 * SHAPE["num_layers"] * attention * 64 * 128 / 2
    assert model.flops_per_token(128) == expected


@pytest.mark.parametrize("scope", LambdaScope)
@pytest.mark.parametrize("lambda_init", ["depth", 0.5])
def test_lambda_of_v1(scope, lambda_init):
    model = make(DiffV1Config(**SHAPE, lambda_scope=scope, lambda_init=lambda_init), torch.float32)
    published = [0.2, 0.3555]  # of the first two layers
    for layer, block in enumerate(model.layers):
        attn = block.self_attn
        start = published[layer] if lambda_init == "depth" else 0.5
        vectors = [
            getattr(attn, f"lambda_{name}").detach().reshape(-1, 8).tolist()
            for name in ("q1", "k1", "q2", "k2")
        ]
        expected = [
            math.exp(sum(map(mul, q1, k1))) - math.exp(sum(map(mul, q2, k2))) + start
            for q1, k1, q2, k2 in zip(*vectors, strict=True)
        ]
        value = attn.lambda_value()
        assert (
            value.shape == ((4,) if scope is LambdaScope.head else ())
            and value.dtype == torch.float32
        )
        torch.testing.assert_close(value.reshape(-1), torch.tensor(expected), rtol=0, atol=5e-5)
        assert abs(value - start).max() > 1e-4  # the vectors count


def test_lambda_of_v2():
    attn = make(VARIANTS["diff_v2"]).layers[0].self_attn
    x = torch.randn(2, 3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = attn.lambda_value(x)
    assert value.shape == (2, 3, 8)
    expected = 1 / (1 + math.exp(-float(x[1, 2] @ attn.lambda_proj.weight[5].detach())))
    assert value[1, 2, 5].item() == pytest.approx(expected, rel=1e-12)


def test_lambda_stays_in_fp32():
    model = make(VARIANTS["diff_v1"], torch.float32)
    attn = model.layers[1].self_attn
    vector, value = attn.lambda_q1.detach().clone(), attn.lambda_value()
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(attn.lambda_value(), value) and attn.lambda_value().dtype == torch.float32
        )
        logits = model(tokens(1, 8))
    assert logits.dtype == torch.bfloat16
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        cast()
        assert attn.lambda_q1.dtype == torch.float32 and torch.equal(attn.lambda_q1, vector)
        assert attn.q_proj.weight.dtype != torch.float32
    assert torch.equal(attn.lambda_value(), value)
    assert model(tokens(1, 8)).dtype == torch.bfloat16
    assert model.to("meta").layers[1].self_attn.lambda_q1.device.type == "meta"


@pytest.mark.parametrize("kind", ["transformer", "diff_v1", "diff_v2"])
def test_autocast_is_close_to_fp32(kind):
    model, ids = make(VARIANTS[kind], torch.float32), tokens(2, 70)
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(ids)
        rounded.float().square().sum().backward()
    assert (rounded.float() - exact).norm() < 2e-2 * exact.norm()


def test_rope_has_one_meaning(monkeypatch):
    """The form that compiles, the eager one, and the rotation of one pair written out."""
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(torch.arange(2, 7), 8, 100.0)
    eager = apply_rope(x, cos, sin)
    angle = 6 * 100 ** (-4 / 8)  # position 2 + 4, pair 2
    even, odd = x[1, 4, 2, 4].item(), x[1, 4, 2, 5].item()
    assert eager[1, 4, 2, 4].item() == pytest.approx(
        even * math.cos(angle) - odd * math.sin(angle), abs=1e-6
    )
    assert eager[1, 4, 2, 5].item() == pytest.approx(
        even * math.sin(angle) + odd * math.cos(angle), abs=1e-6
    )
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, cos, sin), eager, rtol=1e-12, atol=1e-12)
    assert apply_rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(VARIANTS))
def test_cache_of_rows_that_differ_in_length(kind):
    """Padded rows, chosen rows and what is appended to them give what each row gives alone."""
    model = make(VARIANTS[kind])
    config, ids = model.config, tokens(3, 20)
    with torch.no_grad():
        cache = KVCache(config, 3, 9, dtype=torch.float64)
        model(ids[:, :9], cache=cache)
        cache.drop_padding([0, 4, 2])
        chosen = [2, 1, 1]
        cache = cache.select(torch.tensor(chosen), free=7)
        more = ids[[0, 1, 2], 9:13]
        first = model(more, cache=cache)
        cache.drop_padding([0, 1, 3])
        second = model(ids[[0, 1, 2], 13:16], cache=cache)
        for row, (source, kept, drop) in enumerate(zip(chosen, [7, 5, 5], [0, 1, 3], strict=True)):
            alone = torch.cat([ids[source, :kept], more[row, : 4 - drop], ids[row, 13:16]])[None]
            expected = model(alone)[0]
            torch.testing.assert_close(
                first[row, : 4 - drop], expected[kept : kept + 4 - drop], rtol=1e-9, atol=1e-10
            )
            torch.testing.assert_close(second[row], expected[-3:], rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["diff_v1", "diff_v2"])
def test_compiles(kind):
    model, ids = make(VARIANTS[kind], torch.float32), tokens(2, 16)
    eager = model(ids)
    model.layers[0].compile(fullgraph=True)  # one: the compiler of C++ takes half a minute
    compiled = model(ids)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    compiled.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_loss_in_chunks_is_the_loss(tied, monkeypatch):
    config = MODEL_CONFIGS["diff_v1"](**SHAPE, tie_embeddings=tied)
    model = build_model(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(50, (2, 2, 11), generator=generator)
    targets[0, :4] = -100
    expected = F.cross_entropy(
        model(ids).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    gradients, whole = torch.autograd.grad(expected, list(model.parameters())), decoder._loss
    for rows, chunks in ((22, 1), (21, 2), (5, 5), (1, 22)):
        monkeypatch.setattr(decoder, "LOGITS", 50 * rows)
        calls = []
        monkeypatch.setattr(
            decoder,
            "_loss",
            lambda *args, whole=whole, calls=calls: (calls.append(1), whole(*args))[1],
        )
        loss = model(ids, targets=targets)
        assert len(calls) == chunks  # backward calls them again
        torch.testing.assert_close(loss, expected)
        for one, other in zip(
            torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=5e-6)


def test_a_loss_holds_no_more_logits_than_a_chunk(monkeypatch):
    """Of 1,000 tokens and 4,000 entries, in chunks of 50 tokens; forward and backward."""
    model = build_model(MODEL_CONFIGS["transformer"](**{**SHAPE, "vocab_size": 4000}))
    init_weights(model, 0)
    ids = torch.zeros(10, 100, dtype=torch.long)
    monkeypatch.setattr(decoder, "LOGITS", 4000 * 50)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(
                [largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))]
            )
            return out

    with Watch():
        model(ids, targets=ids).backward()
    assert largest < 1000 * 4000 / 8  # what the blocks hold is as large as a few chunks
