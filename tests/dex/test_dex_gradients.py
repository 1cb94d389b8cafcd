"""What is trained is what the table of variants says, in every family; nothing else changes."""

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from diffx.config.dex import Share
from diffx.dex.attach import fold, parameter_counts

# Names of the queries', keys', values' and output projections of each family; where projections
# are fused, a name repeats.
NAMES = {
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi3": ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    "gpt_bigcode": ("attn.c_attn", "attn.c_attn", "attn.c_attn", "attn.c_proj"),
    "gpt_neox": ("query_key_value", "query_key_value", "query_key_value", "attention.dense"),
    "deepseek_v3": ("q_b_proj", "kv_b_proj", "kv_b_proj", "o_proj"),
}
TRAINED = {
    "dex": {"keys", "values", "output", "w_d", "lambda"},
    "dex_plus": {"keys", "values", "output", "w_d", "lambda"},
    "attn_only": {"keys", "values", "output"},
    "adapter_only": {"w_d", "lambda"},
    "fixed_lambda": {"keys", "values", "output", "w_d"},
}
QUERY_ROWS = {  # of the fused maps: 4 heads 8 wide, by each family's own layout
    "phi3": range(32),
    "gpt2": range(32),
    "gpt_bigcode": range(32),
    "gpt_neox": [24 * head + i for head in range(4) for i in range(8)],
}


def names_of(family):
    return NAMES.get(family, ("q_proj", "k_proj", "v_proj", "o_proj"))


def run_steps(model, adapted, ids, steps=4, decay=0.5):
    optimizer = torch.optim.AdamW(
        adapted.trained().values(), lr=1e-2, weight_decay=decay, fused=True
    )
    for step in range(steps):
        adapted.set_step(step + 1)
        logits = model(input_ids=ids).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()
        if step + 1 < steps:
            optimizer.step()
            optimizer.zero_grad()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("variant", TRAINED)
def test_gradients_reach_what_the_table_says_and_nothing_else(
    family, variant, make_model, put, inputs_of
):
    model = make_model(family)
    adapted = put(model, variant)
    ids = inputs_of(model)["input_ids"]
    gradients = run_steps(model, adapted, ids)
    assert gradients.keys() == adapted.trained().keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    _, key, value, output = names_of(family)
    wanted = TRAINED[variant]
    expected = set()
    for name, _ in make_model(family).named_parameters():
        if not name.endswith("weight"):
            continue
        if "keys" in wanted and (f"{key}.weight" in name or f"{value}.weight" in name):
            expected.add(name.replace("weight", "rows") if family in QUERY_ROWS else name)
        if "keys" in wanted and family == "deepseek_v3" and "kv_a_proj_with_mqa.weight" in name:
            expected.add(name.replace("weight", "rows"))  # the rows of the keys that are rotated
        if f"{output}.weight" in name:
            stem = name.removesuffix("weight")
            expected |= (
                {f"{stem}{'proj.' if 'w_d' in wanted else ''}weight"}
                if "output" in wanted
                else set()
            )
            expected |= {f"{stem}w_d"} if "w_d" in wanted else set()
            expected |= {f"{stem}lambda_learn"} if "lambda" in wanted else set()
    assert gradients.keys() == expected


@pytest.mark.parametrize("variant", ["dex", "attn_only", "lora"])
def test_what_is_frozen_stays_bit_for_bit_under_weight_decay(
    family, variant, make_model, put, inputs_of
):
    before = {name: value.clone() for name, value in make_model(family).named_parameters()}
    model = make_model(family)
    adapted = put(model, variant)
    run_steps(model, adapted, inputs_of(model)["input_ids"])
    after = dict(fold(adapted, keep_branch=False).named_parameters())
    query, key, value, output = names_of(family)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    names = {key, value, output} | ({query} if variant == "lora" else set())
    names |= {"kv_a_proj_with_mqa"} if family == "deepseek_v3" else set()
    assert moved == {name for name in before if any(f"{part}.weight" in name for part in names)}
    if family in QUERY_ROWS and variant != "lora":
        for name in moved:
            if f"{key}.weight" in name:
                dim = 1 if family == "gpt2" else 0
                rows = torch.tensor(list(QUERY_ROWS[family]))
                assert torch.equal(
                    after[name].index_select(dim, rows), before[name].index_select(dim, rows)
                )
                others = torch.tensor(
                    [i for i in range(before[name].shape[dim]) if i not in set(QUERY_ROWS[family])]
                )
                changed = after[name].index_select(dim, others) != before[name].index_select(
                    dim, others
                )
                assert changed.all(1 - dim).all(), "some row of keys or values was not trained"


def test_the_conv1d_of_gpt2_is_one(make_model):
    assert isinstance(
        make_model("gpt2").transformer.h[0].attn.c_attn, Conv1D
    )  # else the tests above mean less than they say


def test_full_trains_everything(make_model, put, inputs_of):
    model = make_model("gpt2")
    adapted = put(model, "full")
    gradients = run_steps(model, adapted, inputs_of(model)["input_ids"])
    assert gradients.keys() == dict(make_model("gpt2").named_parameters()).keys()
    assert model.lm_head.weight is model.transformer.wte.weight  # tied, and so it stays


def test_lora_trains_its_adapters_on_all_four_projections(make_model, put, inputs_of):
    model = make_model("qwen2")
    adapted = put(model, "lora", lora_rank=4)
    gradients = run_steps(model, adapted, inputs_of(model)["input_ids"])
    kinds = {name.split(".")[-4] + "." + name.split(".")[-3] for name in gradients}
    assert kinds == {
        f"{p}.lora_{side}" for p in ("q_proj", "k_proj", "v_proj", "o_proj") for side in "AB"
    }
    assert len(gradients) == 16 and all(4 in gradient.shape for gradient in gradients.values())


def test_one_w_d_a_head_moves_only_in_the_chosen_heads(make_model, put, inputs_of):
    model = make_model("llama")
    adapted = put(model, share=Share.head, heads=[[1], [0, 2]])
    gradients = run_steps(model, adapted, inputs_of(model)["input_ids"], decay=0.0)
    for branch, name in zip(
        adapted.branches, [name for name in gradients if name.endswith("w_d")], strict=True
    ):
        assert gradients[name].abs().amax((1, 2)).nonzero().flatten().tolist() == branch.heads


def test_gradients_are_those_of_finite_differences(make_model, put, shake, inputs_of):
    model = make_model("phi")  # its norms keep fp64, as RMS norms do not
    adapted = put(model)
    shake(adapted)
    adapted.set_step(3)
    model.double()

    def loss():
        return model(**inputs_of(model)).logits.logsumexp(-1).mean()

    loss().backward()
    branch = adapted.branches[0]
    for parameter, place in (
        (branch.w_d, (2, 5)),
        (branch.lambda_learn, (0,)),
        (branch.proj.weight, (7, 3)),
    ):
        slope = float(parameter.grad[place])
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                parameter[place] += sign * 1e-6
                ends.append(float(loss()))
            parameter[place] += 1e-6
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_counts(make_model, put):
    # Llama: hidden 32, keys and values 16, 2 layers, heads 8 wide;
    # q and o 32 x 32, FFN 3 x 32 x 48, embedding 48 x 32 twice.
    model = make_model("llama")
    base = sum(parameter.numel() for parameter in model.parameters())
    counts = parameter_counts(put(model))
    others = 2 * (2 * 16 * 32 + 32 * 32)
    added = 2 * (64 + 1)
    assert counts == {
        "W_D": 2 * 64, "lambda": 2, "others": others, "trained": others + added,
        "embedding": 48 * 32, "rest": base + added - 48 * 32, "total": base + added,
    }  # fmt: skip
    fused = make_model("phi3")
    base = sum(parameter.numel() for parameter in fused.parameters())
    counts = parameter_counts(put(fused, "attn_only"))
    assert (
        counts["total"] == base
        and counts["others"] == others
        and counts["W_D"] == counts["lambda"] == 0
    )
