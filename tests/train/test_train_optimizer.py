import math

import pytest
import torch
from torch import nn

from diffx.config import UserError
from diffx.config.train import Schedule, TrainConfig
from diffx.train.optimizer import build_optimizer, learning_rate


def rates(**settings):
    config = TrainConfig(lr=1.0, **settings)
    return [learning_rate(step, config) for step in range(config.num_steps)]


def test_warmup_is_linear_and_reaches_the_peak():
    assert rates(steps=100, warmup=10)[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert TrainConfig(steps=1000, warmup=0.03).warmup_steps == 30
    assert TrainConfig(steps=40_000, warmup=375).warmup_steps == 375


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (Schedule.constant, lambda p: 1.0),
        (Schedule.linear, lambda p: 0.1 + 0.9 * (1 - p)),
        (Schedule.cosine, lambda p: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * p))),
    ],
)
def test_decay_follows_its_formula(schedule, expected):
    found = rates(steps=110, warmup=10, schedule=schedule, min_lr_ratio=0.1)[10:]
    assert found == pytest.approx([expected(n / 100) for n in range(100)])


def test_wsd_is_flat_and_then_linear():
    found = rates(steps=100, warmup=10, schedule=Schedule.wsd, decay_ratio=0.2)
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([1 - n / 20 for n in range(20)])


def test_the_papers_recipe_ends_at_its_final_rate():
    config = TrainConfig(steps=1000, lr=3.2e-4, min_lr_ratio=0.04, warmup=100)
    assert learning_rate(999, config) == pytest.approx(1.28e-5, rel=0.03)


def test_weight_decay_spares_vectors_and_lambdas():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.lambda_q1 = nn.Parameter(torch.zeros(2, 4))  # per head: a matrix, still a lambda
            self.lambda_proj = nn.Linear(4, 2, bias=False)  # V2's is an ordinary projection
            self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)

    toy = Toy()
    groups = build_optimizer(toy, TrainConfig(weight_decay=0.3)).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    plain = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
    assert decayed == {id(toy.proj.weight), id(toy.lambda_proj.weight)}
    assert plain == {id(toy.proj.bias), id(toy.lambda_q1)}


def test_steps_come_from_tokens_or_the_default():
    assert TrainConfig(tokens="1M", batch_tokens=2048, seq_len=256).num_steps == 489
    assert TrainConfig(steps="2K").num_steps == 2000
    with pytest.raises(UserError, match="give one"):
        TrainConfig(steps=5, tokens=5)
