"""DEX trained by ``transformers.Trainer``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from diffx.config import UserError
from diffx.config.dex import CRITERIA, DexConfig
from diffx.dex.attach import attach
from diffx.dex.layer import DexProjection, PartlyTrained
from diffx.dex.layout import find_layers
from diffx.dex.pretrained import fingerprint_of
from diffx.dex.registered import DexForCausalLM, to_dex


class DexCallback(TrainerCallback):
    """Gives lambda(t) of a ``DexForCausalLM`` its step; without it lambda stays 0.

    Evaluation and checkpoints come after the step that they follow; a resumed run starts with the
    step of its checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step that the training starts with.

        Raises:
            UserError: the model has no branch.
        """
        _set_step(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step that was reached."""
        _set_step(kwargs["model"], state.global_step)


def _set_step(model: torch.nn.Module, step: int) -> None:
    dex_models = [module for module in model.modules() if isinstance(module, DexForCausalLM)]
    if not dex_models:
        raise UserError(
            f"model={type(model).__name__} cannot be used with DexCallback: it holds no "
            "DexForCausalLM; make one with diffx.dex.get_dex_model"
        )
    for dex_model in dex_models:
        dex_model.set_step(step)


def get_dex_model(
    model: PreTrainedModel,
    config: DexConfig,
    calibration: Sequence[Tensor] = (),
    seed: int = 0,
) -> DexForCausalLM:
    """Put a variant with a branch into a pretrained model, to be trained by ``Trainer``.

    What the variant trains becomes fp32 and requires gradients; the rest is frozen. Load the base
    in fp32, or train with autocast (``bf16=True``).

    Args:
        model: a causal model of ``transformers``; changed in place.
        config: the variant, with ``anneal_steps`` unless its lambda is fixed.
        calibration: tokens (B, T) by which the entropy and importance criteria choose heads.
        seed: of W_D and of ``heads=random``.

    Raises:
        UserError: the variant has no branch, a setting is missing, or the model's attention is not
            understood or fused so that its weights cannot be trained here.
    """
    from diffx.dex.heads import choose_heads, load_plan  # imports matplotlib

    variant = config.variant
    if not variant.branches:
        raise UserError(
            f"dex.variant={variant.value} cannot be used here: it has no branch; accepted: dex, "
            "dex_plus, dex_mirror, adapter_only, fixed_lambda"
        )
    if any(isinstance(module, DexProjection) for module in model.modules()):
        raise UserError(f"model={type(model).__name__} cannot be used: it has a DEX branch already")
    if variant.anneals and config.anneal_steps is None:
        raise UserError(
            "dex.anneal_steps=null cannot be used here: the number of steps is not known; give half of them, or another whole number"
        )
    if config.heads.startswith(("entropy", "importance")) and not calibration:
        raise UserError(
            f"dex.heads={config.heads} cannot be used without calibration=, tokens to choose heads by"
        )
    layers = find_layers(model, {"input_ids": torch.tensor([[0, 1]], device=model.device)})
    fingerprint = fingerprint_of(model) or ""
    if config.heads in CRITERIA:
        plan = choose_heads(model, layers, config, calibration, fingerprint, seed)
    else:
        plan = load_plan(Path(config.heads), fingerprint, layers)
    adapted = attach(model, layers, config, plan.heads, int(config.anneal_steps or 0), seed)
    if any(isinstance(module, PartlyTrained) for module in model.modules()):
        raise UserError(
            f"dex.variant={variant.value} cannot be used here with {type(model).__name__}, whose "
            "queries, keys and values are one projection; use dex.variant=adapter_only, or "
            "`diffx adapt-dex`"
        )
    return to_dex(adapted, 0)
