"""DEX trained by ``transformers.Trainer``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from diffx.config.checks import refuse, require
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
        setting, advice = f"model={type(model).__name__}", "make one with diffx.dex.get_dex_model"
        refuse(not dex_models, setting, f"it holds no DexForCausalLM; {advice}", "DexCallback")
        for dex_model in dex_models:
            dex_model.set_step(state.global_step)

    on_step_end = on_train_begin


def get_dex_model(
    model: PreTrainedModel, config: DexConfig, calibration: Sequence[Tensor] = (), seed: int = 0
) -> DexForCausalLM:
    """Put a variant with a branch into a causal model, in place, to be trained by ``Trainer``.

    Trained weights become fp32; load the base in fp32, or train with autocast (``bf16=True``).
    Entropy and importance are those on ``calibration``, tokens (B, T) each.

    Raises:
        UserError: the variant has no branch, a setting is missing, or the attention of the model
            cannot be analysed or has one projection for queries, keys and values.
    """
    from diffx.dex.heads import choose_heads, load_plan  # imports matplotlib

    variant, heads = config.variant, config.heads
    with_branch = "a variant with a branch: " + ", ".join(kind for kind in Variant if kind.branches)
    require(variant.branches, "dex.variant", variant.value, with_branch)
    steps_known = config.anneal_steps is not None or not variant.anneals
    require(steps_known, "dex.anneal_steps", "null", "a whole number, such as half of the steps")
    by_text = heads.startswith(("entropy", "importance"))
    refuse(by_text and not calibration, f"dex.heads={heads}", "it needs calibration=, some tokens")
    layers, fingerprint = find_layers(model), fingerprint_of(model) or ""
    if heads in CRITERIA:
        plan = choose_heads(model, layers, config, calibration, fingerprint, seed)
    else:
        plan = load_plan(Path(heads), fingerprint, layers)
    adapted = attach(model, layers, config, plan.heads, int(config.anneal_steps or 0), seed)
    refuse(
        any(isinstance(module, PartlyTrained) for module in model.modules()),
        f"dex.variant={variant.value}",
        f"queries, keys and values of {type(model).__name__} are one projection; use "
        "dex.variant=adapter_only, or `diffx adapt-dex`",
    )
    return to_dex(adapted, 0)
