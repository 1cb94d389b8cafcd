"""Architectures. ``num_heads`` (H) and ``num_kv_heads`` (H_kv) are those of the baseline."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import POSITIVE, check_fields, require

_MOST = {  # beyond these, parameter counts overflow or a narrow model takes minutes to build
    "hidden_size": 2**24,
    "num_layers": 10**4,
    "num_heads": 2**24,
    "num_kv_heads": 2**24,
    "intermediate_size": 2**28,
    "vocab_size": 2**28,
}


DEPTHS = ("depth", "depth-1")  # lambda_init by the layer


class LambdaScope(str, Enum):
    """How many lambdas a DIFF V1 layer learns."""

    layer = "layer"
    head = "head"


class Halve(str, Enum):
    """What DIFF V1 halves to pay for its second attention map."""

    head_count = "head_count"
    head_dim = "head_dim"


class Sign(str, Enum):
    """Whether DIFF V1 subtracts the second map or adds it."""

    minus = "minus"
    plus = "plus"


class LambdaForm(str, Enum):
    """Lambda of DIFF V2, given x W_lambda."""

    sigmoid = "sigmoid"
    linear = "linear"
    one = "one"


class Pairing(str, Enum):
    """Which maps make a head of DIFF V2."""

    within = "within"
    across = "across"


class Gate(str, Enum):
    """What a gate of ``transformer_gated`` multiplies."""

    head = "head"
    element = "element"


class Sink(str, Enum):
    """The sink logit of ``transformer_sink``."""

    learned = "learned"
    zero = "zero"


class Ffn(str, Enum):
    """Activation of the feed-forward layer."""

    swiglu = "swiglu"
    polynorm = "polynorm"


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
        ffn: ``swiglu``, or ``polynorm``: a learned sum of normed powers (2411.03884) in place of
            SiLU, as Motif-2.6B has it.
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
    ffn: Ffn = Ffn.swiglu

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
class TransformerGatedConfig(ModelConfig):
    """The baseline with gated attention (2505.06708): Y ⊙ sigmoid(x W_g) enters ``o_proj``.

    Attributes:
        gate: one gate for each ``head`` of a token, or for each ``element`` of its heads.
    """

    kind: str = "transformer_gated"
    gate: Gate = Gate.head


@dataclass(kw_only=True, slots=True)
class TransformerSinkConfig(ModelConfig):
    """The baseline with a sink: exp(s) is added to the denominator of every softmax.

    Attributes:
        sink: s is ``learned`` for each head, from 0 (gpt-oss), or ``zero`` (off-by-one softmax).
    """

    kind: str = "transformer_sink"
    sink: Sink = Sink.learned


@dataclass(kw_only=True, slots=True)
class DiffV1Config(ModelConfig):
    """Differential Transformer V1 (2410.05258): H/2 heads, each the difference of two maps.

    Attributes:
        lambda_init: ``depth`` is 0.8 - 0.6·exp(-0.3·l) with l 0-based; ``depth-1`` takes l - 1 for
            l, as Motif-2.6B does; a number in [0, 1) is that constant in every layer.
        lambda_scope: one lambda a ``layer`` (the paper) or a ``head``.
        sublayer_norm: RMSNorm over each head's 2d-wide output, before the factor 1 - lambda_init.
        sublayer_norm_gain: give that norm a learned gain of size 2d.
        sublayer_norm_eps: epsilon of that norm; ``null`` is ``norm_eps``.
        halve: ``head_count`` keeps d (the paper); ``head_dim`` keeps H heads and cuts d, the
            commonest failed reproduction.
        sign: ``plus`` adds the second map, A1 + lambda A2: a control without a difference, whose
            lambda is logged as negative.
    """

    kind: str = "diff_v1"
    lambda_init: float | str = "depth"
    lambda_scope: LambdaScope = LambdaScope.layer
    sublayer_norm: bool = True
    sublayer_norm_gain: bool = True
    sublayer_norm_eps: float | None = None
    halve: Halve = Halve.head_count
    sign: Sign = Sign.minus

    def _check_heads(self) -> None:
        ModelConfig._check_heads(self)
        check_fields(self, "model", "sublayer_norm_eps", "positive")
        if self.halve is Halve.head_count:
            self._check_even("num_heads num_kv_heads")
        else:
            accepted = "such that the head dimension is a multiple of 4 with model.halve=head_dim"
            require(self.head_dim % 4 == 0, "model.num_heads", self.num_heads, accepted)
        value = self.lambda_init
        good = value in DEPTHS if isinstance(value, str) else 0 <= value < 1
        require(good, "model.lambda_init", value, "'depth', 'depth-1' or a number in [0, 1)")


@dataclass(kw_only=True, slots=True)
class DiffGDAConfig(DiffV1Config):
    """Grouped differential attention (2510.06949): ``ratio`` signal maps share a noise map.

    All else is DIFF V1, which is ``ratio=1``. The number of noise maps is the multiple of the pairs
    of keys that brings the parameters nearest to the baseline's.

    Attributes:
        ratio: signal maps for each noise map; the paper finds 3 and 4 best.
    """

    kind: str = "diff_gda"
    ratio: int = 3

    def _check_heads(self) -> None:
        DiffV1Config._check_heads(self)
        # beyond it, no noise maps would be nearer to the baseline's parameters than one a pair
        most = (8 * self.num_heads // self.num_kv_heads - 2) // 3
        accepted = (
            f"from 1 to {most} with model.num_heads={self.num_heads} and "
            f"model.num_kv_heads={self.num_kv_heads}: each pair of keys needs a noise map"
        )
        require(1 <= self.ratio <= most, "model.ratio", self.ratio, accepted)

    @property
    def noise_maps(self) -> int:
        """Noise maps: their projections have (3·ratio + 1) / 4 of V1's parameters for each head."""
        pairs = self.num_kv_heads // (1 if self.halve is Halve.head_dim else 2)
        return pairs * round(4 * self.num_heads / ((3 * self.ratio + 1) * self.num_kv_heads))


@dataclass(kw_only=True, slots=True)
class DiffV2Config(ModelConfig):
    """Differential Transformer V2 (January 2026): 2H query heads, lambda per token and head.

    Attributes:
        ratio: signal maps for each noise map: H + H/ratio query heads (Motif-3); 1 is V2.
        lambda_form: lambda is the ``sigmoid`` of x W_lambda (V2), ``linear`` in it, or ``one``.
        pairing: ``within``: maps of a head are neighbours, on one key/value head (V2); ``across``:
            the noise maps come after all signal maps, on other key/value heads.
    """

    kind: str = "diff_v2"
    ratio: int = 1
    lambda_form: LambdaForm = LambdaForm.sigmoid
    pairing: Pairing = Pairing.within

    def _check_heads(self) -> None:
        check_fields(self, "model", "ratio", POSITIVE)
        heads = f"model.num_heads={self.num_heads}"
        require(
            self.num_heads % self.ratio == 0, "model.ratio", self.ratio, f"a divisor of {heads}"
        )
        noise_maps = self.num_heads // self.ratio
        self._check_kv_heads(noise_maps, f"{heads} / model.ratio={self.ratio}")


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "transformer": TransformerConfig,
    "transformer_wide_head": TransformerWideHeadConfig,
    "transformer_1p5h": Transformer1p5hConfig,
    "transformer_gated": TransformerGatedConfig,
    "transformer_sink": TransformerSinkConfig,
    "diff_v1": DiffV1Config,
    "diff_gda": DiffGDAConfig,
    "diff_v2": DiffV2Config,
}
