"""The job of ``diffx quantize``."""

from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import require
from diffx.config.eval import EvalJob
from diffx.errors import UserError

EXACT = 16  # bits at which nothing is quantized
_SEES_ATTENTION = ("attention_allocation", "outliers")


class LogitScope(str, Enum):
    """Attention logits that share a scale, all of one text and layer: a ``map`` (A1 or A2 over all heads), a ``head`` or a ``row``."""

    map = "map"
    head = "head"
    row = "row"


class Scheme(str, Enum):
    """What is stored and computed with: integer weights of any width, or the 8-bit forms in which activations are rounded too."""

    weight_only = "weight_only"
    int8_dynamic = "int8_dynamic"
    float8 = "float8"
    float8_dynamic = "float8_dynamic"


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
class Weights(MethodConfig):
    """Weights of the linear layers but the output projection, stored at few bits by torchao: a model that is saved and loaded like any.

    Attributes:
        scheme: ``weight_only``; ``int8_dynamic`` also rounds activations to 8 bits, each token by its own scale; ``float8`` stores 8-bit
            floats; ``float8_dynamic`` multiplies them too, on hardware that can.
        group_size: weights of a row that share a scale, with ``weight_only``; ``null`` is the whole row at 8 bits, and 32 at fewer.
        skip: layers to leave as they are, by whole parts of their names, such as ``o_proj`` or ``layers.0``.
    """

    kind: str = "weights"
    scheme: Scheme = Scheme.weight_only
    group_size: int | None = None
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            self.group_size is None or self.group_size >= 1,
            "method.group_size",
            self.group_size,
            "1 or more, or null",
        )
        if self.group_size is not None and self.scheme is not Scheme.weight_only:
            raise UserError(
                f"method.group_size cannot be used with method.scheme={self.scheme.value}: only weight_only has groups"
            )


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
        if isinstance(self.method, Weights):
            widths = (
                (*range(2, 9), EXACT) if self.method.scheme is Scheme.weight_only else (8, EXACT)
            )
            for bits in self.bits:
                require(
                    bits in widths,
                    "bits",
                    bits,
                    f"{', '.join(map(str, widths))} with method.scheme={self.method.scheme.value}",
                )
            return
        if self.suite.kind == "speed":
            raise UserError(
                "suite=speed cannot be used: a simulated quantization says nothing about speed"
            )
        if self.suite.kind in _SEES_ATTENTION:
            raise UserError(
                f"suite={self.suite.name} cannot be used: it looks at the attention of the model as it is; choose one that reads or answers"
            )


METHOD_CONFIGS: dict[str, type[MethodConfig]] = {
    "attention_logits": AttentionLogits,
    "activations": Activations,
    "weights": Weights,
}


def change_settings(method: MethodConfig, bits: int) -> dict[str, Any]:
    """What decides the figures besides the suite's own settings, JSON-able."""
    return {
        "bits": bits,
        **{key: getattr(value, "value", value) for key, value in asdict(method).items()},
    }
