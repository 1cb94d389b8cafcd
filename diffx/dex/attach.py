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
    """A pretrained model with a variant attached.

    Attributes:
        model: the model; only trained parameters, in fp32, require gradients.
        branches: the DEX projection of each layer; empty where the variant has no branch.
        lora: the ``LoraModel`` of the variant ``lora``.
    """

    model: PreTrainedModel
    branches: list[DexProjection] = field(default_factory=list)
    lora: Any = None

    def set_step(self, step: int) -> None:
        """Set t of lambda(t): the number of optimizer steps done."""
        for branch in self.branches:
            branch.set_step(step)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], step: int, dtype: torch.dtype) -> None:
        """Load ``weights`` for the names of ``trained`` and end the training at ``step``.

        All weights but W_D and lambda are cast to ``dtype``.
        """
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

    ``layers`` comes from ``find_layers``, ``heads`` are those chosen in each layer,
    ``anneal_steps`` is T of equation 4, and ``seed`` is that of W_D and LoRA.
    """
    variant = config.variant
    model.requires_grad_(False)
    if variant is Variant.full:
        model.float().requires_grad_(True)
        return Adapted(model)
    if variant is Variant.lora:
        return Adapted(model, lora=_lora(model, layers, config.lora_rank, seed))
    if variant is not Variant.adapter_only:
        for layer in layers:
            _train_projections(model, layer)
    adapted = Adapted(model)
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
    """Turn the model, in place, into an equivalent plain one.

    Branches are folded into the output projections in fp64, unless ``keep_branch`` is true; LoRA
    is merged.
    """
    model = adapted.model
    if adapted.lora is not None:
        return adapted.lora.merge_and_unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, PartlyTrained):
            weight = module.weight
        elif isinstance(module, DexProjection) and not keep_branch:
            weight = module.folded_weight()
        else:
            continue
        projection_weight(module.proj).copy_(weight)
        model.set_submodule(name, module.proj)
    return model


def _train_projections(model: PreTrainedModel, layer: Layer) -> None:
    """Train W_K, W_V and W_O of a layer in fp32; of fused projections only keys and values."""
    rows = defaultdict[str, set[int]](set)
    for projection in [*layer.keys, *layer.values]:
        rows[projection.name].update(projection.rows)
    for name, chosen in rows.items():
        module = model.get_submodule(name)
        weight = projection_weight(module)
        if len(chosen) < weight.shape[1 if isinstance(module, Conv1D) else 0]:
            model.set_submodule(name, PartlyTrained(module, sorted(chosen)))
        else:
            _train_in_fp32(module)
    _train_in_fp32(model.get_submodule(layer.output))


def _train_in_fp32(module: nn.Module) -> None:
    weight = projection_weight(module)
    weight.data = weight.data.float()
    weight.requires_grad_(True)


def _lora(model: PreTrainedModel, layers: Sequence[Layer], rank: int, seed: int) -> Any:
    from peft import LoraConfig, LoraModel  # slow to import, and only one variant needs it

    targets = sorted({name for layer in layers for name in layer.names})
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in targets),
    )
    lora = LoraModel(model, config, "default")
    for parameter in Adapted(model).trained().values():
        parameter.data = parameter.data.float()
    return lora


def parameter_counts(adapted: Adapted) -> dict[str, int]:
    """Count parameters.

    Returns:
        The trained ones, ``W_D``, ``lambda``, ``others`` (attention weights or LoRA) and their sum
        ``trained``; and those of the whole model, ``embedding``, ``rest`` and their ``total``.
    """
    counts = {"W_D": 0, "lambda": 0, "others": 0}
    parts = {"w_d": "W_D", "lambda_learn": "lambda"}
    for name, parameter in adapted.trained().items():
        counts[parts.get(name.rpartition(".")[2], "others")] += parameter.numel()
    total = sum(parameter.numel() for parameter in adapted.model.parameters())
    for module in adapted.model.modules():
        if isinstance(module, PartlyTrained):  # its rows replace those of `proj`
            total -= module.rows.numel()
    embedding = projection_weight(adapted.model.get_input_embeddings()).numel()
    return counts | {
        "trained": sum(counts.values()),
        "embedding": embedding,
        "rest": total - embedding,
        "total": total,
    }
