"""What one layer attends to, from which its maps are formed a few rows at a time.

Notation: B batch, T tokens, M query maps (heads, or two for each differential head), G key maps, d width of a query.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(kw_only=True)
class AttentionView:
    """Queries and keys of one layer, from which its maps are formed a few rows at a time: never all T x T.

    Attributes:
        q: (B, T, M, d), rotated.
        k: (B, T, G, d), rotated.
        key_map: the key map that each query map reads; two of differential head j are query maps 2j and 2j + 1.
        scale: of the logits.
        lam: None for ordinary maps; lambda of each differential head, broadcastable to (B, T, M/2).
        mask: True where a query sees a key, (B or 1, M or 1, T, T); None is all keys up to the query's own if ``causal``, else all.
        causal: whether it is a decoder's, where there is no mask.
        softcap: bound c of logits that pass through c·tanh(logit/c), as in Gemma 2.
    """

    q: Tensor
    k: Tensor
    key_map: list[int]
    scale: float
    lam: Tensor | None = None
    mask: Tensor | None = None
    softcap: float | None = None
    causal: bool = True

    @property
    def num_maps(self) -> int:
        """Query maps M: each is a softmax of its own."""
        return self.q.shape[2]

    @property
    def num_heads(self) -> int:
        """Maps that weigh values: M/2 differential heads, or M ordinary ones."""
        return self.num_maps if self.lam is None else self.num_maps // 2

    def logits(self, m: int, start: int, stop: int) -> Tensor:
        """Give what enters the softmax of map ``m`` in rows ``start`` to ``stop``: (B, rows, T) in fp32, -inf where nothing is seen."""
        keys = stop if self.mask is None and self.causal else self.k.shape[1]  # none behind the last row is seen
        q, k = self.q[:, start:stop, m].float(), self.k[:, :keys, self.key_map[m]].float()  # (B, rows, d), (B, keys, d)
        logits = (q * self.scale) @ k.mT
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.mask is None:
            hidden = torch.ones(logits.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1) if self.causal else None
        else:
            hidden = ~self.mask[:, m if self.mask.shape[1] > 1 else 0, start:stop]
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
        return F.pad(logits, (0, self.k.shape[1] - keys), value=-torch.inf)

    def head_map(self, j: int, start: int, stop: int) -> Tensor:
        """The weights of head ``j``'s values in query rows ``start`` to ``stop``: (B, rows, T) in fp32.

        An ordinary head's is a softmax; a differential head's is A1 - lambda A2 (arXiv 2410.05258, equation 1), which can be negative.
        """
        if self.lam is None:
            return self.logits(j, start, stop).softmax(-1)
        lam = self.lam.float().expand(*self.q.shape[:2], self.num_heads)[:, start:stop, j, None]  # (B, rows, 1)
        return self.logits(2 * j, start, stop).softmax(-1) - lam * self.logits(2 * j + 1, start, stop).softmax(-1)
