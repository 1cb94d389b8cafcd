"""Every implementation against the reference, and the reference against explicit formulas."""

import math
from functools import partial
from itertools import accumulate, pairwise

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffx.ops import Documents, attention, attention_maps, differential_attention, sdpa

FAST = ["sdpa", "blocks"]
# (B, Tq, Tk, H, H_kv, d): grouped and not, cached, one token, more rows than a block, odd sizes
SHAPES = [
    (2, 9, 9, 4, 4, 8),
    (1, 70, 70, 8, 4, 4),
    (2, 131, 131, 4, 2, 6),
    (2, 5, 17, 8, 2, 4),
    (1, 1, 33, 4, 2, 8),
    (1, 1, 1, 2, 2, 2),
]


def tensors(shape, differential, dtype=torch.float64):
    batch, tq, tk, heads, kv_heads, d = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*size):
        return (
            torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        )

    v = draw(batch, tk, kv_heads // 2, 2 * d) if differential else draw(batch, tk, kv_heads, d)
    return draw(batch, tq, heads, d), draw(batch, tk, kv_heads, d), v


def outputs_and_gradients(op, *inputs):
    out = op(*inputs)
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, weights)]


def assert_same(actual, expected, rtol):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        # Relative to the norm of each tensor; a gradient that is zero in theory has none.
        assert (a - e).norm().item() <= rtol * max(e.norm().item(), 1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_the_definition(causal):
    q, k, v = tensors((2, 5, 7, 8, 4, 4), differential=True)  # h = 4 heads in 2 groups
    lam = torch.tensor([0.1, 0.3, 0.5, 0.7], dtype=torch.float64)
    out = differential_attention(q, k, v, lam, causal=causal, impl="reference")

    q, k, v, out = (t.detach() for t in (q, k, v, out))

    def row(query, keys, position):  # one row of a softmax map, with plain sums
        weights = [
            math.exp(float(query @ key) / 2.0) if not causal or j <= position else 0.0
            for j, key in enumerate(keys)
        ]
        return torch.tensor(weights, dtype=torch.float64) / sum(weights)

    for b in range(2):
        for head in range(4):
            group = head // 2
            for i in range(5):
                first = row(q[b, i, 2 * head], k[b, :, 2 * group], 2 + i)
                second = row(q[b, i, 2 * head + 1], k[b, :, 2 * group + 1], 2 + i)
                expected = (first - lam[head] * second) @ v[b, :, group]
                torch.testing.assert_close(out[b, i, head], expected)


def test_maps_are_those_of_the_output():
    q, k, v = tensors((2, 5, 5, 4, 2, 4), differential=True)
    first, second = (attention_maps(q[:, :, s::2], k[:, :, s::2]) for s in (0, 1))
    assert first.shape == second.shape == (2, 2, 5, 5)
    expected = torch.einsum("bhqk,bkd->bqhd", first - 0.3 * second, v[:, :, 0])
    torch.testing.assert_close(differential_attention(q, k, v, 0.3), expected)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    assert not first.triu(1).any()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("causal", "scale"), [(True, None), (False, None), (True, 0.3)])
def test_matches_reference(impl, shape, causal, scale):
    inputs = tensors(shape, differential=False)
    options = {"causal": causal, "scale": scale}
    actual = outputs_and_gradients(partial(attention, impl=impl, **options), *inputs)
    assert_same(
        actual,
        outputs_and_gradients(partial(attention, impl="reference", **options), *inputs),
        1e-10,
    )

    inputs = tensors(shape, differential=True)
    for lam in (torch.tensor(0.3), torch.linspace(-0.2, 0.9, shape[3] // 2)):
        lam = lam.double().requires_grad_()
        actual = outputs_and_gradients(
            partial(differential_attention, impl=impl, **options), *inputs, lam
        )
        expected = outputs_and_gradients(
            partial(differential_attention, impl="reference", **options), *inputs, lam
        )
        assert_same(actual, expected, 1e-10)


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)])
def test_lower_precision(impl, dtype, rtol):
    for differential in (False, True):
        inputs = tensors((2, 70, 70, 4, 2, 16), differential, dtype)
        op = partial(differential_attention, lam=0.4) if differential else attention
        actual = outputs_and_gradients(partial(op, impl=impl), *inputs)
        expected = outputs_and_gradients(partial(op, impl="reference"), *inputs)
        assert_same([t.float() for t in actual], [t.float() for t in expected], rtol)
        assert actual[0].dtype == dtype


@pytest.mark.parametrize("impl", FAST)
def test_gradcheck(impl):
    q, k, v = tensors((1, 4, 6, 4, 2, 2), differential=True)
    lam = torch.tensor([0.2, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(differential_attention, impl=impl), (q, k, v, lam))
    assert torch.autograd.gradcheck(
        partial(attention, impl=impl), tensors((1, 4, 4, 4, 2, 2), differential=False)
    )


def test_value_narrower_or_wider_than_key():
    q, k, _ = tensors((2, 6, 6, 4, 2, 4), differential=False)
    for width in (2, 10):
        v = torch.randn(
            2, 6, 2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        expected = attention(q, k, v, impl="reference")
        assert expected.shape == (2, 6, 4, width)
        for impl in FAST:
            torch.testing.assert_close(attention(q, k, v, impl=impl), expected)


class Largest(TorchDispatchMode):
    """The most elements that any tensor of any operation had, forward and backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


@pytest.mark.parametrize("impl", FAST)
def test_memory_is_linear(impl):
    heads, d = 2, 4
    for length in (1024, 2048, 4096, 8192):
        inputs = tensors(
            (1, length, length, heads, heads, d), differential=True, dtype=torch.float32
        )
        with Largest() as largest:
            differential_attention(*inputs, 0.3, impl=impl).sum().backward()
        rows = {"sdpa": 2 * d, "blocks": 64 * heads}[
            impl
        ]  # elements for each token: a padded query, or a block of both maps
        assert largest.elements <= max(rows, heads * 2 * d) * length
        with torch.no_grad(), Largest() as largest:  # one token against a cache
            differential_attention(inputs[0][:, -1:], *inputs[1:], 0.3, impl=impl)
        assert largest.elements <= heads * 2 * d * length


@pytest.mark.parametrize("impl", FAST)
def test_measured_memory_is_linear(impl):
    """Allocated memory, also inside kernels, doubles with the length; maps would quadruple it."""
    peaks = []
    for length in (1024, 2048, 4096, 8192):
        inputs = tensors((1, length, length, 2, 2, 4), differential=True, dtype=torch.float32)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            differential_attention(*inputs, 0.3, impl=impl).sum().backward()
        allocations = [
            event.nbytes()
            for event in profiled.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        peaks.append(max(accumulate(allocations)))
    assert all(longer < 2.2 * shorter for shorter, longer in pairwise(peaks)), peaks
    assert peaks[-1] < 8192 * 8192  # bytes; one map would be four times that


def test_picks_a_fast_implementation_and_refuses_unknown_ones():
    q, k, v = tensors((1, 512, 512, 2, 2, 4), differential=True, dtype=torch.float32)
    with Largest() as largest:
        differential_attention(q, k, v, 0.3)
        attention(q, k, k)
    assert largest.elements < 512 * 512
    with pytest.raises(
        ValueError, match="impl='flash' is unknown: choose one of reference, sdpa, blocks"
    ):
        attention(q, k, k, impl="flash")


SHAPE_ERRORS = [
    ((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 2), "v has shape .* must be .B, T, H, D"),
    ((2, 5, 4, 8), (1, 5, 4, 8), (1, 5, 2, 16), "batches 2, 1 and 1"),
    ((2, 5, 4, 8), (2, 5, 4, 8), (2, 6, 2, 16), "length 5 and v has 6"),
    ((2, 6, 4, 8), (2, 5, 4, 8), (2, 5, 2, 16), "6 queries to 5 keys"),
    ((2, 5, 4, 8), (2, 5, 4, 6), (2, 5, 2, 16), "q is 8 wide and k is 6"),
    ((2, 5, 6, 8), (2, 5, 4, 8), (2, 5, 2, 16), "q needs groups of 2 maps"),
    ((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 1, 16), "k needs one or two maps a head of v"),
    ((2, 5, 3, 8), (2, 5, 3, 8), (2, 5, 3, 16), "q needs groups of 2 maps"),
    ((2, 5, 4, 8), (2, 5, 4, 8), (2, 5, 4, 16), "q needs groups of 2 maps"),
]


@pytest.mark.parametrize(("q", "k", "v", "message"), SHAPE_ERRORS)
def test_shape_errors(q, k, v, message):
    with pytest.raises(ValueError, match=message):
        differential_attention(torch.zeros(q), torch.zeros(k), torch.zeros(v), 0.5)


def test_other_errors():
    q, k, v = tensors((1, 3, 3, 4, 4, 2), differential=True)
    with pytest.raises(
        ValueError, match=r"lam has shape \(4,\): it must be a scalar, \(2,\) or \("
    ):
        differential_attention(q, k, v, torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(1, 3, 2\)"):
        differential_attention(q, k, v, torch.zeros(3, 1, 2))
    with pytest.raises(ValueError, match="q needs groups of 4 maps"):
        differential_attention(q, k, v, 0.1, ratio=3)
    with pytest.raises(ValueError, match="k has 4 heads and v has 2"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="q has 4 heads and k has 3"):
        attention(q, k[:, :, :3], k[:, :, :3])


def draw_form(ratio, pairs, wide, lengths=(9, 9), groups=2, noise_maps=4, d=4):
    """q, k and v of ``noise_maps`` groups of maps, with or without a key map for the noise."""
    generator = torch.Generator().manual_seed(ratio)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    tq, tk = lengths
    k = draw(2, tk, groups * (1 + pairs), d)
    return draw(2, tq, noise_maps * (ratio + 1), d), k, draw(2, tk, groups, d * (1 + wide))


def by_definition(q, k, v, lam, ratio):
    """Head by head, by the formulas of 2410.05258 and 2510.06949, causal."""
    (batch, tq, maps, d), tk, groups = q.shape, k.shape[1], v.shape[2]
    noise_maps = maps // (ratio + 1)
    future = torch.ones(tq, tk).triu(tk - tq + 1).bool()

    def softmax_map(query, key):
        weights = (query @ key.mT / d**0.5).exp().masked_fill(future, 0)
        return weights / weights.sum(-1, keepdim=True)

    lam, heads = lam.expand(batch, tq, ratio * noise_maps), []
    for head in range(ratio * noise_maps):
        group, member = divmod(head, ratio)
        value = group // (noise_maps // groups)
        first, second = (value, value) if k.shape[2] == groups else (2 * value, 2 * value + 1)
        signal = softmax_map(q[:, :, group * (ratio + 1) + member], k[:, :, first])
        noise = softmax_map(q[:, :, group * (ratio + 1) + ratio], k[:, :, second])
        heads.append((signal - lam[:, :, head, None] * noise) @ v[:, :, value])
    return torch.stack(heads, 2)


LAMBDAS = {"scalar": (), "head": ("h",), "token": (2, "T", "h")}


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("lengths", [(9, 9), (70, 70), (3, 17), (1, 5)], ids=str)
@pytest.mark.parametrize("ratio", [1, 3])
@pytest.mark.parametrize("pairs", [True, False], ids=["pairs of keys", "shared keys"])
def test_every_form_is_the_definition(impl, lengths, ratio, pairs):
    """Ratios, keys of one map or two, values as wide as keys or twice, three forms of lambda."""
    for wide, form in ((True, "scalar"), (False, "head"), (False, "token"), (True, "token")):
        q, k, v = draw_form(ratio, pairs, wide, lengths)
        sizes = {"T": lengths[0], "h": 4 * ratio}
        shape = [sizes.get(size, size) for size in LAMBDAS[form]]
        lam = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        inputs = (q, k, v, lam.requires_grad_())
        op = partial(differential_attention, ratio=ratio)
        actual = outputs_and_gradients(partial(op, impl=impl), *inputs)
        expected = outputs_and_gradients(partial(by_definition, ratio=ratio), *inputs)
        assert_same(actual, expected, 1e-10)


def test_documents_split_lambda_too():
    q, k, v = (x[:1] for x in draw_form(3, False, True, (15, 15)))
    lam = torch.rand(1, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    documents = Documents([4, 11], torch.tensor([0, 4, 15]))
    packed = differential_attention(q, k, v, lam, ratio=3, documents=documents)
    for part in (slice(0, 4), slice(4, 15)):
        alone = by_definition(q[:, part], k[:, part], v[:, part], lam[:, part], 3)
        torch.testing.assert_close(packed[:, part], alone)


def test_one_call_of_attention_where_keys_are_shared(monkeypatch):
    """V2 remains one ordinary call of PyTorch's kernels where the blocks are not used."""
    q, k, v = draw_form(1, False, False)
    calls, whole = [], sdpa.attention
    monkeypatch.setattr(
        sdpa, "attention", lambda *a, **options: (calls.append(a), whole(*a, **options))[1]
    )
    differential_attention(q, k, v, 0.5, impl="sdpa")
    assert len(calls) == 1 and calls[0][0] is q


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("lengths", [(9, 9), (70, 70), (3, 17), (1, 5)], ids=str)
def test_a_sink_is_an_explicit_column(impl, lengths):
    tq, tk = lengths
    q, k, v = tensors((2, tq, tk, 4, 2, 6), differential=False)
    sinks = torch.tensor([0.0, 2.0, -1.5, 30.0], dtype=torch.float64, requires_grad=True)
    future = torch.ones(tq, tk).triu(tk - tq + 1).bool()

    def column(q, k, v, sinks):
        keys, values = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
        logits = (q.transpose(1, 2) @ keys.mT / 6**0.5).masked_fill(future, -torch.inf)
        weights = torch.cat([sinks[:, None, None].expand(2, 4, tq, 1), logits], -1).softmax(-1)
        return (weights[..., 1:] @ values).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)

    actual = outputs_and_gradients(
        lambda q, k, v, s: attention(q, k, v, sinks=s, impl=impl), q, k, v, sinks
    )
    expected = outputs_and_gradients(lambda *inputs: column(*inputs)[0], q, k, v, sinks)
    assert_same(actual, expected, 1e-10)
    share = (column(q, k, v, sinks)[1] - sinks).sigmoid()[..., None]  # 1 is all but the sink
    torch.testing.assert_close(actual[0], attention(q, k, v, impl=impl) * share)


def test_a_sink_with_masked_keys_and_documents():
    q, k, v = tensors((1, 8, 8, 4, 2, 6), differential=False)
    sinks = torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=torch.float64)
    alone = attention(q[:, 3:], k[:, 3:], v[:, 3:], sinks=sinks)
    documents = Documents([3, 5], torch.tensor([0, 3, 8]))
    packed = attention(q, k, v, sinks=sinks, documents=documents)
    torch.testing.assert_close(packed[:, 3:], alone)
    seen = torch.arange(8)[None] >= 3
    masked = attention(q[:, 3:], k, v, sinks=sinks, key_mask=seen)
    torch.testing.assert_close(masked, alone)
