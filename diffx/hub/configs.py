"""Configurations that are registered with ``transformers``, and where the model classes are.

The module is imported with the auto classes of ``transformers`` after ``import diffx``, so it
imports neither torch nor a model.
"""

from importlib import import_module
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from diffx.config.bridge import from_plain
from diffx.config.model import MODEL_CONFIGS, ModelConfig

# Outputs that transformers' Trainer does not gather: the cache, by its names since 5.24 and before.
_CACHES = ["cache", "past_key_values"]


class DiffxConfig(PretrainedConfig):
    """Configuration of a ``Decoder``.

    Args:
        architecture: the fields of a ``ModelConfig``, ``kind`` included.
        use_cache: whether ``forward`` returns a cache by default.
    """

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
                "tie_word_embeddings": False,  # a decoder has no second matrix to tie
            }
        super().__init__(**options)
        self.use_cache = use_cache

    def decoder_config(self) -> ModelConfig:
        """The configuration of the decoder."""
        return cast(
            ModelConfig, from_plain(MODEL_CONFIGS[self.architecture["kind"]], self.architecture)
        )


class DexModelConfig(PretrainedConfig):
    """Configuration of an adapted model that keeps its branch.

    Args:
        base: configuration of the base, with its ``model_type``.
        branches: for each layer ``output`` (the projection's name), ``num_heads``, ``width``,
            ``heads``, ``layer``.
        share: ``layer`` or ``head``.
        sign: -1 or +1.
        anneal_steps: T of equation 4; None for a fixed lambda.
        step: t of equation 4.
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
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            options.setdefault(key, self.base.get(key))
        options["tie_word_embeddings"] = bool(self.base.get("tie_word_embeddings", False))
        super().__init__(**options)


class _LazyModel:
    """Imports the model class when a model is made; it may be in a higher package."""

    config_class: type[PretrainedConfig]
    place: tuple[str, str]

    @classmethod
    def model_class(cls) -> Any:
        module, name = cls.place
        return getattr(import_module(module), name)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.model_class().from_pretrained(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.model_class()._from_config(*args, **kwargs)


class LazyDiffx(_LazyModel):
    """Decoders."""

    config_class = DiffxConfig
    place = ("diffx.hub.registered", "DiffxForCausalLM")


class LazyDex(_LazyModel):
    """Adapted models that keep their branch."""

    config_class = DexModelConfig
    place = ("diffx.dex.registered", "DexForCausalLM")


for lazy_class in (LazyDiffx, LazyDex):
    AutoConfig.register(lazy_class.config_class.model_type, lazy_class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(lazy_class.config_class, lazy_class, exist_ok=True)
