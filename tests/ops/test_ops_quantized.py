"""Quantized logits against a float64 oracle in NumPy that forms every map."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import diffx.ops.quantized as quantized
from diffx.ops import QuantizedLogits, absmax_quantize, attention, differential_attention


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def round_to_bits(value, peak, bits):
    levels = 2 ** (bits - 1) - 1
    return (
        value
        if peak == 0
        else float(np.clip(np.rint(value / (peak / levels)), -levels, levels) * (peak / levels))
    )


def oracle_maps(q, k, sets, bits, scope, causal, seen=None):
    """(B, M, Tq, Tk); ``sets`` gives the set of maps that each map shares a scale with."""
    batch, tq, count, d = q.shape
    tk = k.shape[1]
    maps = np.zeros((batch, count, tq, tk))
    for b in range(batch):
        logits = np.full((count, tq, tk), -np.inf)
        for m in range(count):
            for i in range(tq):
                for j in range(tk):
                    if (not causal or j <= tk - tq + i) and (seen is None or seen[b, j]):
                        logits[m, i, j] = q[b, i, m] @ k[b, j, m] / d**0.5
        magnitudes = np.where(np.isfinite(logits), np.abs(logits), 0)
        for m in range(count):
            alike = [other for other in range(count) if sets[other] == sets[m]]
            for i in range(tq):
                peak = {
                    "map": magnitudes[alike].max(),
                    "head": magnitudes[m].max(),
                    "row": magnitudes[m, i].max(),
                }[scope]
                row = [
                    round_to_bits(value, peak, bits) if np.isfinite(value) else -np.inf
                    for value in logits[m, i]
                ]
                weights = np.exp(np.array(row) - max(row))
                maps[b, m, i] = weights / weights.sum()
    return maps


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_absmax_quantize_equals_the_oracle_elementwise(bits):
    x = random(7, 11)
    x[3] = 0
    peak = x.abs().amax(1, keepdim=True)
    expected = [
        [round_to_bits(float(value), float(peak[row]), bits) for value in x[row]]
        for row in range(7)
    ]
    torch.testing.assert_close(
        absmax_quantize(x.clone(), bits, peak),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )
    assert len(torch.unique(absmax_quantize(x.clone(), bits, x.abs().max()))) <= 2**bits - 1


@pytest.mark.parametrize("scope", quantized.SCOPES)
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    ("tq", "causal", "masked"),
    [(9, True, False), (9, False, False), (4, True, False), (4, True, True)],
)
def test_attention_equals_the_oracle(scope, bits, tq, causal, masked, monkeypatch):
    monkeypatch.setitem(quantized._ENTRIES, "cpu", 150)  # a few rows a block
    q, k, v = random(2, tq, 4, 6), random(2, 9, 2, 6, seed=1), random(2, 9, 2, 5, seed=2)
    seen = torch.ones(2, 9, dtype=torch.bool)
    seen[1, 1:3] = not masked
    maps = oracle_maps(
        q.numpy(), k.repeat_interleave(2, 2).numpy(), [0] * 4, bits, scope, causal, seen.numpy()
    )
    expected = np.einsum("bmqk,bkmd->bqmd", maps, v.repeat_interleave(2, 2).numpy())
    out = attention(
        q, k, v, causal=causal, key_mask=seen if masked else None, impl=QuantizedLogits(bits, scope)
    )
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scope", quantized.SCOPES)
@pytest.mark.parametrize("bits", [3, 8])
def test_differential_attention_equals_the_oracle(scope, bits, monkeypatch):
    monkeypatch.setitem(quantized._ENTRIES, "cpu", 150)
    q, k, v, lam = (
        random(2, 7, 8, 6),
        random(2, 7, 4, 6, seed=1),
        random(2, 7, 2, 12, seed=2),
        random(4, seed=3),
    )
    q[:, :, 1::2] *= 3  # so that A1's scale is not A2's
    key_map = [0, 1, 0, 1, 2, 3, 2, 3]  # head j of group j // 2
    maps = oracle_maps(q.numpy(), k[:, :, key_map].numpy(), [0, 1] * 4, bits, scope, True)
    weights = maps[:, 0::2] - lam.numpy()[:, None, None] * maps[:, 1::2]
    expected = np.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(2, 2).numpy())
    out = differential_attention(q, k, v, lam, impl=QuantizedLogits(bits, scope))
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_a_mask_of_each_map_takes_the_place_of_causality():
    q, k, v = random(1, 6, 2, 4), random(1, 6, 2, 4, seed=1), random(1, 6, 2, 4, seed=2)
    window = torch.ones(6, 6, dtype=torch.bool).tril() & torch.ones(6, 6, dtype=torch.bool).triu(-2)
    out = QuantizedLogits(4).attention(q, k, v, True, None, mask=window[None, None])
    whole = QuantizedLogits(4).attention(
        q, k, v, True, None, mask=torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    )
    torch.testing.assert_close(whole, QuantizedLogits(4).attention(q, k, v, True, None))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2
    peak = logits.masked_fill(~window, 0).abs().max()
    maps = absmax_quantize(logits.clone(), 4, peak).masked_fill(~window, -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", maps, v))


@pytest.mark.parametrize("scope", quantized.SCOPES)
def test_each_bit_halves_the_error(scope):
    q, k, v = random(2, 64, 4, 16), random(2, 64, 4, 16, seed=1), random(2, 64, 4, 16, seed=2)
    exact = attention(q, k, v, impl="reference")
    errors = [
        float((QuantizedLogits(bits, scope).attention(q, k, v, True, None) - exact).norm())
        for bits in range(5, 13)
    ]
    ratios = [before / after for before, after in pairwise(errors)]
    assert all(1.8 < ratio < 2.3 for ratio in ratios), ratios


def test_the_texts_of_a_batch_do_not_share_a_scale():
    q, k, v = random(2, 8, 2, 4), random(2, 8, 2, 4, seed=1), random(2, 8, 2, 4, seed=2)
    q[1] *= 10
    both = QuantizedLogits(4).attention(q, k, v, True, None)
    torch.testing.assert_close(
        both[:1], QuantizedLogits(4).attention(q[:1], k[:1], v[:1], True, None), rtol=0, atol=0
    )
