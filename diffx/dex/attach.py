"""Attach a DEX variant to a pretrained model, and fold it into the weights."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from diffx.config.dex import DexConfig, Variant
from diffx.dex.layer import DexProjection, PartlyTrained, projection_weight
from diffx.dex.layout import Layer


@dataclass
class Adapted:
    """A pretrained model with a variant; only trained parameters, in fp32, require gradients."""

    model: PreTrainedModel
    branches: list[DexProjection] = field(default_factory=list)  # one for each layer, or none
    lora: Any = None  # the LoraModel of the variant `lora`

    def set_step(self, step: int) -> None:
        """Set t of lambda(t): the number of optimizer steps done."""
        for branch in self.branches:
            branch.set_step(step)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], step: int, dtype: torch.dtype) -> None:
        """Load the weights of ``trained``, end at ``step``, cast all but W_D and lambda."""
        for name, parameter in self.trained().items():
            parameter.copy_(weights[name])
        self.set_step(step)
        for module in self.model.modules():
            if not isinstance(module, DexProjection):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.model.requires_grad_(False)

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        named = self.model.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


def attach(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    config: DexConfig,
    heads: Sequence[Sequence[int]],
    anneal_steps: int,
    seed: int,
) -> Adapted:
    """Attach a variant to a model, in place; weights that it does not train are frozen.

    ``heads`` are those chosen in each of ``layers``, ``anneal_steps`` is T of equation 4.
    """
    adapted, variant = Adapted(model.requires_grad_(False)), config.variant
    if variant is Variant.full:
        model.float().requires_grad_(True)
    elif variant is Variant.lora:
        adapted.lora = _lora(model, layers, config.lora_rank, seed)
    elif variant is not Variant.adapter_only:
        for layer in layers:
            _train_projections(model, layer)
    if not variant.branches:
        return adapted
    generator = torch.Generator().manual_seed(seed)
    for number, (layer, chosen) in enumerate(zip(layers, heads, strict=True)):
        branch = DexProjection(
            model.get_submodule(layer.output),
            layer.num_heads,
            layer.width,
            list(chosen),
            number,
            share=config.share,
            sign=1 if variant in (Variant.dex_plus, Variant.dex_mirror) else -1,
            anneal_steps=anneal_steps if variant.anneals else None,
        )
        branch.initialize(config.init, generator)
        if variant is Variant.dex_mirror:
            branch.w_d.data.neg_()
        model.set_submodule(layer.output, branch)
        adapted.branches.append(branch)
    return adapted


@torch.no_grad()
def fold(adapted: Adapted, keep_branch: bool = False) -> PreTrainedModel:
    """Make a plain model, in place: LoRA merged, and branches folded in fp64 or kept."""
    if adapted.lora is not None:
        return adapted.lora.merge_and_unload()
    for name, module in list(adapted.model.named_modules()):
        if isinstance(module, PartlyTrained):
            weight = module.weight
        elif isinstance(module, DexProjection) and not keep_branch:
            weight = module.folded_weight()
        else:
            continue
        projection_weight(module.proj).copy_(weight)
        adapted.model.set_submodule(name, module.proj)
    return adapted.model


def _train_projections(model: PreTrainedModel, layer: Layer) -> None:
    """Train W_K, W_V and W_O of a layer in fp32; of fused projections only keys and values."""
    rows = defaultdict[str, set[int]](set)
    for projection in [*layer.keys, *layer.values]:
        rows[projection.name].update(projection.rows)
    whole = [layer.output]
    for name, chosen in rows.items():
        module = model.get_submodule(name)
        if len(chosen) < projection_weight(module).shape[isinstance(module, Conv1D)]:
            model.set_submodule(name, PartlyTrained(module, sorted(chosen)))
        else:
            whole.append(name)
    for name in whole:
        weight = projection_weight(model.get_submodule(name))
        weight.data = weight.data.float()
        weight.requires_grad_(True)


def _lora(model: PreTrainedModel, layers: Sequence[Layer], rank: int, seed: int) -> Any:
    from peft import LoraConfig, LoraModel  # slow to import, and only one variant needs it

    targets = sorted({name for layer in layers for name in layer.names})
    conv = all(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=conv)
    lora = LoraModel(model, config, "default")
    for parameter in Adapted(model).trained().values():
        parameter.data = parameter.data.float()
    return lora


def parameter_counts(adapted: Adapted) -> dict[str, int]:
    """Count the parameters: W_D, lambda, others (attention or LoRA) and their sum ``trained``.

    ``embedding`` and ``rest`` sum up to the ``total`` of the model.
    """
    counts = {"W_D": 0, "lambda": 0, "others": 0}
    parts = {"w_d": "W_D", "lambda_learn": "lambda"}
    for name, parameter in adapted.trained().items():
        counts[parts.get(name.rpartition(".")[2], "others")] += parameter.numel()
    counts["trained"] = sum(counts.values())
    total = sum(parameter.numel() for parameter in adapted.model.parameters())
    parts_of = (part for part in adapted.model.modules() if isinstance(part, PartlyTrained))
    total -= sum(part.rows.numel() for part in parts_of)  # they replace rows of `proj`
    embedding = projection_weight(adapted.model.get_input_embeddings()).numel()
    return counts | {"embedding": embedding, "rest": total - embedding, "total": total}
