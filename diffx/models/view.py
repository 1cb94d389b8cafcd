"""Queries and keys of a layer, and its attention maps a few rows at a time.

Notation: B batch, T tokens, M query maps (heads, or the signal and noise maps of differential
heads), G key maps, d width of a query.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class AttentionView:
    """Queries and keys of one layer; its maps are computed a few rows at a time, never T x T.

    Attributes:
        q: (B, T, M, d), rotated.
        k: (B, T, G, d), rotated.
        key_map: the key map of each query map.
        scale: factor on the logits.
        lam: lambda of each differential head, broadcastable to (B, T, heads); None: ordinary maps.
        ratio: m signal maps and then a noise map are a group, and make m differential heads.
        sinks: logit (M,) of the sink of each map, a further term of its softmax.
        mask: (B or 1, M or 1, T, T), true where a query attends to a key; None: see ``causal``.
        causal: without a mask, whether a query attends to no later key.
        softcap: c where logits become c·tanh(logit/c), as in Gemma 2.
    """

    q: Tensor
    k: Tensor
    key_map: list[int]
    scale: float
    lam: Tensor | None = None
    ratio: int = 1
    sinks: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    causal: bool = True

    @property
    def num_maps(self) -> int:
        """Query maps M, a softmax each."""
        return self.q.shape[2]

    @property
    def num_heads(self) -> int:
        """Heads: a differential one for each signal map, or M ordinary ones."""
        groups = 0 if self.lam is None else self.num_maps // (self.ratio + 1)
        return self.num_maps - groups

    def logits(self, m: int, start: int, stop: int) -> Tensor:
        """Logits (B, rows, T) of map ``m`` in rows ``start`` to ``stop``, fp32, -inf if masked."""
        keys = stop if self.mask is None and self.causal else self.k.shape[1]
        q = self.q[:, start:stop, m].float()  # (B, rows, d)
        k = self.k[:, :keys, self.key_map[m]].float()  # (B, keys, d)
        logits = (q * self.scale) @ k.mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is not None:
            masked = ~self.mask[:, m if self.mask.shape[1] > 1 else 0, start:stop]
            logits.masked_fill_(masked, -torch.inf)
        elif self.causal:
            future = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device)
            logits.masked_fill_(future.triu_(start + 1), -torch.inf)
        return F.pad(logits, (0, self.k.shape[1] - keys), value=-torch.inf)

    def head_map(self, j: int, start: int, stop: int) -> Tensor:
        """Weights (B, rows, T) of the values of head ``j`` in rows ``start`` to ``stop``, in fp32.

        A softmax for an ordinary head; A1 - lambda A2 (arXiv 2410.05258, equation 1) for a
        differential head, which can be negative.
        """
        if self.lam is None:
            return self._softmax(j, start, stop)
        # (B, rows, 1)
        lam = self.lam.float().expand(*self.q.shape[:2], self.num_heads)[:, start:stop, j, None]
        group = j // self.ratio
        signal, noise = j + group, group * (self.ratio + 1) + self.ratio
        return self._softmax(signal, start, stop) - lam * self._softmax(noise, start, stop)

    def _softmax(self, m: int, start: int, stop: int) -> Tensor:
        logits = self.logits(m, start, stop)
        if self.sinks is None:
            return logits.softmax(-1)
        sink = self.sinks[m].float().expand(*logits.shape[:2], 1)
        return torch.cat([sink, logits], -1).softmax(-1)[..., 1:]
