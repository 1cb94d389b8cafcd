"""An adapted model that keeps its branch, as a model of ``transformers``: what ``diffx export fold=false`` writes."""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from diffx.config.dex import Share
from diffx.dex.attach import Adapted
from diffx.dex.layer import DexProjection
from diffx.hub.configs import DexConfig


def _forward(self: Any, input_ids: Tensor | None = None, *, labels: Tensor | None = None, **kwargs: Any) -> Any:
    """The base's forward, which takes or refuses each keyword."""
    return self.base(input_ids=input_ids, labels=labels, **kwargs)


class _BaseForward:
    """A method ``forward`` that calls the base and has the base's signature, from which ``transformers`` learns what a model takes."""

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:  # Trainer looks for labels in the class's
            return _forward

        @wraps(model.base.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return model.base(*args, **kwargs)

        return forward


class DexForCausalLM(PreTrainedModel, GenerationMixin):
    """A pretrained model with the branch in it; everything else is the base's own."""

    config_class = DexConfig
    base_model_prefix = "base"
    _supports_sdpa = _supports_flash_attn = True
    _keep_in_fp32_modules_strict = {"w_d", "lambda_learn", "chosen", "schedule"}  # noqa: RUF012  # the type that the base class gives it

    def __init__(self, config: DexConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        if base is None:
            base = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config.base), dtype=torch.get_default_dtype(), trust_remote_code=False
            )
            for branch in config.branches:
                _put(base, branch, config)
        self.base = base
        ties = getattr(base, "all_tied_weights_keys", {})
        self._tied_weights_keys = {f"base.{name}": f"base.{other}" for name, other in dict(ties).items()}
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


def to_registered(adapted: Adapted, step: int) -> DexForCausalLM:
    """Wrap an adapted model, whose other trained parts are folded already.

    Args:
        adapted: the model with its branches.
        step: t.
    """
    first = adapted.branches[0]
    names = {module: name for name, module in adapted.model.named_modules()}
    branches = [
        {"output": names[branch], "num_heads": branch.num_heads, "width": branch.width, "heads": branch.heads, "layer": layer}
        for layer, branch in enumerate(adapted.branches)
    ]
    share = Share.layer if first.w_d.ndim == 2 else Share.head
    base = adapted.model.config.to_dict()
    config = DexConfig(base, branches, share.value, first.sign, first.anneal_steps, step, dtype=adapted.model.dtype)
    return DexForCausalLM(config, adapted.model)


def _put(base: PreTrainedModel, branch: dict[str, Any], config: DexConfig) -> None:
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
