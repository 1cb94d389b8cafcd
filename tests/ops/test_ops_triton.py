"""The Triton kernels, interpreted without a GPU, against fp64 maps; they compile for GPUs."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from diffx.config.model import MODEL_CONFIGS
from diffx.models import build_model, init_weights
from diffx.models.attention import attention_modules
from diffx.models.generation import generate
from diffx.ops import differential_attention
from diffx.ops import triton_attention as ours

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RELATIVE = {
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}  # of the norm of each output and gradient


def draw(shape, dtype=torch.float32, seed=0):
    """q, k, v, lambda and weights of the output for a shape (B, Tq, Tk, h, G, d)."""
    batch, tq, tk, heads, groups, d = shape
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size):
        return torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_()

    q, k, v = (
        tensor(batch, tq, 2 * heads, d),
        tensor(batch, tk, 2 * groups, d),
        tensor(batch, tk, groups, 2 * d),
    )
    lam = torch.linspace(0.2, 0.9, heads, device=DEVICE).requires_grad_()
    return q, k, v, lam, tensor(batch, tq, heads, 2 * d).detach()


def attend_by(model, implementation):
    for module in attention_modules(model):
        module.implementation = implementation


def seen_by_loop(tq, tk, causal, documents):
    """Which keys each query sees, by the words of the docstring."""
    seen = torch.zeros(tq, tk, dtype=torch.bool)
    for i in range(tq):
        place = tk - tq + i
        for j in range(tk):
            same = documents is None or sum(j >= start for start in documents) == sum(
                place >= start for start in documents
            )
            seen[i, j] = same and (not causal or j <= place)
    return seen


def explicit(q, k, v, lam, weights, seen, scale=None):
    """Output and gradients in fp64."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v, lam)]
    q, k, v, lam = inputs
    per_group = v.shape[2] and q.shape[2] // 2 // v.shape[2]
    order = [2 * (m // 2 // per_group) + m % 2 for m in range(q.shape[2])]
    logits = torch.einsum("bqmd,bkmd->bmqk", q, k[:, :, order]) * (
        q.shape[3] ** -0.5 if scale is None else scale
    )
    maps = logits.masked_fill(~seen.to(q.device), -torch.inf).softmax(-1)
    signed = maps[:, 0::2] - lam.view(-1, 1, 1) * maps[:, 1::2]
    out = torch.einsum("bhqk,bkhd->bqhd", signed, v.repeat_interleave(per_group, 2))
    return [out, *torch.autograd.grad(out, inputs, weights.double())]


def fused(q, k, v, lam, weights, **options):
    out = ours.differential_attention(
        q, k, v, lam, options.pop("causal", True), options.pop("scale", None), **options
    )
    return [out, *torch.autograd.grad(out, (q, k, v, lam), weights)]


def assert_close(found, expected, rtol):
    for name, one, other in zip(("out", "dq", "dk", "dv", "dlam"), found, expected, strict=True):
        assert one.shape == other.shape
        scale = (
            other.norm() if other.norm() > 1e-6 else expected[0].norm()
        )  # where one key is seen, two gradients are zero in theory
        error = (one.double() - other).norm() / scale
        assert error <= rtol, (name, float(error))


SHAPES = [
    (1, 1, 1, 1, 1, 32),
    (2, 2, 2, 2, 1, 64),
    (1, 17, 17, 4, 2, 96),  # a width that is no power of two
    (2, 64, 64, 2, 2, 32),
    (1, 100, 100, 4, 1, 64),
    (1, 3, 77, 2, 1, 64),  # a cache
]
LONG = [(1, 129, 129, 2, 1, 128)]


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LONG)], ids=str
)
def test_output_and_every_gradient(shape, dtype):
    q, k, v, lam, weights = draw(shape, dtype)
    expected = explicit(q, k, v, lam, weights, seen_by_loop(shape[1], shape[2], True, None))
    found = fused(q, k, v, lam, weights)
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32]
    assert_close(found, expected, RELATIVE[dtype])


@pytest.mark.slow
def test_a_long_text():
    length = 4097 if DEVICE == "cuda" else 513  # the interpreter takes minutes for the longer one
    q, k, v, lam, weights = draw((1, length, length, 1, 1, 64))
    place = torch.arange(length, device=DEVICE)
    assert_close(
        fused(q, k, v, lam, weights), explicit(q, k, v, lam, weights, place <= place[:, None]), 4e-6
    )


@pytest.mark.parametrize(
    ("causal", "documents"),
    [
        (False, None),
        (True, [0, 50, 51, 130]),
        pytest.param(False, [0, 1, 64, 130], marks=pytest.mark.slow),
    ],
)
def test_what_is_seen(causal, documents):
    q, k, v, lam, weights = draw((1, 130, 130, 2, 1, 32))
    cu_seqlens = (
        None if documents is None else torch.tensor(documents, dtype=torch.int32, device=DEVICE)
    )
    found = fused(q, k, v, lam, weights, causal=causal, cu_seqlens=cu_seqlens, scale=0.3)
    seen = seen_by_loop(130, 130, causal, documents and documents[:-1])
    assert_close(found, explicit(q, k, v, lam, weights, seen, scale=0.3), 2e-6)


def test_each_document_is_as_it_is_alone():
    q, k, v, lam, _ = draw((1, 90, 90, 2, 1, 32))
    whole = ours.differential_attention(
        q, k, v, lam, True, None, cu_seqlens=torch.tensor([0, 37, 90], device=DEVICE)
    )
    for part in (slice(0, 37), slice(37, 90)):
        alone = ours.differential_attention(q[:, part], k[:, part], v[:, part], lam, True, None)
        torch.testing.assert_close(whole[:, part], alone, rtol=1e-5, atol=1e-6)


def test_a_scalar_lambda_and_tensors_that_are_not_contiguous():
    q, k, v, _, weights = draw((2, 33, 33, 2, 2, 32))
    lam = torch.tensor(0.4, device=DEVICE, requires_grad=True)
    q2, k2, v2 = (
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)
    )
    assert not q2.is_contiguous()
    found = fused(q2, k2, v2, lam, weights.transpose(0, 1).contiguous().transpose(0, 1))
    expected = explicit(q, k, v, lam, weights, seen_by_loop(33, 33, True, None))
    assert_close(found, expected, 2e-6)


@pytest.mark.slow
def test_gradients_are_the_same_bit_for_bit_each_time():
    inputs = draw((2, 70, 70, 4, 2, 64), torch.float16)
    first, second = fused(*inputs), fused(*inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 2, 1, 32), (2, 1, 700, 4, 2, 64), (1, 1, 513, 6, 1, 96)], ids=str
)
@pytest.mark.parametrize("dtype", RELATIVE)
def test_decoding_with_a_cache(shape, dtype):
    q, k, v, lam, weights = draw(shape, dtype)
    with torch.no_grad():
        out = ours.differential_attention(q, k, v, lam, True, None)
    expected = explicit(q, k, v, lam, weights, torch.ones(1, shape[2], dtype=torch.bool))[0]
    assert (
        out.dtype == dtype and (out.double() - expected).norm() <= RELATIVE[dtype] * expected.norm()
    )


@pytest.mark.parametrize(
    ("ratio", "pairs", "wide"), [(1, False, False), (3, True, True), (2, False, False)], ids=str
)
def test_ratios_shared_keys_narrow_values_and_a_lambda_of_each_token(ratio, pairs, wide):
    """V2, groups of maps, and both; against fp64 maps of each head written out."""
    tq, tk, groups, noise_maps, d = 5, 9, 1, 2, 32
    generator = torch.Generator().manual_seed(0)

    def tensor(*size):
        return torch.randn(size, generator=generator).to(DEVICE).requires_grad_()

    q = tensor(1, tq, noise_maps * (ratio + 1), d)
    k, v = tensor(1, tk, groups * (1 + pairs), d), tensor(1, tk, groups, d * (1 + wide))
    lam, heads = tensor(1, tq, noise_maps * ratio), noise_maps * ratio
    weights = torch.randn(1, tq, heads, v.shape[3], generator=generator).to(DEVICE)
    signal = [head // ratio * (ratio + 1) + head % ratio for head in range(heads)]
    noise = [head // ratio * (ratio + 1) + ratio for head in range(heads)]
    value = [head // ratio * groups // noise_maps for head in range(heads)]
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v, lam)]
    q64, k64, v64, lam64 = inputs
    future = torch.ones(tq, tk, device=DEVICE).triu(tk - tq + 1).bool()
    maps = []
    for chosen, second in ((signal, 0), (noise, int(pairs))):
        keys = k64[:, :, [(1 + pairs) * group + second for group in value]]
        logits = torch.einsum("bqhd,bkhd->bhqk", q64[:, :, chosen], keys) / d**0.5
        maps.append(logits.masked_fill(future, -torch.inf).softmax(-1))
    signed = maps[0] - lam64.transpose(1, 2)[..., None] * maps[1]
    out = torch.einsum("bhqk,bkhd->bqhd", signed, v64[:, :, value])
    expected = [out, *torch.autograd.grad(out, inputs, weights.double())]
    call = partial(differential_attention, ratio=ratio, impl="triton")
    out = call(q, k, v, lam)
    assert_close([out, *torch.autograd.grad(out, (q, k, v, lam), weights)], expected, 4e-6)
    with torch.no_grad():  # decoding
        last = call(q[:, -1:], k, v, lam[:, -1:])
    assert (last.double() - expected[0][:, -1:]).norm() <= 4e-6 * expected[0].norm()


def test_a_whole_diff_v2_and_diff_gda_by_the_kernels():
    for kind in ("diff_v2", "diff_gda"):
        model, ids = whole_model(2, kind), torch.arange(2, 14, device=DEVICE)[None]
        expected = model(ids)
        attend_by(model, ours)
        assert (model(ids) - expected).norm() <= 1e-5 * expected.norm()
        bounds = torch.tensor([0, 5, 12], device=DEVICE)
        packed = model(ids, cu_seqlens=bounds)
        attend_by(model, None)
        torch.testing.assert_close(packed, model(ids, cu_seqlens=bounds), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_operations_keep_the_rules_of_torch_library():
    q, k, v, lam, weights = draw((1, 20, 20, 2, 1, 32))
    lam = lam[None, :, None].expand(1, 2, 20).detach().requires_grad_()
    cu_seqlens = torch.tensor([0, 7, 20], device=DEVICE)
    torch.library.opcheck(
        torch.ops.diffx.differential_attention, (q, k, v, lam, True, 0.2, cu_seqlens)
    )
    with torch.no_grad():
        out = torch.ops.diffx.differential_attention(q, k, v, lam, True, 0.2, None)
        torch.library.opcheck(
            torch.ops.diffx.differential_attention_backward,
            (weights, q, k, v, lam, *out, True, 0.2, None),
        )
        torch.library.opcheck(
            torch.ops.diffx.differential_attention_decode,
            (q[:, :1].contiguous(), k, v, lam[:, :, :1], 0.2),
        )


def test_compiled_without_a_graph_break_and_checkpointed():
    q, k, v, lam, weights = draw((1, 40, 40, 2, 1, 32))

    def block(q, k, v, lam):
        return ours.differential_attention(q * 2, k, v, lam.tanh(), True, None) + 1

    expected = [
        block(q, k, v, lam),
        *torch.autograd.grad(block(q, k, v, lam), (q, k, v, lam), weights),
    ]
    for way in (
        torch.compile(block, fullgraph=True, backend="aot_eager"),
        partial(checkpoint, block, use_reentrant=False),
    ):
        out = way(q, k, v, lam)
        found = [out, *torch.autograd.grad(out, (q, k, v, lam), weights)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_autocast_computes_in_its_type():
    q, k, v, lam, weights = draw((1, 30, 30, 2, 1, 32))
    with torch.autocast(DEVICE, torch.bfloat16):
        out = ours.differential_attention(q, k, v, lam, True, None)
    assert out.dtype == torch.bfloat16
    found = [out, *torch.autograd.grad(out, (q, k, v, lam), weights.bfloat16())]
    assert [x.dtype for x in found[1:]] == [torch.float32] * 4
    assert_close(found, explicit(q, k, v, lam, weights, seen_by_loop(30, 30, True, None)), 1.2e-2)


def whole_model(kv_heads, kind="diff_v1"):
    config = MODEL_CONFIGS[kind](
        vocab_size=50,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=kv_heads,
        intermediate_size=48,
        init_std=0.2,
    )
    model = build_model(config).to(DEVICE)
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_whole_model(kv_heads):
    model = whole_model(kv_heads)
    ids = torch.randint(50, (2, 19), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for implementation in (None, ours):
        attend_by(model, implementation)
        logits = model(ids)
        logits.square().mean().backward()
        found.append(
            [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        )
        model.zero_grad()
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-6)


def test_what_it_does_not_take_is_said():
    q, k, v, lam, _ = draw((1, 4, 4, 2, 1, 32))
    call = partial(differential_attention, impl="triton")
    torch.testing.assert_close(
        call(q, k, v, lam),
        differential_attention(q, k, v, lam, impl="reference"),
        rtol=1e-5,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="key_mask"):
        call(q, k, v, lam, key_mask=torch.ones(1, 4, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"float64"):
        call(q.double(), k.double(), v.double(), lam)
    with pytest.raises(ValueError, match="128 features"):
        call(*draw((1, 4, 4, 2, 1, 160))[:4])
    with pytest.raises(ValueError, match="each key must have a query"):
        ours.differential_attention(
            q[:, :1], k, v, lam, True, None, cu_seqlens=torch.tensor([0, 4], device=DEVICE)
        )


COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from diffx.ops import triton_attention, triton_kernels

POINTERS = dict.fromkeys(("LAM", "LSE", "SUMS"), "*fp32")
POINTERS |= dict.fromkeys(("LOW", "HIGH", "FIRST", "LAST"), "*i32")
shared = {}
CASES = ((80, 64, 128, torch.bfloat16, "*bf16"), (90, 128, 256, torch.float32, "*fp32"))
CASES += ((90, 128, 128, torch.bfloat16, "*bf16"),)
for capability, d, wide, dtype, name in CASES:
    for kernel in ("forward", "row_sums", "keys", "queries", "decode"):
        function = getattr(triton_kernels, f"{kernel}_kernel")
        q, v = torch.empty(1, 1, 2, d, dtype=dtype), torch.empty(1, 1, 1, wide, dtype=dtype)
        sizes = triton_attention._launch_options(kernel, q, v)
        if kernel == "decode":
            sizes |= {"R": 2, "BLOCK_R": 16}
        options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
        signature = {}
        for argument in function.arg_names:
            scalar = "fp32" if argument in ("scale", "factor") else "i32"
            kind = POINTERS.get(argument, name if argument.isupper() else scalar)
            signature[argument] = "constexpr" if argument in sizes else kind
        if kernel == "decode":
            signature["OUT"] = "*fp32"
        constants = {(function.arg_names.index(key),): value for key, value in sizes.items()}
        source = ASTSource(function, signature, constexprs=constants)
        done = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        shared[f"{capability} {d} {wide} {kernel}"] = done.metadata.shared
print(json.dumps(shared))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Triton's compiler is for Linux")
@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_fit_in_their_shared_memory(tmp_path):
    """No GPU is needed to compile. 99 KiB are what a block of any GPU since 2020 can have."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path)
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared = json.loads(done.stdout.splitlines()[-1])
    assert len(shared) == 15 and max(shared.values()) <= 99 * 1024, shared


def test_documents_of_a_batch_are_one_call(monkeypatch):
    config = MODEL_CONFIGS["diff_v1"](
        vocab_size=50, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=48, init_std=0.2
    )
    model = build_model(config).to(DEVICE)
    init_weights(model, 0)
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bounds = torch.tensor([0, 7, 20, 23, 40], device=DEVICE)
    seen, whole = [], ours.differential_attention
    monkeypatch.setattr(
        ours,
        "differential_attention",
        lambda *args, **options: (seen.append(options), whole(*args, **options))[1],
    )
    found = []
    for implementation in (None, ours):
        attend_by(model, implementation)
        logits = model(ids, cu_seqlens=bounds)
        logits.square().mean().backward()
        found.append(
            [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        )
        model.zero_grad()
    assert [options["cu_seqlens"] is bounds for options in seen] == [
        True
    ] * 2  # one call a layer, and no copy of the bounds
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm().clamp_min(1e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_model_generates_with_its_cache_as_it_does_otherwise(kv_heads):
    model = whole_model(kv_heads)
    ids = torch.randint(50, (1, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    said = []
    for implementation in (None, ours):
        attend_by(model, implementation)
        said.append(list(generate(model.eval(), ids, max_tokens=12, temperature=0.0)))
    assert said[0] == said[1] and len(said[0]) == 12
