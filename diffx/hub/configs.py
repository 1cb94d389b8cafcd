"""What ``transformers`` must know of our models before it has loaded one: configurations, and where the classes are.

This file is read whenever ``transformers``' auto classes are loaded after ``import diffx``, so it loads neither torch nor any model.
"""

from importlib import import_module
from typing import Any, cast

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from diffx.config.bridge import from_plain
from diffx.config.model import MODEL_CONFIGS, ModelConfig

_CACHES = ["cache", "past_key_values"]  # outputs that transformers' Trainer does not gather; the cache's names since 5.24 and before


class DiffxConfig(PretrainedConfig):
    """A decoder's configuration.

    Args:
        architecture: the fields of our own configuration, ``kind`` included.
        use_cache: whether ``forward`` returns a cache where its own ``use_cache`` is None.
    """

    model_type = "diffx"
    keys_to_ignore_at_inference = _CACHES

    def __init__(self, architecture: dict[str, Any] | None = None, use_cache: bool = True, **options: Any):
        self.architecture = architecture or {}
        if architecture:
            own = self.decoder_config()
            options |= {
                "vocab_size": own.vocab_size,
                "hidden_size": own.hidden_size,
                "num_hidden_layers": own.num_layers,
                "num_attention_heads": own.num_heads,
                "num_key_value_heads": own.num_kv_heads,
                "tie_word_embeddings": False,  # as transformers sees it: our decoder has no second matrix to tie
            }
        super().__init__(**options)
        self.use_cache = use_cache

    def decoder_config(self) -> ModelConfig:
        """Our own configuration."""
        return cast(ModelConfig, from_plain(MODEL_CONFIGS[self.architecture["kind"]], self.architecture))


class DexConfig(PretrainedConfig):
    """The base's configuration and the branch's.

    Args:
        base: the base's configuration, with its ``model_type``.
        branches: for each layer ``output`` (the projection's name), ``num_heads``, ``width``, ``heads``, ``layer``.
        share: ``layer`` or ``head``.
        sign: -1 or +1.
        anneal_steps: T of equation 4; None where lambda is fixed.
        step: t.
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
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            options.setdefault(key, self.base.get(key))
        options["tie_word_embeddings"] = bool(self.base.get("tie_word_embeddings", False))
        super().__init__(**options)


class _Later:
    """Stands for a model class until a model is asked for; the class may stand in a room above this one, which loads it by name."""

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


class DiffxLater(_Later):
    """Our decoders."""

    config_class = DiffxConfig
    place = ("diffx.hub.registered", "DiffxForCausalLM")


class DexLater(_Later):
    """Adapted models that keep their branch."""

    config_class = DexConfig
    place = ("diffx.dex.registered", "DexForCausalLM")


for later in (DiffxLater, DexLater):
    AutoConfig.register(later.config_class.model_type, later.config_class, exist_ok=True)
    AutoModelForCausalLM.register(later.config_class, later, exist_ok=True)
