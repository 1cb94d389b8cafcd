"""What distribution and memory do to a model leaves its figures as they are."""

from collections import Counter
from functools import partialmethod

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffx.config.model import MODEL_CONFIGS
from diffx.config.train import TrainConfig
from diffx.models import build_model, init_weights
from diffx.models.attention import attention_modules
from diffx.ops import sdpa
from diffx.train.loop import token_losses
from diffx.train.optimizer import build_optimizer
from diffx.train.parallel import World, parallelize


class Count(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def step(config, implementation, checkpointing):
    model = build_model(config)
    init_weights(model, 0)
    parallelize(
        model,
        model.layers,
        TrainConfig(activation_checkpointing=checkpointing),
        World(torch.device("cpu")),
    )
    for module in attention_modules(model):
        module.implementation = implementation
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    with Count() as count:
        loss = model(ids, targets=ids)
        loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()], count.calls


@pytest.mark.parametrize("kind", ["diff_v1", "diff_gda", "diff_v2", "transformer"])
def test_fused_attention_is_a_property_of_the_model(kind):
    kernels = pytest.importorskip("diffx.ops.triton_attention", exc_type=ImportError)
    config = MODEL_CONFIGS[kind](
        vocab_size=50, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=48
    )
    fused, plain = build_model(config), build_model(config)
    for model, wanted in ((fused, True), (plain, False)):
        parallelize(
            model, model.layers, TrainConfig(fused_attention=wanted), World(torch.device("cuda"))
        )  # which allocates nothing
    expected = kernels if kind in ("diff_v1", "diff_gda") else None  # one ordinary call
    assert [module.implementation for module in attention_modules(fused)] == [expected] * 2
    assert [module.implementation for module in attention_modules(plain)] == [None] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["sdpa", "triton"])
def test_activations_are_computed_again_but_not_attention(kernels):
    """Attention runs once per layer and call, matrix products twice; the results are equal."""
    config = MODEL_CONFIGS["diff_v1"](
        vocab_size=50, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=48, init_std=0.2
    )
    implementation, name, calls = sdpa, "aten::_scaled_dot_product_flash_attention_for_cpu", 2 * 3
    if kernels == "triton":
        implementation = pytest.importorskip("diffx.ops.triton_attention", exc_type=ImportError)
        name, calls = "diffx::differential_attention", 3
    plain, checkpointed = step(config, implementation, False), step(config, implementation, True)
    torch.testing.assert_close(plain[0], checkpointed[0])
    for one, other in zip(plain[1], checkpointed[1], strict=True):
        torch.testing.assert_close(one, other)
    assert plain[2][name] == checkpointed[2][name] == calls
    assert checkpointed[2]["aten::mm"] > plain[2]["aten::mm"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "diff_v1", "diff_v2"])
def test_compiled_blocks_are_not_compiled_again(kind, monkeypatch):
    """Two steps and a validation compile everything; later steps compile nothing."""
    monkeypatch.setattr(
        nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager")
    )  # which is quick
    model = build_model(
        MODEL_CONFIGS[kind](
            vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=48
        )
    )
    init_weights(model, 0)
    parallelize(model, model.layers, TrainConfig(compile=True), World(torch.device("cpu")))
    optimizer = build_optimizer(model, TrainConfig())
    generator = torch.Generator().manual_seed(0)

    def run(steps):
        for _ in range(steps):
            ids = torch.randint(50, (2, 20), generator=generator)
            token_losses(model.train(), ids, ids, None).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            token_losses(model.eval(), ids, ids, None)

    torch._dynamo.reset()
    run(1)
    run(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(3)
        run(2)
