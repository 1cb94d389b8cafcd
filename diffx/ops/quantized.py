"""Attention with logits rounded to few bits, a block of query rows at a time.

Memory is linear in the context length.

Notation: B batch, Tq queries, Tk keys, R rows of a block, M query maps, G key maps, d query width,
dv value width, S sets of maps, each with a scale: the two of differential attention, or one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffx.ops.absmax import absmax_quantize
from diffx.ops.reference import split_maps

_ENTRIES = {"cpu": 2**18}  # entries of the maps of one block, so that they fit in the cache
_GPU_ENTRIES = 2**25
SCOPES = ("map", "head", "row")


@dataclass(frozen=True, slots=True)
class QuantizedLogits:
    """Attention whose logits are quantized before the softmax (arXiv 2410.05258, section 3.7).

    Attributes:
        bits: bits of a logit.
        scope: the unmasked logits of one example and layer that share a scale: ``map`` those of all
            heads (in differential attention those of A1, and those of A2), ``head`` those of one
            head, ``row`` those of one query in one head.
    """

    bits: int
    scope: str = "map"

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        sets: int = 1,
    ) -> Tensor:
        """See ``diffx.ops.attention``.

        ``mask`` (B, 1 or M, Tq, Tk) is true where a query attends to a key, and replaces
        ``causal``. With ``sets`` = 2 the first half of the maps are the A1 of differential heads,
        and the second half their A2.
        """
        values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).movedim(1, 2)  # (B, M, Tk, dv)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        out, sizes = v.new_empty(*q.shape[:3], v.shape[3]), [q.shape[2] // sets] * sets
        for start, stop, maps in self._maps(q, k, sizes, causal, scale, key_mask, mask):
            out[:, start:stop] = _weigh(maps, values)
        return out

    def differential_attention(
        self, q: Tensor, k: Tensor, v: Tensor, lam: Tensor, ratio: int = 1, **options: Any
    ) -> Tensor:
        """See ``diffx.ops.differential_attention``."""
        pair = split_maps(q, k, v.shape[2], ratio)
        sizes = [queries.shape[2] for queries, _ in pair]  # A1 of every head, then A2
        maps_of = torch.cat([queries for queries, _ in pair], 2)
        keys = torch.cat(
            [
                key.repeat_interleave(count // key.shape[2], 2)
                for count, (_, key) in zip(sizes, pair, strict=True)
            ],
            2,
        )
        values = v.repeat_interleave(sizes[0] // v.shape[2], 2).movedim(1, 2)  # (B, h, Tk, dv)
        out = v.new_empty(*q.shape[:2], sizes[0], v.shape[3])
        lam = lam.expand(*q.shape[:2], sizes[0]).transpose(1, 2)[..., None]  # (B, h, Tq, 1)
        for start, stop, maps in self._maps(maps_of, keys, sizes, **options):
            first, second = maps.split(sizes, 1)  # (B, h or h/m, R, keys)
            second = second.repeat_interleave(ratio, 1)
            maps = torch.addcmul(first, lam[:, :, start:stop].to(maps.dtype), second, value=-1)
            out[:, start:stop] = _weigh(maps, values)
        return out

    def _maps(
        self,
        q: Tensor,
        k: Tensor,
        sizes: list[int],
        causal: bool,
        scale: float | None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ``start``, ``stop`` and the maps (B, M, R, keys) of these rows, at least fp32.

        The keys k are those of each map (B, Tk, M, d), and ``sizes`` the maps of each set.
        """
        dtype = torch.promote_types(q.dtype, torch.float32)
        batch, tq, count, _ = q.shape
        tk = k.shape[1]
        # (B, M, Tq, d)
        q = (q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale)).movedim(1, 2)
        k = k.to(dtype).movedim(1, 2).mT  # (B, M, d, Tk)
        rows = max(1, min(tq, _ENTRIES.get(q.device.type, _GPU_ENTRIES) // (batch * count * tk)))
        spans = [(start, min(start + rows, tq)) for start in range(0, tq, rows)]

        def logits_of(start: int, stop: int) -> tuple[Tensor, Tensor]:
            """Logits (B, M, R, keys), and which of them are masked."""
            length = tk - tq + stop if causal and mask is None else tk  # keys of any of the rows
            logits = q[:, :, start:stop] @ k[..., :length]
            if mask is not None:
                masked = ~mask[:, :, start:stop]
            else:
                masked = q.new_full((1, 1, stop - start, length), causal, dtype=torch.bool)
                masked = masked.triu(tk - tq + start + 1)
            if key_mask is not None:
                masked = masked | ~key_mask[:, None, None, :length]
            return logits, masked

        def peak_of(logits: Tensor, masked: Tensor) -> Tensor:
            peak = logits.masked_fill(masked, 0).abs_().amax(-1, keepdim=True)  # (B, M, R, 1)
            if self.scope != "row":
                peak = peak.amax(2, keepdim=True)
            if self.scope == "map":
                parts = peak.split(sizes, 1)
                peak = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in parts], 1)
            return peak

        peak = None
        if self.scope != "row":
            for start, stop in spans:
                block_peak = peak_of(*logits_of(start, stop))
                peak = block_peak if peak is None else torch.maximum(peak, block_peak)
        for start, stop in spans:
            logits, masked = logits_of(start, stop)
            block_peak = peak_of(logits, masked) if peak is None else peak
            logits = absmax_quantize(logits, self.bits, block_peak)
            yield start, stop, logits.masked_fill_(masked, -torch.inf).softmax(-1)


def _weigh(maps: Tensor, values: Tensor) -> Tensor:
    """Multiply maps (B, M, R, keys) by values (B, M, Tk, dv): (B, R, M, dv)."""
    return (maps @ values[:, :, : maps.shape[3]].to(maps.dtype)).movedim(1, 2)
