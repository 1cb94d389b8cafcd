"""AdamW and the learning-rate schedule: one recipe for every architecture."""

import math

import torch
from torch import nn

from diffx.config.train import Schedule, TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the parameters that require gradients.

    Weight decay acts on matrices (embeddings included), not on norm gains, biases, lambda vectors.
    """
    groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # One lambda vector a head makes a matrix of them, so they are told by their name.
            vector = parameter.ndim < 2 or name.rpartition(".")[2].startswith("lambda_")
            groups[0.0 if vector else config.weight_decay].append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for decay, group in groups.items() if group],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the update after ``step`` updates."""
    total, warmup = config.num_steps, config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    start = warmup
    if config.schedule is Schedule.wsd:
        start = max(warmup, round(total * (1 - config.decay_ratio)))
    # The last update still moves: the floor would be reached one step after it.
    progress = min(max(step - start, 0) / max(total - start, 1), 1.0)
    if config.schedule is Schedule.constant:
        share = 1.0
    elif config.schedule is Schedule.cosine:
        share = (1 + math.cos(math.pi * progress)) / 2
    else:
        share = 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)
