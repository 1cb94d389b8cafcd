"""An adapted model that keeps its branch, as a model of ``transformers``: what ``diffx export fold=false`` writes."""

import inspect
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.utils import TransformersKwargs

from diffx.config.dex import Share
from diffx.dex.attach import Adapted
from diffx.dex.layer import DexProjection
from diffx.hub.configs import DexModelConfig

_OUTPUTS = ("output_attentions", "output_hidden_states")


def _forward(
    self: Any, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    """Call the forward of the instance, which accepts or refuses each keyword."""
    return self.forward(input_ids=input_ids, labels=labels, **kwargs)


@lru_cache
def _keywords(forward: Callable[..., Any]) -> frozenset[str]:
    """Keywords that the ``forward`` of a base accepts, those behind its ``**kwargs`` included."""
    names = inspect.signature(forward).parameters
    accepted = {*names, *TransformersKwargs.__annotations__, "return_dict"}
    return frozenset(accepted | {"past_key_values"} if "cache" in names else accepted)


class _BaseForward:
    """A method ``forward`` that calls the base and has the base's signature, from which ``transformers`` learns what a model takes."""

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:  # Trainer looks for labels in the class's
            return _forward

        @wraps(model.base.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # most bases ignore a keyword that they do not know, whatever it was meant to change
            if unknown := kwargs.keys() - _keywords(type(model.base).forward):
                raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
            for name in _OUTPUTS:
                if kwargs.get(name) is None and getattr(model.config, name):
                    kwargs[name] = True
            return model.base(*args, **kwargs)

        return forward


class DexForCausalLM(PreTrainedModel, GenerationMixin):
    """A pretrained model with the branch in it; everything else is the base's own."""

    config_class = DexModelConfig
    base_model_prefix = "base"
    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"w_d", "lambda_learn", "chosen", "schedule"}  # noqa: RUF012  # the type that the base class gives it

    def __init__(self, config: DexModelConfig, base: PreTrainedModel | None = None):
        attention = config._attn_implementation  # None, unless the caller asked for one
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config.base),
                dtype=torch.get_default_dtype(),
                trust_remote_code=False,
                attn_implementation=attention,
            )
            for branch in config.branches:
                _put(base, branch, config)
        self.base = base
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        config._attn_implementation = base.config._attn_implementation
        ties = getattr(base, "all_tied_weights_keys", {})
        self._tied_weights_keys = {
            f"base.{name}": f"base.{other}" for name, other in dict(ties).items()
        }
        self.generation_config = base.generation_config
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file."""

    def get_input_embeddings(self) -> nn.Module:
        """The base's."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's."""
        return self.base.get_output_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the base's."""
        self.base.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the base's."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the base's token embeddings, with the same arguments; both configs follow."""
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base = self.base.config.to_dict()
        self.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def set_step(self, step: int) -> None:
        """Give lambda(t) its t, the number of optimizer steps done; the saved config keeps it."""
        self.config.step = step
        for module in self.modules():
            if isinstance(module, DexProjection):
                module.set_step(step)

    forward = _BaseForward()

    @property
    def accepts_loss_kwargs(self) -> bool:
        """The base's attribute; missing where the base has none, so that transformers' Trainer reads the signature of ``forward``."""
        return bool(self.base.accepts_loss_kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's generate."""
        base: Any = self.base
        base.generation_config = self.generation_config
        return base.generate(*args, **kwargs)


def to_dex(adapted: Adapted, step: int) -> DexForCausalLM:
    """Wrap an adapted model, whose other trained parts are folded already.

    Args:
        adapted: the model with its branches.
        step: t.
    """
    first = adapted.branches[0]
    names = {module: name for name, module in adapted.model.named_modules()}
    branches = [
        {
            "output": names[branch],
            "num_heads": branch.num_heads,
            "width": branch.width,
            "heads": branch.heads,
            "layer": layer,
        }
        for layer, branch in enumerate(adapted.branches)
    ]
    share = Share.layer if first.w_d.ndim == 2 else Share.head
    base = adapted.model.config.to_dict()
    config = DexModelConfig(
        base, branches, share.value, first.sign, first.anneal_steps, step, dtype=adapted.model.dtype
    )
    return DexForCausalLM(config, adapted.model)


def _put(base: PreTrainedModel, branch: dict[str, Any], config: DexModelConfig) -> None:
    projection = DexProjection(
        base.get_submodule(branch["output"]),
        branch["num_heads"],
        branch["width"],
        branch["heads"],
        branch["layer"],
        share=Share(config.share),
        sign=config.sign,
        anneal_steps=config.anneal_steps,
    )
    projection.set_step(config.step)
    base.set_submodule(branch["output"], projection)
