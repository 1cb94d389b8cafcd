"""Architectures. ``num_heads`` (H) and ``num_kv_heads`` (H_kv) are those of the baseline."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import check_fields, require

_MOST = {  # beyond these, parameter counts overflow or a narrow model takes minutes to build
    "hidden_size": 2**24,
    "num_layers": 10**4,
    "num_heads": 2**24,
    "num_kv_heads": 2**24,
    "intermediate_size": 2**28,
    "vocab_size": 2**28,
}


class LambdaScope(str, Enum):
    """How many lambdas a DIFF V1 layer learns."""

    layer = "layer"
    head = "head"


class Halve(str, Enum):
    """What DIFF V1 halves to pay for its second attention map."""

    head_count = "head_count"
    head_dim = "head_dim"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The decoder's shape, the same for every architecture.

    Attributes:
        kind: the architecture (set by ``model=``, not by hand).
        hidden_size: model width D, in features.
        num_layers: decoder blocks.
        num_heads: the baseline's query heads H; the head dimension is d = D / H.
        num_kv_heads: the baseline's key/value heads H_kv; H_kv < H is grouped-query attention.
        intermediate_size: SwiGLU width in features; ``null`` is 8/3·D rounded up to a multiple of
            256.
        vocab_size: entries of the embedding; ``null`` is the tokenizer's.
        rope_theta: base of the rotary position embedding.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: share one matrix between the input embedding and the output projection.
        init_std: standard deviation of the normal initialisation of every matrix; ``null`` is
            1/sqrt(hidden_size), about the usual 0.02 at the papers' sizes.
        scale_residual_init: divide the initial ``o_proj`` and ``down_proj`` by sqrt(2·num_layers).
    """

    kind: str = MISSING
    hidden_size: int = 96
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int | None = None
    vocab_size: int | None = None
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    init_std: float | None = None
    scale_residual_init: bool = False

    def __post_init__(self) -> None:
        for key, most in _MOST.items():
            value = getattr(self, key)
            good = value is None or 1 <= value <= most
            require(good, f"model.{key}", value, f"a positive whole number, {most} at most")
        check_fields(self, "model", "rope_theta norm_eps init_std", "positive")
        shape = f"a divisor of model.hidden_size={self.hidden_size}"
        require(self.hidden_size % self.num_heads == 0, "model.num_heads", self.num_heads, shape)
        shape += " that leaves an even head dimension (RoPE rotates pairs)"
        require(self.head_dim % 2 == 0, "model.num_heads", self.num_heads, shape)
        self._check_heads()

    def _check_heads(self) -> None:
        self._check_kv_heads(self.num_heads, f"model.num_heads={self.num_heads}")

    def _check_kv_heads(self, heads: int, name: str) -> None:
        kv_heads = self.num_kv_heads
        require(heads % kv_heads == 0, "model.num_kv_heads", kv_heads, f"a divisor of {name}")

    def _check_even(self, names: str) -> None:
        accepted = f"even for model={self.kind}, which pairs heads"
        check_fields(self, "model", names, accepted, lambda number: number % 2 == 0)

    @property
    def head_dim(self) -> int:
        """The baseline's head dimension d = D / H."""
        return self.hidden_size // self.num_heads

    @property
    def weight_std(self) -> float:
        """Standard deviation of the initial matrices: ``init_std``, or 1/sqrt(D)."""
        return self.init_std or self.hidden_size**-0.5

    @property
    def ffn_size(self) -> int:
        """SwiGLU width: ``intermediate_size``, or Llama's 8/3·D, rounded up to 256s."""
        return self.intermediate_size or -(-8 * self.hidden_size // (3 * 256)) * 256


@dataclass(kw_only=True, slots=True)
class TransformerConfig(ModelConfig):
    """The baseline: H heads of d, softmax attention."""

    kind: str = "transformer"


@dataclass(kw_only=True, slots=True)
class TransformerWideHeadConfig(ModelConfig):
    """Half the heads, each twice as wide: H/2 heads of 2d (the ablation table of 2410.05258).

    Attributes:
        sublayer_norm: RMSNorm over each head's output, as DIFF V1 has it.
        sublayer_norm_gain: give that norm a learned gain.
    """

    kind: str = "transformer_wide_head"
    sublayer_norm: bool = False
    sublayer_norm_gain: bool = True

    def _check_heads(self) -> None:
        ModelConfig._check_heads(self)
        self._check_even("num_heads num_kv_heads")


@dataclass(kw_only=True, slots=True)
class Transformer1p5hConfig(ModelConfig):
    """1.5·H query heads of d with H_kv unchanged: DIFF V2's parameter-matched baseline."""

    kind: str = "transformer_1p5h"

    def _check_heads(self) -> None:
        self._check_even("num_heads")
        heads = 3 * self.num_heads // 2
        self._check_kv_heads(heads, f"1.5·num_heads={heads}")


@dataclass(kw_only=True, slots=True)
class DiffV1Config(ModelConfig):
    """Differential Transformer V1 (2410.05258): H/2 heads, each the difference of two maps.

    Attributes:
        lambda_init: ``depth`` is 0.8 - 0.6·exp(-0.3·l) with l 0-based; a number in [0, 1) is that
            constant in every layer.
        lambda_scope: one lambda a ``layer`` (the paper) or a ``head``.
        sublayer_norm: RMSNorm over each head's 2d-wide output, before the factor 1 - lambda_init.
        sublayer_norm_gain: give that norm a learned gain of size 2d.
        halve: ``head_count`` keeps d (the paper); ``head_dim`` keeps H heads and cuts d, the
            commonest failed reproduction.
    """

    kind: str = "diff_v1"
    lambda_init: float | str = "depth"
    lambda_scope: LambdaScope = LambdaScope.layer
    sublayer_norm: bool = True
    sublayer_norm_gain: bool = True
    halve: Halve = Halve.head_count

    def _check_heads(self) -> None:
        ModelConfig._check_heads(self)
        if self.halve is Halve.head_count:
            self._check_even("num_heads num_kv_heads")
        else:
            accepted = "such that the head dimension is a multiple of 4 with model.halve=head_dim"
            require(self.head_dim % 4 == 0, "model.num_heads", self.num_heads, accepted)
        value = self.lambda_init
        good = value == "depth" or (not isinstance(value, str) and 0 <= value < 1)
        require(good, "model.lambda_init", value, "'depth' or a number in [0, 1)")


@dataclass(kw_only=True, slots=True)
class DiffV2Config(ModelConfig):
    """Differential Transformer V2 (January 2026): 2H query heads, lambda per token and head."""

    kind: str = "diff_v2"


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "transformer": TransformerConfig,
    "transformer_wide_head": TransformerWideHeadConfig,
    "transformer_1p5h": Transformer1p5hConfig,
    "diff_v1": DiffV1Config,
    "diff_v2": DiffV2Config,
}
