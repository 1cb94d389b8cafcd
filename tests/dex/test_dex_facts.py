"""Properties of DEX (arXiv 2505.16333) on a tiny random model of each family."""

import math

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from diffx.config import UserError
from diffx.config.dex import DexConfig, Init, Share, Variant
from diffx.dex.attach import fold
from diffx.dex.layer import DexProjection, PartlyTrained

BRANCHES = ["dex", "dex_plus", "adapter_only", "fixed_lambda"]
EVERY = [variant.value for variant in Variant]
STEP = 3  # of 8: in the middle of annealing


def lambda_of(branch):
    return float(branch.lambda_value().detach())


class Entering:
    """What enters a module, by forward pre-hook."""

    def __init__(self, module):
        module.register_forward_pre_hook(
            lambda _, args: setattr(self, "value", args[0].detach().clone())
        )


# 1. Identity.


@pytest.mark.parametrize("variant", EVERY)
def test_at_step_0_the_model_is_the_pretrained_one_bit_for_bit(
    family, variant, make_model, put, read
):
    model = make_model(family)
    before = read(model)
    put(model, variant)
    assert torch.equal(read(model), before)


@pytest.mark.parametrize("kind", ["bert", "vit"])
@pytest.mark.parametrize("variant", ["dex", "fixed_lambda", "attn_only"])
def test_an_encoder_and_a_vision_transformer_too(kind, variant, make_model, put, read, shake):
    model = make_model(kind)
    before = read(model)
    adapted = put(model, variant)
    assert torch.equal(read(model), before)
    shake(adapted)
    adapted.set_step(STEP)
    model.double()
    changed = read(model)
    assert (changed.float() - before).abs().max() > 1e-2
    torch.testing.assert_close(read(fold(adapted)), changed, rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, DexProjection | PartlyTrained) for module in model.modules())


@pytest.mark.parametrize("share", Share)
def test_heads_that_are_not_chosen_stay_bit_for_bit_and_the_others_are_as_equation_3_says(
    family, share, make_model, put, read
):
    model = make_model(family)
    adapted = put(model, share=share)
    first = adapted.branches[0]
    before, after = Entering(first), Entering(first.proj)
    projected = []
    first.register_forward_hook(lambda module, args, output: projected.append(output))
    with torch.no_grad():
        first.lambda_learn.fill_(0.3)
    for step in (0, 2, 5, 8, 16):
        adapted.set_step(step)
        read(model)
        o = before.value.unflatten(-1, (first.num_heads, first.width))  # (B, T, H, d_v)
        new = after.value.view_as(o)
        others = [head for head in range(first.num_heads) if head not in first.heads]
        assert torch.equal(new[..., others, :], o[..., others, :])
        expected = o.double().clone()
        for head in first.heads:
            w_d = (first.w_d if share is Share.layer else first.w_d[head]).double()
            expected[..., head, :] -= lambda_of(first) * o[..., head, :].double() @ w_d
        torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-5)
        weight, bias = first.proj.weight.double(), first.proj.bias
        out = expected.flatten(-2) @ (weight if isinstance(first.proj, Conv1D) else weight.T) + (
            0 if bias is None else bias.double()
        )
        torch.testing.assert_close(projected[-1].double(), out, rtol=1e-4, atol=1e-4)
        assert step == 0 or (new - o)[..., first.heads, :].abs().max() > 1e-4


# 2. The dead point.


def test_the_dead_point_is_refused(make_model, put):
    for variant in ("dex", "dex_plus", "adapter_only"):
        with pytest.raises(
            UserError, match=r"dex\.anneal_steps=0 cannot be used with dex\.init=zeros"
        ) as caught:
            DexConfig(variant=Variant(variant), anneal_steps=0, init=Init.zeros)
        assert "\n" not in str(caught.value)
        DexConfig(variant=Variant(variant), anneal_steps=0, init=Init.linear)
    for variant in ("fixed_lambda", "attn_only", "lora", "full"):
        DexConfig(variant=Variant(variant), anneal_steps=0, init=Init.zeros)


@pytest.mark.parametrize(
    ("init", "anneal_steps", "w_d", "lam"),
    [("zeros", 0, 0, 0), ("linear", 0, 0, 1), ("zeros", 8, 1, 0)],
)
def test_why_it_is_one(init, anneal_steps, w_d, lam, make_model, put, inputs_of):
    model = make_model("llama")
    adapted = put(model, "adapter_only", anneal_steps=anneal_steps, init=Init(init))
    adapted.set_step(1)
    model(**inputs_of(model)).logits.logsumexp(-1).sum().backward()
    for branch in adapted.branches:
        assert bool(branch.w_d.grad.abs().max() > 0) is bool(w_d)
        assert bool(branch.lambda_learn.grad.abs().max() > 0) is bool(lam)


# 3. The fold.


@pytest.mark.parametrize("variant", EVERY)
def test_the_fold_is_exact(family, variant, make_model, put, read, shake):
    model = make_model(family)
    before = read(model)
    adapted = put(model, variant, share=Share.head if variant == "dex_plus" else Share.layer)
    shake(adapted)
    adapted.set_step(STEP)
    changed = read(model)
    exact = read(model.double())
    assert (exact - before).abs().max() > 1e-2
    names = [name for name, _ in make_model(family).named_parameters()]
    folded = fold(adapted)
    torch.testing.assert_close(read(folded), exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(read(folded.float()), changed, rtol=1e-4, atol=1e-4)
    assert [name for name, _ in folded.named_parameters()] == names and type(folded) is type(
        make_model(family)
    )


# 4. Lambda.


@pytest.mark.parametrize("layer", [0, 5, 31])
def test_lambda_is_equation_4(layer):
    total, learned = 16, 0.25
    branch = DexProjection(torch.nn.Linear(8, 8), 2, 4, [0], layer, anneal_steps=total)
    with torch.no_grad():
        branch.lambda_learn.fill_(learned)
    lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
    for step in (0, total // 4, total - 1, total, 2 * total):
        a = min(1.0, step / total)
        expected = (1 - a) * (step / total) * lambda_init + a * learned
        branch.set_step(step)
        assert lambda_of(branch) == pytest.approx(expected, rel=1e-6, abs=0)
    assert branch.lambda_value().dtype is torch.float32
    assert lambda_of(branch) == learned  # from T on it is the learned one, to the last bit
    branch.set_step(0)
    assert lambda_of(branch) == 0.0


def test_fixed_lambda_is_lambda_init_at_every_step(make_model, put):
    adapted = put(make_model("llama"), "fixed_lambda")
    for step in (0, 3, 100):
        adapted.set_step(step)
        assert [lambda_of(branch) for branch in adapted.branches] == pytest.approx(
            [0.2, 0.8 - 0.6 * math.exp(-0.3)]
        )
    assert all(branch.lambda_learn is None for branch in adapted.branches)


def test_the_forward_pass_never_waits_for_the_device(make_model, put, inputs_of, monkeypatch):
    model = make_model("llama")
    put(model).set_step(STEP)
    for name in ("item", "tolist", "cpu", "__float__", "__bool__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} in the branch")
        )
    branch = model.model.layers[0].self_attn.o_proj
    branch(torch.zeros(1, 3, 32))


# 5. The sign.


def test_dex_and_dex_plus_from_the_negated_w_d_are_mirror_images(make_model, put, inputs_of):
    pair = []
    for variant in ("dex", "dex_plus"):
        model = make_model("qwen3")
        adapted = put(model, variant)
        if variant == "dex_plus":
            with torch.no_grad():
                for branch in adapted.branches:
                    branch.w_d.neg_()
        optimizer = torch.optim.AdamW(
            adapted.trained().values(), lr=1e-2, weight_decay=0.1, fused=True
        )
        outputs = []
        for step in range(6):
            adapted.set_step(step)
            logits = model(**inputs_of(model)).logits
            outputs.append(logits.detach())
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), inputs_of(model)["input_ids"][:, 1:].flatten()
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
        pair.append((adapted, outputs))
    (minus, first), (plus, second) = pair
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[-1])
    for name, value in minus.trained().items():
        assert torch.equal(
            value, -plus.trained()[name] if name.endswith("w_d") else plus.trained()[name]
        ), name


# 6. Types.


@pytest.mark.parametrize("variant", EVERY)
def test_under_a_bf16_base_what_is_trained_is_fp32(variant, make_model, put, inputs_of):
    model = make_model("phi3").to(torch.bfloat16)
    adapted = put(model, variant)
    assert {parameter.dtype for parameter in adapted.trained().values()} == {torch.float32}
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen <= {torch.bfloat16}
    adapted.set_step(STEP)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**inputs_of(model)).logits
    logits.float().logsumexp(-1).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype is torch.float32
        for parameter in adapted.trained().values()
    )


def test_w_d_and_lambda_stay_fp32_when_the_model_is_made_bf16(make_model, put, read, shake):
    model = make_model("llama")
    adapted = put(model)
    shake(adapted)
    adapted.set_step(STEP)
    lam, w_d = adapted.branches[1].lambda_value().clone(), adapted.branches[1].w_d.clone()
    model.to(torch.bfloat16)
    assert torch.equal(adapted.branches[1].lambda_value(), lam) and torch.equal(
        adapted.branches[1].w_d, w_d
    )
    assert read(model).dtype is torch.bfloat16


# Generation.


@pytest.mark.parametrize("variant", ["dex", "attn_only"])
def test_greedy_generation_with_a_cache_equals_without(
    family, variant, make_model, put, shake, inputs_of
):
    model = make_model(family)
    adapted = put(model, variant)
    shake(adapted)
    adapted.set_step(STEP)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = inputs_of(model)["input_ids"][:, :5]
    with_cache = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **options))
    assert with_cache.shape == (2, 13)
