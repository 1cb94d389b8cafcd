"""Attach a DEX variant to a pretrained model, and fold it into the weights."""

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
        model: the model, changed in place; only trained parameters require gradients, and they are
            fp32.
        branches: its DEX projections, layer by layer; empty where the variant has no branch.
        anneal_steps: T of equation 4; None without annealing.
        lora: the ``LoraModel`` of the variant ``lora``.
    """

    model: PreTrainedModel
    branches: list[DexProjection] = field(default_factory=list)
    anneal_steps: int | None = None
    lora: Any = None

    def set_step(self, step: int) -> None:
        """Set t of lambda(t): the number of optimizer steps done."""
        for branch in self.branches:
            branch.set_step(step)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], step: int, dtype: torch.dtype) -> None:
        """Load what was trained, for use without further training.

        Args:
            weights: a tensor for each name of ``trained``.
            step: optimizer steps done.
            dtype: of the model's weights, but not of W_D, lambda and buffers: positions rotated in
                bf16 would be others.
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
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }


def attach(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    config: DexConfig,
    heads: Sequence[Sequence[int]],
    anneal_steps: int,
    seed: int,
) -> Adapted:
    """Attach a variant to a model, in place.

    Args:
        model: the pretrained model; all its parameters are frozen first.
        layers: the result of ``find_layers``.
        config: the variant.
        heads: the heads chosen in each layer.
        anneal_steps: T of equation 4, for the variants that anneal.
        seed: seed of W_D.
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
    adapted = Adapted(model, anneal_steps=anneal_steps if variant.anneals else None)
    generator = torch.Generator().manual_seed(seed)
    for number, (layer, chosen) in enumerate(zip(layers, heads, strict=True)):
        if not variant.branches:
            break
        branch = DexProjection(
            model.get_submodule(layer.output),
            layer.num_heads,
            layer.width,
            list(chosen),
            number,
            share=config.share,
            sign=1 if variant in (Variant.dex_plus, Variant.dex_mirror) else -1,
            anneal_steps=adapted.anneal_steps,
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

    Branches are folded into the output projections in fp64, adapters are merged.

    Args:
        adapted: the model.
        keep_branch: keep the branches; fold everything else.
    """
    model = adapted.model
    if adapted.lora is not None:
        return adapted.lora.merge_and_unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, DexProjection) and not keep_branch:
            weight = projection_weight(module.proj)
            weight.copy_(module.folded_weight())
            model.set_submodule(name, module.proj)
        elif isinstance(module, PartlyTrained):
            projection_weight(module.proj).copy_(module.weight)
            model.set_submodule(name, module.proj)
    return model


def _train_projections(model: PreTrainedModel, layer: Layer) -> None:
    """Train W_K, W_V and W_O of a layer in fp32; of fused projections only keys and values."""
    rows: dict[str, set[int]] = {}
    for projection in [*layer.keys, *layer.values]:
        rows.setdefault(projection.name, set()).update(projection.rows)
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

    names = [
        projection.name
        for layer in layers
        for projection in [*layer.queries, *layer.keys, *layer.values]
    ]
    targets = sorted({*names, *(layer.output for layer in layers)})
    torch.manual_seed(seed)
    transposed = all(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=transposed,
    )
    lora = LoraModel(model, config, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lora


def parameter_counts(adapted: Adapted) -> dict[str, int]:
    """Count parameters.

    Returns:
        The trained ones, ``W_D``, ``lambda``, ``others`` (attention weights or adapters) and their
        sum ``trained``, and those of the whole adapted model, ``embedding``, ``rest`` and
        ``total``.
    """
    counts = {"W_D": 0, "lambda": 0, "others": 0}
    for name, parameter in adapted.trained().items():
        leaf = name.rpartition(".")[2]
        counts["W_D" if leaf == "w_d" else "lambda" if leaf == "lambda_learn" else "others"] += (
            parameter.numel()
        )
    total = sum(parameter.numel() for parameter in adapted.model.parameters())
    # they replace rows of `proj`
    total -= sum(
        module.rows.numel()
        for module in adapted.model.modules()
        if isinstance(module, PartlyTrained)
    )
    embedding = projection_weight(adapted.model.get_input_embeddings()).numel()
    return counts | {
        "trained": sum(counts.values()),
        "embedding": embedding,
        "rest": total - embedding,
        "total": total,
    }
