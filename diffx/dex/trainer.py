"""DEX trained by ``transformers.Trainer``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from diffx.config import UserError
from diffx.config.dex import CRITERIA, DexConfig, Variant
from diffx.dex.attach import attach
from diffx.dex.layer import PartlyTrained
from diffx.dex.layout import find_layers
from diffx.dex.pretrained import fingerprint_of
from diffx.dex.registered import DexForCausalLM, to_dex


class DexCallback(TrainerCallback):
    """Sets t of lambda(t) in a ``DexForCausalLM``, before evaluation; else lambda stays 0."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the step that the training starts with, which is not 0 in a resumed run.

        Raises:
            UserError: the model has no branch.
        """
        model = kwargs["model"]
        dex_models = [module for module in model.modules() if isinstance(module, DexForCausalLM)]
        if not dex_models:
            raise UserError(
                f"model={type(model).__name__} cannot be used with DexCallback: it holds no "
                "DexForCausalLM; make one with diffx.dex.get_dex_model"
            )
        for dex_model in dex_models:
            dex_model.set_step(state.global_step)

    on_step_end = on_train_begin


def get_dex_model(
    model: PreTrainedModel, config: DexConfig, calibration: Sequence[Tensor] = (), seed: int = 0
) -> DexForCausalLM:
    """Put a variant with a branch into a pretrained model, to be trained by ``Trainer``.

    The weights that the variant trains become fp32; the others are frozen. Load the base in fp32,
    or train with autocast (``bf16=True``).

    Args:
        model: a causal model of ``transformers``; changed in place.
        config: the variant, with ``anneal_steps`` unless its lambda is fixed.
        calibration: tokens (B, T) for the entropy and importance criteria.
        seed: of W_D and of ``heads=random``.

    Raises:
        UserError: the variant has no branch, a setting is missing, or the attention of the model
            cannot be analysed or has one projection for queries, keys and values.
    """
    from diffx.dex.heads import choose_heads, load_plan  # imports matplotlib

    variant = config.variant
    if not variant.branches:
        raise UserError(
            f"dex.variant={variant.value} cannot be used here: it has no branch; accepted: "
            + ", ".join(other for other in Variant if other.branches)
        )
    if variant.anneals and config.anneal_steps is None:
        raise UserError(
            "dex.anneal_steps=null cannot be used here: the number of steps is not known; give a "
            "whole number, such as half of them"
        )
    if config.heads.startswith(("entropy", "importance")) and not calibration:
        raise UserError(
            f"dex.heads={config.heads} cannot be used without calibration=, the tokens to choose by"
        )
    layers = find_layers(model)
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
