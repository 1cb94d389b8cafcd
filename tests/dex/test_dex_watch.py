"""Logged figures of the branch, against the formulas; and the sentences about them."""

import pytest
import torch

from diffx.dex.watch import Watch


@pytest.fixture
def watched(make_model, put, shake):
    model = make_model("qwen3")
    adapted = put(model)
    shake(adapted)
    watch = Watch(adapted)
    watch.set_step(5)
    return model, adapted, watch


def test_the_figures_are_those_of_the_formulas(watched, inputs_of):
    model, adapted, watch = watched
    entering = []
    for branch in adapted.branches:
        branch.register_forward_pre_hook(lambda _, args: entering.append(args[0].detach().double()))
    figures = watch(lambda: model(**inputs_of(model)))
    assert set(figures) == {
        f"dex/{name}/{layer:02d}" for name in ("lambda", "ratio", "cos") for layer in (0, 1)
    }
    for layer, (branch, entered) in enumerate(zip(adapted.branches, entering, strict=True)):
        o = entered.unflatten(-1, (4, 12))[..., [1, 3], :]  # (B, T, k, d_v) of the chosen heads
        lam = (1 - 5 / 8) * (5 / 8) * branch.lambda_init + 5 / 8 * float(
            branch.lambda_learn.detach()
        )
        change = lam * (o @ branch.w_d.detach().double())
        assert figures[f"dex/lambda/{layer:02d}"] == pytest.approx(lam, rel=1e-6)
        assert figures[f"dex/ratio/{layer:02d}"] == pytest.approx(
            float(change.norm() / o.norm()), rel=1e-5
        )
        cosine = torch.cosine_similarity(o.flatten(), change.flatten(), dim=0)
        assert figures[f"dex/cos/{layer:02d}"] == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)


def test_gradient_norms_are_those_of_the_step_before_they_are_cleared(watched, inputs_of):
    model, adapted, watch = watched
    model(**inputs_of(model)).logits.logsumexp(-1).sum().backward()
    model(**inputs_of(model)).logits.logsumexp(
        -1
    ).sum().backward()  # a second micro-batch adds to the first
    expected = {}
    for layer, branch in enumerate(adapted.branches):
        expected |= {f"dex/grad_norm/w_d/{layer:02d}": float(branch.w_d.grad.norm())}
        expected |= {f"dex/grad_norm/lambda/{layer:02d}": float(branch.lambda_learn.grad.norm())}
    model.zero_grad(set_to_none=True)
    figures = watch(lambda: model(**inputs_of(model)))
    assert {name: value for name, value in figures.items() if "grad_norm" in name} == pytest.approx(
        expected
    )
    assert list(figures) == sorted(figures)


def test_looking_changes_nothing(watched, inputs_of, read):
    model, adapted, watch = watched
    before = read(model)
    model.train()
    watch(lambda: model(**inputs_of(model)))
    assert model.training and torch.equal(read(model.eval()), before)
    assert not any(branch._forward_pre_hooks for branch in adapted.branches)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("variant", "sizes", "words"),
    [
        (
            "dex",
            [0.0, 0.0],
            "the branch is OFF at the end "
            "(it changes the chosen heads' output by 0.00% on average): what was gained came",
        ),
        ("adapter_only", [0.0, 0.0], "the model is the pretrained one, in effect"),
        ("dex", [1.0, 0.0], "the branch is ON in 1 of 2 layers at the end"),
        (
            "dex",
            [1.0, 1.0],
            "the branch is ON in every layer at the end (it changes the chosen heads' output "
            "by 50.00% on average)",
        ),
    ],
)
def test_the_verdict(variant, sizes, words, make_model, put, inputs_of):
    model = make_model("llama")
    adapted = put(model, variant)
    watch = Watch(adapted)
    watch.set_step(8)
    with torch.no_grad():
        for branch, size in zip(adapted.branches, sizes, strict=True):
            branch.w_d.copy_(torch.eye(8))
            branch.lambda_learn.fill_(size / 2)
    watch(lambda: model(**inputs_of(model)))
    assert watch.ratios == pytest.approx([size / 2 for size in sizes])
    assert words in watch.verdict()


def test_a_variant_without_a_branch_has_nothing_to_show(make_model, put):
    watch = Watch(put(make_model("llama"), "attn_only"))
    watch.set_step(1)
    assert watch(lambda: pytest.fail("nothing to run for")) == {}
