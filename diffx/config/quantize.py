"""The job of ``diffx quantize``."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import require
from diffx.config.errors import UserError
from diffx.config.eval import EvalJob

EXACT = 16  # bits at which nothing is quantized
_SEES_ATTENTION = ("attention_allocation", "outliers")


class LogitScope(str, Enum):
    """Attention logits that share a scale, all of one text and layer: a ``map`` (A1 or A2 over all heads), a ``head`` or a ``row``."""

    map = "map"
    head = "head"
    row = "row"


class StateScope(str, Enum):
    """Hidden states that share a scale, all of one text and layer: the whole ``tensor`` (T, D), or a ``token``."""

    tensor = "tensor"
    token = "token"


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """What is quantized; ``kind`` is set by ``method=``."""

    kind: str = MISSING


@dataclass(kw_only=True, slots=True)
class AttentionLogits(MethodConfig):
    """Attention logits, by dynamic absmax quantization (arXiv 2410.05258, section 3.7), simulated.

    Attributes:
        scope: the logits that share a scale.
    """

    kind: str = "attention_logits"
    scope: LogitScope = LogitScope.map


@dataclass(kw_only=True, slots=True)
class Activations(MethodConfig):
    """Hidden states behind every block, by dynamic absmax quantization, simulated.

    Attributes:
        scope: the states that share a scale.
    """

    kind: str = "activations"
    scope: StateScope = StateScope.tensor


@dataclass(kw_only=True, slots=True)
class QuantizeJob(EvalJob):
    """``diffx quantize``: the keys of ``diffx eval``, and these.

    Attributes:
        kind: tells a saved config's schema.
        method: what is quantized.
        bits: at which widths the suite is run; 16 is the model as it is, always measured too.
    """

    kind: str = "quantize"
    method: MethodConfig = field(default_factory=MethodConfig)
    bits: list[int] = field(default_factory=lambda: [16, 8, 6, 4])

    def __post_init__(self) -> None:
        EvalJob.__post_init__(self)
        require(len(self.bits) > 0, "bits", self.bits, "a list of widths, such as [16,8,6,4]")
        for bits in self.bits:
            require(2 <= bits <= EXACT, "bits", bits, f"from 2 to {EXACT}")
        if self.suite.kind == "speed":
            raise UserError("suite=speed cannot be used: a simulated quantization says nothing about speed")
        if self.suite.kind in _SEES_ATTENTION:
            raise UserError(
                f"suite={self.suite.name} cannot be used: it looks at the attention of the model as it is; choose one that reads or answers"
            )


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {"attention_logits": AttentionLogits, "activations": Activations}
