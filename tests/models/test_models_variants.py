"""Each architecture against its formulas, head by head in float64, and identities between them."""

import math

import pytest
import torch

from diffx.config.model import (
    DiffGDAConfig,
    DiffV1Config,
    DiffV2Config,
    Ffn,
    Gate,
    LambdaForm,
    LambdaScope,
    Pairing,
    Sign,
    Sink,
    TransformerGatedConfig,
    TransformerSinkConfig,
)
from diffx.models import build_model, init_weights
from diffx.models.decoder import ATTENTION
from diffx.ops import attention as ops_attention

D, T, LAYER = 64, 11, 2
SHAPE = {"hidden_size": D, "num_layers": 3, "num_heads": 8, "vocab_size": 50, "init_std": 0.15}
CONFIGS = {
    "gda of 1": (DiffGDAConfig, {"ratio": 1}),
    "gda of 2": (DiffGDAConfig, {"ratio": 2, "lambda_init": "depth-1"}),
    "gda of 3": (DiffGDAConfig, {"lambda_scope": LambdaScope.head, "sublayer_norm_eps": 1e-2}),
    "plus": (DiffV1Config, {"sign": Sign.plus}),
    "minus": (DiffV1Config, {}),
    "v2": (DiffV2Config, {}),
    "v2 of 2": (DiffV2Config, {"ratio": 2}),
    "v2 linear": (DiffV2Config, {"lambda_form": LambdaForm.linear}),
    "v2 one": (DiffV2Config, {"lambda_form": LambdaForm.one, "ratio": 2}),
    "v2 across": (DiffV2Config, {"pairing": Pairing.across}),
    "gate of heads": (TransformerGatedConfig, {}),
    "gate of elements": (TransformerGatedConfig, {"gate": Gate.element}),
    "learned sink": (TransformerSinkConfig, {}),
    "sink of zero": (TransformerSinkConfig, {"sink": Sink.zero}),
}


def draw(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def tables(d):
    angles = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(0, d, 2).double() / d)
    return angles.cos(), angles.sin()


def rotated(x, d):
    """RoPE of x (B, T, d): features 2i and 2i + 1 as a complex number."""
    cos, sin = tables(d)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def softmax_map(q, k, sink=None):
    d = q.shape[-1]
    weights = (rotated(q, d) @ rotated(k, d).mT / d**0.5).exp().tril()
    return weights / (weights.sum(-1, keepdim=True) + (0 if sink is None else sink.exp()))


def formulas(config, p, x):
    """The output of the attention of ``config``, by the equations of its paper."""
    d, heads = config.head_dim, []
    q, k, v = (x @ p[f"{name}_proj.weight"].T for name in "qkv")
    part = lambda y, index, width=d: y[..., index * width : (index + 1) * width]  # noqa: E731
    if isinstance(config, DiffV1Config):
        m = getattr(config, "ratio", 1)
        groups = config.noise_maps if m > 1 else config.num_heads // 2
        queries_per_pair = groups // (config.num_kv_heads // 2)
        depth = LAYER - 1 if config.lambda_init == "depth-1" else LAYER
        initial = 0.8 - 0.6 * math.exp(-0.3 * depth)
        lam = (p["lambda_q1"] * p["lambda_k1"]).sum(-1).exp() + initial
        lam = lam - (p["lambda_q2"] * p["lambda_k2"]).sum(-1).exp()
        lam = lam.reshape(-1).expand(m * groups)
        for i in range(m * groups):
            g = i // m
            pair = g // queries_per_pair
            signal = softmax_map(part(q, g * (m + 1) + i % m), part(k, 2 * pair))
            noise = softmax_map(part(q, g * (m + 1) + m), part(k, 2 * pair + 1))
            weights = signal - lam[i] * noise
            if config.sign is Sign.plus:
                weights = signal + lam[i] * noise
            out = weights @ part(v, pair, 2 * d)
            eps = config.sublayer_norm_eps or config.norm_eps
            out = out / (out.square().mean(-1, keepdim=True) + eps).sqrt()
            heads.append((1 - initial) * out * p["sublayer_norm.weight"])
    elif isinstance(config, DiffV2Config):
        m, count = config.ratio, config.num_heads
        maps = count + count // m
        outputs = []
        for index in range(maps):
            key = index // (maps // config.num_kv_heads)
            outputs.append(softmax_map(part(q, index), part(k, key)) @ part(v, key))
        for j in range(count):
            signal, noise = j // m * (m + 1) + j % m, j // m * (m + 1) + m
            if config.pairing is Pairing.across:
                signal, noise = j, count + j // m
            lam = torch.ones(())
            if config.lambda_form is not LambdaForm.one:
                lam = (x @ p["lambda_proj.weight"][j])[..., None]
            if config.lambda_form is LambdaForm.sigmoid:
                lam = 1 / (1 + (-lam).exp())
            heads.append(outputs[signal] - lam * outputs[noise])
    else:
        for j in range(config.num_heads):
            key, sink = j // (config.num_heads // config.num_kv_heads), None
            if isinstance(config, TransformerSinkConfig):
                sink = p["sinks"][j] if config.sink is Sink.learned else torch.zeros(())
            out = softmax_map(part(q, j), part(k, key), sink) @ part(v, key)
            if isinstance(config, TransformerGatedConfig):
                width = 1 if config.gate is Gate.head else d
                gate = x @ part(p["gate_proj.weight"].T, j, width)
                out = out / (1 + (-gate).exp())
            heads.append(out)
    return torch.cat(heads, -1) @ p["o_proj.weight"].T


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_output_and_gradients_are_those_of_the_formulas(name, kv_heads):
    cls, options = CONFIGS[name]
    config = cls(**SHAPE, num_kv_heads=kv_heads, **options)
    module = ATTENTION[config.kind](config, LAYER).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed) * 0.4
    x, weights = draw(2, T, D, seed=98).requires_grad_(), draw(2, T, D, seed=99)
    inputs = [x, *module.parameters()]
    expected = formulas(config, dict(module.named_parameters()), x)
    expected = [expected, *torch.autograd.grad(expected, inputs, weights)]
    for implementation in ("blocks", "sdpa"):
        module.implementation = implementation
        actual = module(x, *tables(config.head_dim))
        actual = [actual, *torch.autograd.grad(actual, inputs, weights)]
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).norm() < 1e-12 * other.norm()


@pytest.mark.parametrize("name", ["gda of 3", "v2 of 2"])
def test_the_variants_differ_from_what_they_vary(name):
    """A ratio is not ignored: one signal map of a group does not attend as another does."""
    cls, options = CONFIGS[name]
    config = cls(**SHAPE, num_kv_heads=2, **options)
    module = ATTENTION[config.kind](config, LAYER).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    view = module.view(draw(1, T, D), *tables(8))
    assert view.num_heads == module.o_proj.in_features // module.values[1]
    assert view.num_maps == view.num_heads * (view.ratio + 1) // view.ratio
    maps = torch.stack([view.head_map(j, 0, T) for j in range(view.num_heads)])
    assert len(torch.unique(maps[:, 0, -1].float(), dim=0)) == view.num_heads


def test_gda_of_one_signal_map_is_v1():
    v1 = build_model(DiffV1Config(**SHAPE, num_kv_heads=4))
    init_weights(v1, 0)
    gda = build_model(DiffGDAConfig(**SHAPE, num_kv_heads=4, ratio=1))
    gda.load_state_dict(v1.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(gda(ids), v1(ids))


def test_signal_maps_that_are_equal_make_v2_of_a_ratio_v2():
    """Half of the noise maps, each shared by two heads, in V2 of ratio 1 and 2."""
    ratio, d = 2, 8
    grouped = build_model(DiffV2Config(**SHAPE, num_kv_heads=4, ratio=ratio)).double()
    init_weights(grouped, 0)
    plain = build_model(DiffV2Config(**SHAPE, num_kv_heads=4)).double()
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        maps = state[name].unflatten(0, (-1, ratio + 1, d))
        noise = maps[:, ratio:].expand(-1, ratio, -1, -1)
        state[name] = torch.stack([maps[:, :ratio], noise], 2).flatten(0, 3)
    plain.load_state_dict(state)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(ids), grouped(ids), rtol=1e-10, atol=1e-10)


def test_a_sink_far_below_the_logits_is_ordinary_attention():
    sink = build_model(TransformerSinkConfig(**SHAPE, num_kv_heads=2)).double()
    init_weights(sink, 0)
    ids, before = torch.arange(20)[None], sink(torch.arange(20)[None])
    zero = build_model(TransformerSinkConfig(**SHAPE, num_kv_heads=2, sink=Sink.zero)).double()
    init_weights(zero, 0)
    torch.testing.assert_close(before, zero(ids), rtol=0, atol=0)  # learned sinks begin at zero
    plain = {name: x for name, x in sink.state_dict().items() if not name.endswith("sinks")}
    zero.load_state_dict(plain)
    for layer in sink.layers:
        layer.self_attn.sinks.data.fill_(-60.0)
    for layer in zero.layers:
        layer.self_attn.context = lambda x, attend, layer=layer: attend(ops_attention)
    torch.testing.assert_close(sink(ids), zero(ids), rtol=1e-10, atol=1e-10)
    assert (before - zero(ids)).abs().max() > 1e-3


def test_polynorm_is_its_formula():
    mlp = (
        build_model(DiffV1Config(**SHAPE, num_kv_heads=2, ffn=Ffn.polynorm)).double().layers[0].mlp
    )
    for seed, parameter in enumerate(mlp.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed)
    x = draw(2, 3, D)
    gate = x @ mlp.gate_proj.weight.T
    (w0, w1, w2), bias = mlp.act_fn.weight, mlp.act_fn.bias

    def normed(y):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    act = w0 * normed(gate**3) + w1 * normed(gate**2) + w2 * normed(gate) + bias
    expected = (act * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)
