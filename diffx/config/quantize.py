"""The job of ``diffx quantize``."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import check_fields, refuse, require
from diffx.config.eval import EvalJob

EXACT = 16  # bits at which nothing is quantized


class LogitScope(str, Enum):
    """Attention logits of a text and layer that share a scale; ``map`` is A1 or A2 of all heads."""

    map = "map"
    head = "head"
    row = "row"


class Scheme(str, Enum):
    """What is stored and computed with: integer weights of any width, or 8-bit forms."""

    weight_only = "weight_only"
    int8_dynamic = "int8_dynamic"
    float8 = "float8"
    float8_dynamic = "float8_dynamic"


class StateScope(str, Enum):
    """Hidden states of a text and layer that share a scale; ``tensor`` is all, (T, D)."""

    tensor = "tensor"
    token = "token"


@dataclass
class MethodConfig:
    """What is quantized; ``kind`` is set by ``method=``."""

    kind: str = MISSING


@dataclass
class AttentionLogits(MethodConfig):
    """Attention logits, by dynamic absmax quantization (arXiv 2410.05258, section 3.7), simulated.

    Attributes:
        scope: the logits that share a scale.
    """

    kind: str = "attention_logits"
    scope: LogitScope = LogitScope.map


@dataclass
class Activations(MethodConfig):
    """Hidden states behind every block, by dynamic absmax quantization, simulated.

    Attributes:
        scope: the states that share a scale.
    """

    kind: str = "activations"
    scope: StateScope = StateScope.tensor


@dataclass
class Weights(MethodConfig):
    """Weights of the linear layers but the output projection, stored at few bits by torchao.

    Attributes:
        scheme: ``weight_only``; ``int8_dynamic`` also rounds activations to 8 bits, a token to a
            scale; ``float8`` stores 8-bit floats; ``float8_dynamic`` multiplies them too, on
            hardware that can.
        group_size: weights of a row that share a scale, with ``weight_only``; ``null`` is the row
            at 8 bits, and 32 at fewer.
        skip: unchanged layers, by whole parts of their names: ``o_proj``, ``layers.0``.
    """

    kind: str = "weights"
    scheme: Scheme = Scheme.weight_only
    group_size: int | None = None
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self, "method", "group_size", "1 or more, or null", lambda size: size >= 1)
        if self.group_size is not None:
            setting, scheme = f"method.group_size={self.group_size}", self.scheme.value
            alone = self.scheme is not Scheme.weight_only
            refuse(alone, setting, "only weight_only has groups", f"method.scheme={scheme}")


@dataclass
class QuantizeJob(EvalJob):
    """``diffx quantize``: the keys of ``diffx eval``, and these.

    Attributes:
        bits: widths at which the suite runs; 16, the model as it is, is always measured.
    """

    kind: str = "quantize"
    method: MethodConfig = field(default_factory=MethodConfig)
    bits: list[int] = field(default_factory=lambda: [16, 8, 6, 4])

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.bits) > 0, "bits", self.bits, "a list of widths, such as [16,8,6,4]")
        widths, accepted = {*range(2, EXACT + 1)}, f"from 2 to {EXACT}"
        if isinstance(self.method, Weights):
            scheme = self.method.scheme
            widths = {*range(2, 9), EXACT} if scheme is Scheme.weight_only else {8, EXACT}
            choices = ", ".join(map(str, sorted(widths)))
            accepted = f"{choices} with method.scheme={scheme.value}"
        for bits in self.bits:
            require(bits in widths, "bits", bits, accepted)
        reasons = {
            "speed": "a simulated quantization says nothing about speed",
            "attention_allocation": "it measures the attention of the model as it is",
            "outliers": "it measures the attention of the model as it is",
        }
        if not isinstance(self.method, Weights) and self.suite.kind in reasons:
            reason = f"{reasons[self.suite.kind]}; choose a suite that reads or answers"
            refuse(True, f"suite={self.suite.name}", reason)


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    "attention_logits": AttentionLogits,
    "activations": Activations,
    "weights": Weights,
}


def change_settings(method: MethodConfig, bits: int) -> dict[str, Any]:
    """What decides the figures besides the suite's own settings, JSON-able."""
    settings = {key: getattr(value, "value", value) for key, value in asdict(method).items()}
    return {"bits": bits, **settings}
