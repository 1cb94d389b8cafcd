"""An adapted model with its branch as a model of ``transformers``, for ``export fold=false``."""

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


def _forward(
    self: Any, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    return self.forward(input_ids=input_ids, labels=labels, **kwargs)


@lru_cache
def _keywords(forward: Callable[..., Any]) -> set[str]:
    """Keywords that the ``forward`` of a base accepts, those of its ``**kwargs`` included."""
    names = inspect.signature(forward).parameters
    other = {"return_dict", "past_key_values"} if "cache" in names else {"return_dict"}
    return {*names, *TransformersKwargs.__annotations__, *other}


class _BaseForward:
    """A ``forward`` with the signature of the base, which ``transformers`` inspects."""

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:  # Trainer inspects the method of the class for labels
            return _forward

        @wraps(model.base.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # most bases ignore keywords that they do not know
            if unknown := kwargs.keys() - _keywords(type(model.base).forward):
                raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}")
            for name in ("output_attentions", "output_hidden_states"):
                if kwargs.get(name) is None and getattr(model.config, name):
                    kwargs[name] = True
            return model.base(*args, **kwargs)

        return forward


class DexForCausalLM(PreTrainedModel, GenerationMixin):
    """A pretrained model with the branch in it; everything else is that of the base."""

    config_class = DexModelConfig
    base_model_prefix = "base"
    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"w_d", "lambda_learn", "chosen", "schedule"}  # noqa: RUF012  # the type that the base class gives it
    forward = _BaseForward()

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
            common: dict[str, Any] = {"sign": config.sign, "anneal_steps": config.anneal_steps}
            for branch in config.branches:
                shape: dict[str, Any] = {key: branch[key] for key in branch if key != "output"}
                output = base.get_submodule(branch["output"])
                projection = DexProjection(output, share=Share(config.share), **common, **shape)
                base.set_submodule(branch["output"], projection)
        self.base = base
        self.supports_gradient_checkpointing = base.supports_gradient_checkpointing
        config._attn_implementation = base.config._attn_implementation
        ties = dict(getattr(base, "all_tied_weights_keys", {}))
        self._tied_weights_keys = {f"base.{name}": f"base.{ties[name]}" for name in ties}
        self.generation_config = base.generation_config
        self.post_init()
        self.set_step(config.step)

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file."""

    def get_output_embeddings(self) -> nn.Module | None:
        """The output embeddings of the base."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output embeddings of the base."""
        self.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the token embeddings of the base and change both configs."""
        embeddings = self.base.resize_token_embeddings(*args, **kwargs)
        self.config.base = self.base.config.to_dict()
        self.config.vocab_size = embeddings.num_embeddings
        return embeddings

    def set_step(self, step: int) -> None:
        """Set t of lambda(t), the number of optimizer steps done, here and in the config."""
        self.config.step = step
        for module in self.modules():
            if isinstance(module, DexProjection):
                module.set_step(step)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """As in the base; without it there, Trainer inspects ``forward``."""
        return bool(self.base.accepts_loss_kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the base and the generation config of this model."""
        base: Any = self.base
        base.generation_config = self.generation_config
        return base.generate(*args, **kwargs)


def to_dex(adapted: Adapted, step: int) -> DexForCausalLM:
    """Wrap an adapted model, whose other trained parts are folded, at ``step`` of lambda(t)."""
    model, first = adapted.model, adapted.branches[0]
    names = {module: name for name, module in model.named_modules()}
    branches = [
        {"output": names[branch], "layer": layer}
        | {key: getattr(branch, key) for key in ("num_heads", "width", "heads")}
        for layer, branch in enumerate(adapted.branches)
    ]
    share = (Share.layer if first.w_d.ndim == 2 else Share.head).value
    steps, base = first.anneal_steps, model.config.to_dict()
    config = DexModelConfig(base, branches, share, first.sign, steps, step, dtype=model.dtype)
    return DexForCausalLM(config, model)
