"""DEX under ``transformers.Trainer``, and the registered class as ``Trainer`` and users see it."""

import copy
import inspect
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Trainer, TrainingArguments

from diffx.config import UserError
from diffx.config.dex import DexConfig, Init, Variant
from diffx.dex import DexCallback, DexForCausalLM, get_dex_model
from diffx.dex.layer import DexProjection

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
LLAMA = SHAPE | {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, initializer_range=0.2)
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
TEXTS = torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(5))
RANDOM = {"heads": "random", "anneal_steps": 4, "init": Init.linear}


def base_model(config=None):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config or LlamaConfig(**LLAMA)).eval()


def dex_model(step=3, base=None, **options):
    model = get_dex_model(base or base_model(), DexConfig(**RANDOM | options)).eval()
    model.set_step(step)
    return model


def trainer(model, folder, steps=6, callbacks=(), **options):
    texts = [{"input_ids": row, "labels": row} for row in TEXTS]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
        logging_steps=1, save_steps=3,
        **options,
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=texts, callbacks=[DexCallback(), *callbacks]
    )


class Lambdas(DexCallback):
    """Notes lambda of the second layer before each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, *args, **kwargs):
        pass

    on_step_end = on_train_begin

    def on_step_begin(self, args, state, control, model, **kwargs):
        branch = [module for module in model.modules() if isinstance(module, DexProjection)][1]
        self.seen.append((branch.lambda_value().item(), branch.lambda_learn.item()))


def test_trainer_anneals_lambda(tmp_path):
    """Equation 4 at each step; the saved model loads with the last step's lambda."""
    model, lambdas = dex_model(step=0), Lambdas()
    frozen = model.base.get_input_embeddings().weight.clone()
    trainer(model, tmp_path, callbacks=[lambdas]).train()
    initial, annealing = 0.8 - 0.6 * math.exp(-0.3), 4
    for step, (value, learned) in enumerate(lambdas.seen):
        a = min(1.0, step / annealing)
        assert value == pytest.approx((1 - a) * step / annealing * initial + a * learned, abs=1e-6)
    assert len(lambdas.seen) == 6 and lambdas.seen[5][1] != 0
    assert torch.equal(model.base.get_input_embeddings().weight, frozen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    assert loaded.config.step == model.config.step == 6
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_trainer_resumes(tmp_path):
    whole, resumed, lambdas = dex_model(step=0), dex_model(step=0), Lambdas()
    trainer(whole, tmp_path).train()
    again = trainer(resumed, tmp_path, callbacks=[lambdas])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(lambdas.seen) == 3 and lambdas.seen[0][0] != 0
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-6, msg=name)


def test_the_loss_falls_with_activation_checkpointing_as_without(tmp_path):
    losses = []
    for checkpointing in (False, True):
        model = dex_model(step=0)
        run = trainer(
            model,
            tmp_path / str(checkpointing),
            save_strategy="no",
            activation_checkpointing=checkpointing,
        )
        run.train()
        assert model.is_activation_checkpointing is checkpointing
        losses.append([row["loss"] for row in run.state.log_history if "loss" in row])
    assert losses[0][-1] < losses[0][0] and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_gradients_with_activation_checkpointing():
    plain, checkpointed = dex_model(), dex_model()
    checkpointed.activation_checkpointing_enable()
    calls = []
    projection = checkpointed.base.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda *args: calls.append(1))
    for model in (plain, checkpointed):
        model.train()(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2, "a layer is computed again in the backward pass"
    got = {
        name: value.grad for name, value in checkpointed.named_parameters() if value.requires_grad
    }
    for name, value in plain.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(got[name], value.grad, rtol=1e-5, atol=1e-7)


def test_the_callback_needs_a_branch(tmp_path):
    with pytest.raises(UserError, match="DexCallback"):
        trainer(base_model(), tmp_path).train()


# What the registered class has of its base.


def test_output_attentions(tmp_path):
    base = base_model()
    model = dex_model(base=copy.deepcopy(base))
    for one in (base, model):
        one.set_attn_implementation("eager")
    with torch.no_grad():
        expected, got = (one(IDS, output_attentions=True).attentions for one in (base, model))
    assert torch.equal(got[0], expected[0]) and got[1].shape == expected[1].shape == (2, 4, 9, 9)
    assert not torch.equal(got[1], expected[1])  # behind a layer with a branch
    model.config.output_attentions = True
    assert torch.equal(model(IDS).attentions[1], got[1])
    model.config.output_attentions = False
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.base.config._attn_implementation == loaded.config._attn_implementation == "eager"
    assert torch.equal(loaded(IDS, output_attentions=True).attentions[1], got[1])


@pytest.mark.parametrize(
    "config", [LlamaConfig(**LLAMA), LlamaConfig(**LLAMA, tie_word_embeddings=True), GPT2]
)
def test_resize_token_embeddings(config, tmp_path):
    model = dex_model(base=base_model(config), variant=Variant.adapter_only)
    with torch.no_grad():
        before = model(IDS).logits
        assert model.resize_token_embeddings(60) is model.get_input_embeddings()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert tied is bool(config.tie_word_embeddings)
        after = model(IDS, labels=IDS + 10)
        assert torch.equal(after.logits[..., :50], before) and after.logits.shape[-1] == 60
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.vocab_size == loaded.base.config.vocab_size == 60
        assert torch.equal(loaded(IDS).logits, after.logits)


@pytest.mark.parametrize("config", [LlamaConfig(**LLAMA), GPT2])
def test_a_keyword_that_the_base_does_not_know_is_an_error(config):
    base = base_model(config)
    model = dex_model(base=copy.deepcopy(base), variant=Variant.adapter_only)
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    for forward in (model, lambda *args, **kwargs: DexForCausalLM.forward(model, *args, **kwargs)):
        with pytest.raises(TypeError, match="cache_positions"):
            forward(IDS, cache_positions=None)
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True, return_dict=True, num_items_in_batch=None)
        rest = model(IDS[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, model(IDS).logits[:, 5:], rtol=1e-4, atol=1e-5)


# What cannot be trained.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"variant": Variant.lora}, "dex.variant=lora"),
        ({"anneal_steps": None}, "dex.anneal_steps=null"),
        ({"heads": "entropy_high"}, "calibration"),
        ({"heads": "random", "k": 5}, "dex.k=5"),
    ],
)
def test_a_setting_that_cannot_be_used(options, named):
    with pytest.raises(UserError, match=named):
        get_dex_model(base_model(), DexConfig(**RANDOM | options))


def test_a_model_that_cannot_be_used():
    with pytest.raises(UserError, match="one projection"):
        get_dex_model(base_model(GPT2), DexConfig(**RANDOM))
    with pytest.raises(UserError, match="already"):
        get_dex_model(dex_model().base, DexConfig(**RANDOM))


def test_heads_are_chosen_by_calibration_text():
    config = DexConfig(**RANDOM | {"heads": "entropy_high", "k": 1})
    model = get_dex_model(base_model(), config, calibration=[IDS])
    assert [len(branch["heads"]) for branch in model.config.branches] == [1, 1]
