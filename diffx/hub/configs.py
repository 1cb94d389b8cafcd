"""Classes that ``import diffx`` registers with ``transformers``, without torch and models."""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from diffx.config.bridge import from_plain
from diffx.config.model import MODEL_CONFIGS, ModelConfig

# Outputs that transformers' Trainer does not gather: the cache, by its names since 5.24 and before.
_CACHES = ["cache", "past_key_values"]


class DiffxConfig(PretrainedConfig):
    """Configuration of a ``Decoder``: ``architecture`` has the fields of its ``ModelConfig``."""

    model_type = "diffx"
    keys_to_ignore_at_inference = _CACHES

    def __init__(
        self, architecture: dict[str, Any] | None = None, use_cache: bool = True, **options: Any
    ):
        self.architecture = architecture or {}
        if architecture:
            decoder = self.decoder_config()
            options |= {
                "vocab_size": decoder.vocab_size,
                "hidden_size": decoder.hidden_size,
                "num_hidden_layers": decoder.num_layers,
                "num_attention_heads": decoder.num_heads,
                "num_key_value_heads": decoder.num_kv_heads,
                "tie_word_embeddings": False,  # a tied decoder has no second matrix
            }
        super().__init__(**options)
        self.use_cache = use_cache

    @property
    def kind(self) -> str:
        """The name of the architecture."""
        return str(self.architecture["kind"])

    def decoder_config(self) -> ModelConfig:
        """The configuration of the decoder."""
        return from_plain(MODEL_CONFIGS[self.kind], self.architecture)


class MotifConfig(PretrainedConfig):
    """The published config of Motif-2.6B, whose weights load as a ``DiffxForCausalLM``."""

    model_type = "motif"
    attention_bias = False
    attn_rms_norm_eps = 1e-5

    def __init__(
        self,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        **options: Any,
    ):
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta}
        self.rope_parameters |= rope_scaling or {}
        super().__init__(**options)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    def decoder_config(self) -> ModelConfig:
        """The configuration of the decoder."""
        return import_module("diffx.hub.motif").decoder_config(self)


class DexModelConfig(PretrainedConfig):
    """Configuration of an adapted model that keeps its branch.

    ``base`` is the config of the base. ``branches`` has for each layer ``output``, the name of the
    projection, and arguments of ``DexProjection``, as are ``share``, ``sign`` and ``anneal_steps``.
    ``step`` is t of equation 4.
    """

    model_type = "diffx_dex"
    keys_to_ignore_at_inference = _CACHES

    def __init__(
        self,
        base: dict[str, Any] | None = None,
        branches: list[dict[str, Any]] | None = None,
        share: str = "layer",
        sign: int = -1,
        anneal_steps: int | None = None,
        step: int = 0,
        **options: Any,
    ):
        self.base, self.branches = base or {}, branches or []
        self.share, self.sign, self.anneal_steps, self.step = share, sign, anneal_steps, step
        sizes = "vocab_size hidden_size num_hidden_layers num_attention_heads "
        for key in (sizes + "max_position_embeddings").split():
            options.setdefault(key, self.base.get(key))
        options["tie_word_embeddings"] = bool(self.base.get("tie_word_embeddings", False))
        super().__init__(**options)


class _LazyModel:
    """Imports the model class when a model is made; it may be in a higher package."""

    module: str

    @classmethod
    def _model(cls) -> Any:
        return getattr(import_module(cls.module), cls.__name__)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._model().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._model()._from_config(*args, **kwargs)


for config, module, name in (
    (DiffxConfig, "hub.registered", "DiffxForCausalLM"),
    (MotifConfig, "hub.motif", "MotifForCausalLM"),
    (DexModelConfig, "dex.registered", "DexForCausalLM"),
):
    lazy = {"config_class": config, "module": f"diffx.{module}"}
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, type(name, (_LazyModel,), lazy), exist_ok=True)
