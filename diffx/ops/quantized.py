"""Attention whose logits are rounded to few bits on the fly, a block of query rows at a time: memory is linear in the context.

Notation: B batch, Tq queries, Tk keys, R rows of a block, M query maps, G key maps, d query width, dv value width, S maps that differ in
scale: the two of differential attention, or one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffx.ops.absmax import absmax_quantize

_ENTRIES = {"cpu": 2**18}  # of the maps of one block: what a cache holds
_GPU_ENTRIES = 2**25
SCOPES = ("map", "head", "row")


@dataclass(frozen=True, slots=True)
class QuantizedLogits:
    """An implementation of the operations in which every map's logits are quantized before the softmax (arXiv 2410.05258, section 3.7).

    Attributes:
        bits: of a logit.
        scope: the entries that share a scale, all of one example and layer and only those that are seen: ``map`` is the paper's A1 or A2
            over all heads (an ordinary attention has one), ``head`` one head's, ``row`` one query's in one head.
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

        ``mask`` (B, 1 or M, Tq, Tk) is true where a query sees a key, and takes the place of ``causal``. With ``sets`` = 2 the first
        half of the maps are the A1 of differential heads, and the second half their A2.
        """
        values = v.repeat_interleave(q.shape[2] // v.shape[2], 2).movedim(1, 2)  # (B, M, Tk, dv)
        out = v.new_empty(*q.shape[:3], v.shape[3])
        for start, stop, maps in self._maps(q, k, sets, causal, scale, key_mask, mask):
            out[:, start:stop] = (maps @ values[:, :, : maps.shape[3]].to(maps.dtype)).movedim(1, 2)
        return out

    def differential_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lam: Tensor,
        causal: bool,
        scale: float | None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """See ``diffx.ops.differential_attention``."""
        values = v.repeat_interleave(q.shape[2] // 2 // v.shape[2], 2).movedim(1, 2)  # (B, M/2, Tk, dv)
        out = v.new_empty(*q.shape[:2], q.shape[2] // 2, v.shape[3])
        lam = lam.view(-1, 1, 1)
        pairs = q.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)  # A1 of every head, then A2
        keys = k.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
        for start, stop, maps in self._maps(pairs, keys, 2, causal, scale, key_mask):
            first, second = maps.chunk(2, dim=1)  # (B, M/2, R, keys) each
            out[:, start:stop] = (torch.addcmul(first, lam, second, value=-1) @ values[:, :, : maps.shape[3]].to(maps.dtype)).movedim(1, 2)
        return out

    def _maps(
        self,
        q: Tensor,
        k: Tensor,
        sets: int,
        causal: bool,
        scale: float | None,
        key_mask: Tensor | None,
        mask: Tensor | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Softmax maps (B, M, R, keys) in fp32 at least, rows ``start`` to ``stop``; ``sets`` S of maps have scales of their own."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        batch, tq, count, _ = q.shape
        tk = k.shape[1]
        q = (q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale)).movedim(1, 2)  # (B, M, Tq, d)
        k = k.to(dtype).movedim(1, 2).repeat_interleave(count // k.shape[2], 1).mT  # (B, M, d, Tk)
        rows = max(1, min(tq, _ENTRIES.get(q.device.type, _GPU_ENTRIES) // (batch * count * tk)))
        own = [(start, min(start + rows, tq)) for start in range(0, tq, rows)]

        def block(start: int, stop: int) -> tuple[Tensor, Tensor]:
            """Logits, and which of them are unseen."""
            seen = tk - tq + stop if causal and mask is None else tk  # keys that any of the rows sees
            logits = q[:, :, start:stop] @ k[..., :seen]
            if mask is not None:
                unseen = ~mask[:, :, start:stop]
            elif causal:
                unseen = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device).triu(tk - tq + start + 1)[None, None]
            else:
                unseen = torch.zeros(1, 1, 1, seen, dtype=torch.bool, device=q.device)
            if key_mask is not None:
                unseen = unseen | ~key_mask[:, None, None, :seen]
            return logits, unseen

        def largest(logits: Tensor, unseen: Tensor) -> Tensor:
            peak = logits.masked_fill(unseen, 0).abs_().amax(-1, keepdim=True)  # (B, M, R, 1)
            if self.scope != "row":
                peak = peak.amax(2, keepdim=True)
            if self.scope == "map":
                peak = peak.unflatten(1, (sets, -1)).amax(2, keepdim=True).expand(-1, -1, count // sets, -1, -1).flatten(1, 2)
            return peak

        peak = None
        if self.scope != "row":
            for start, stop in own:
                own_peak = largest(*block(start, stop))
                peak = own_peak if peak is None else torch.maximum(peak, own_peak)
        for start, stop in own:
            logits, unseen = block(start, stop)
            logits = absmax_quantize(logits, self.bits, largest(logits, unseen) if peak is None else peak)
            yield start, stop, logits.masked_fill_(unseen, -torch.inf).softmax(-1)
