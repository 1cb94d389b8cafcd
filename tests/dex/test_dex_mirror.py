"""Adding with a negated W_D is subtracting: both train to the same bits."""

import torch

from diffx.config.train import TrainConfig
from diffx.train.optimizer import build_optimizer


def train(adapted, inputs, steps=6):
    optimizer = build_optimizer(adapted.model, TrainConfig(lr=1e-2))
    losses = []
    for step in range(steps):
        adapted.set_step(step)
        loss = adapted.model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_mirrored_pair_trains_alike(make_model, put, inputs_of):
    pair = [put(make_model("llama"), variant, anneal_steps=3) for variant in ("dex", "dex_mirror")]
    first, second = (train(adapted, inputs_of(adapted.model)) for adapted in pair)
    assert first == second and first[-1] < first[0]
    for one, other in zip(pair[0].branches, pair[1].branches, strict=True):
        assert one.sign == -other.sign and one.w_d.abs().max() > 0
        assert torch.equal(one.w_d, -other.w_d) and torch.equal(
            one.lambda_learn, other.lambda_learn
        )
    assert (
        train(put(make_model("llama"), "dex_plus", anneal_steps=3), inputs_of(pair[0].model))
        != first
    )  # from the same W_D it does not
