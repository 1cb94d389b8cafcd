"""Our decoders as models of transformers: registration, cache, padding, loss, saving."""

import copy
import inspect
import json
import subprocess
import sys

import peft
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from diffx.config.dex import DexConfig
from diffx.config.model import MODEL_CONFIGS, LambdaScope
from diffx.dex.attach import attach
from diffx.dex.layout import find_layers
from diffx.dex.registered import to_dex
from diffx.hub.attention import CACHE, cache_keyword
from diffx.hub.configs import DiffxConfig
from diffx.hub.convert import to_llama
from diffx.hub.registered import DiffxForCausalLM, to_diffx
from diffx.models import build_model, generate, init_weights

SHAPE = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "init_std": 0.2,
}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["transformer", "diff_v1", "diff_v2"])
def pair(request):
    """A decoder, and itself as a model of transformers."""
    options = {"lambda_scope": LambdaScope.head} if request.param == "diff_v1" else {}
    ours = build_model(MODEL_CONFIGS[request.param](**SHAPE, **options))
    init_weights(ours, 0)
    return ours.eval(), to_diffx(ours).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved diff_v2."""
    ours = build_model(MODEL_CONFIGS["diff_v2"](**SHAPE))
    init_weights(ours, 0)
    path = tmp_path_factory.mktemp("registered")
    to_diffx(ours).save_pretrained(path)
    return path


@pytest.mark.slow
def test_registration_where_transformers_was_loaded_before(
    folder,
):  # the other way round is what the exports' tests do
    script = (
        "from transformers import AutoConfig, AutoModelForCausalLM; AutoConfig; "
        "AutoModelForCausalLM; import diffx\n"
    )
    script += f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    script += (
        f"print(type(model).__name__, type(AutoConfig.from_pretrained({str(folder)!r})).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["DiffxForCausalLM", "DiffxConfig"], done.stderr[-2000:]


def test_importing_diffx_loads_neither_transformers_nor_torch():
    script = (
        "import sys, diffx; "
        "print([name for name in ('torch', 'transformers', 'omegaconf') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True
        ).stdout.strip()
        == "[]"
    )


def test_the_logits_are_the_decoders(pair):
    ours, theirs = pair
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, ours(IDS))
        assert torch.equal(theirs(IDS, logits_to_keep=2).logits, ours(IDS)[:, -2:])


def test_saved_and_loaded(pair, tmp_path):
    ours, theirs = pair
    theirs.config.max_position_embeddings = 64  # as diffx export sets it
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DiffxForCausalLM and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, ours(IDS))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.decoder_config() == ours.config and config.max_position_embeddings == 64
    assert (
        config.vocab_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    ) == (50, 2, 4, 2)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "diffx" and stored["architecture"]["kind"] == ours.config.kind
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.dtype is torch.bfloat16 and bool(narrow(IDS).logits.isfinite().all())


def test_a_model_from_its_config_alone(pair):
    ours, _ = pair
    config = DiffxConfig({"kind": ours.config.kind, **SHAPE})
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is DiffxForCausalLM and model.num_parameters() > 1000
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).device.type == "meta"


def test_greedy_generation_with_a_cache_and_without_is_the_decoders_own(pair):
    ours, theirs = pair
    theirs.generation_config.eos_token_id = None
    drawn = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert torch.equal(
        drawn, theirs.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GREEDY)
    )
    for row, ids in enumerate(IDS):
        assert drawn[row, 9:].tolist() == list(
            generate(ours, ids[None], max_tokens=8, temperature=0.0)
        )


def test_padding_on_the_left_changes_nothing(pair):
    _, theirs = pair
    theirs.generation_config.eos_token_id = None
    padded = torch.nn.functional.pad(IDS, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(padded, attention_mask=mask).logits[:, 3:],
            theirs(IDS).logits,
            rtol=1e-4,
            atol=1e-5,
        )
    alone = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], alone)


def test_the_loss_is_that_of_the_next_token(pair):
    ours, theirs = pair
    labels = IDS.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            ours(IDS)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        assert float(theirs(IDS, labels=labels).loss) == pytest.approx(float(expected))


def test_hidden_states_are_those_that_llama_gives():
    ours = build_model(MODEL_CONFIGS["transformer"](**SHAPE))
    init_weights(ours, 0)
    llama = to_llama(ours).eval()
    expected = llama(IDS, output_hidden_states=True).hidden_states
    got = to_diffx(ours).eval()(IDS, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_cache_has_both_names_and_the_form_that_is_asked_for(pair):
    ours, theirs = pair
    with torch.no_grad():
        whole = ours(IDS)
        output = theirs(IDS[:, :5], use_cache=True)
        cache = output.past_key_values
        assert cache is output[CACHE] and cache.get_seq_length() == 5
        torch.testing.assert_close(
            theirs(IDS[:, 5:7], cache=cache).logits, whole[:, 5:7], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            theirs(IDS[:, 7:], past_key_values=cache).logits, whole[:, 7:], rtol=1e-4, atol=1e-5
        )
        assert isinstance(theirs(IDS, return_dict=False), tuple)
        assert torch.equal(
            theirs(IDS, logits_to_keep=torch.tensor([1, 4])).logits, theirs(IDS).logits[:, [1, 4]]
        )


@pytest.mark.parametrize(
    "keyword", ["cu_seq_lens_q", "cache_positions", "token_type_ids", "head_mask"]
)
def test_a_keyword_that_is_not_known_is_an_error(pair, keyword):
    with pytest.raises(TypeError, match=keyword):
        pair[1](IDS, **{keyword: None})


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])  # padding on the left of one row
CALLS = {
    "defaults": {},
    "positions": {
        "position_ids": torch.tensor(
            [[0, 1, 2, 3, 10, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10, 11, 12, 13]]
        )
    },
    "positions of all rows": {"position_ids": torch.arange(3, 12)[None]},
    "positions and padding": {
        "attention_mask": LEFT,
        "position_ids": (LEFT.cumsum(1) - 1).clamp_min(0),
    },
    "packed documents": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8]]),
        "use_cache": False,
    },
    "documents of the same length": {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]]),
        "use_cache": False,
    },
    "padding without a cache": {"attention_mask": LEFT, "use_cache": False},
    "a loss with its divisor": {"labels": IDS, "num_items_in_batch": 100},
    "hidden states": {"output_hidden_states": True},
}


@pytest.fixture(scope="module")
def llamas():
    """A Llama, and the same function as our class."""
    ours = build_model(MODEL_CONFIGS["transformer"](**SHAPE))
    init_weights(ours, 0)
    return to_llama(ours).eval(), to_diffx(ours).eval()


def assert_same_outputs(got, expected, mask=None):
    assert list(got) == list(expected)  # which of them there are
    seen = torch.ones(expected.logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got.logits[seen], expected.logits[seen], rtol=1e-4, atol=1e-4)
    if expected.loss is not None:
        assert float(got.loss) == pytest.approx(float(expected.loss), rel=1e-5)
    for one, other in zip(got.hidden_states or (), expected.hidden_states or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_arguments_mean_what_they_mean_to_llama(llamas, name, embedded):
    llama, theirs = llamas
    text = {"inputs_embeds": llama.get_input_embeddings()(IDS)} if embedded else {"input_ids": IDS}
    assert_same_outputs(
        theirs(**text, **CALLS[name]),
        llama(**text, **CALLS[name]),
        CALLS[name].get("attention_mask"),
    )


@torch.no_grad()
def test_defaults_of_the_config_are_followed_as_by_llama(llamas):
    for key in ("output_hidden_states", "use_cache"):
        llama, theirs = (copy.deepcopy(model) for model in llamas)
        for model in (llama, theirs):
            setattr(model.config, key, not getattr(model.config, key))
        got, expected = theirs(IDS), llama(IDS)
        assert type(got) is type(expected) and len(got) == len(expected)


def test_what_cannot_be_right_is_refused(pair):
    theirs = pair[1]
    static = StaticCache(
        config=to_llama(build_model(MODEL_CONFIGS["transformer"](**SHAPE))).config, max_cache_len=32
    )
    with pytest.raises(ValueError, match="StaticCache"):
        theirs(IDS, cache=static)
    with pytest.raises(ValueError, match="two names"):
        theirs(IDS, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        theirs(IDS, attention_mask=torch.ones(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"attention_mask.*\(2, 9\)"):
        theirs(IDS, attention_mask=torch.ones(2, 8))
    windowed = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    with pytest.raises(ValueError, match="window"):
        theirs(IDS, cache=windowed)
    with pytest.raises(ValueError, match="inputs_embeds"):
        theirs()
    with pytest.raises(ValueError, match="output_attentions"):
        theirs(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="StaticCache"):
        theirs.generate(IDS, cache_implementation="static", **GREEDY)


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
def test_generate_writes_what_the_whole_text_read_anew_gives(kind):
    """Greedy, beam and sampled text of a padded batch, with and without a cache, and by a loop."""
    ours = build_model(MODEL_CONFIGS[kind](**SHAPE))
    init_weights(ours, 0)
    theirs = to_diffx(ours.eval()).eval()
    theirs.generation_config.eos_token_id = None
    prompts = IDS * LEFT
    alone = []
    for row, mask in zip(IDS, LEFT, strict=True):
        text = row[mask.bool()][None]
        for _ in range(8):
            with torch.no_grad():
                text = torch.cat([text, ours(text)[:, -1:].argmax(-1)], dim=1)
        alone.append(text[0, -8:])
    drawn = theirs.generate(prompts, attention_mask=LEFT, **GREEDY)
    assert torch.equal(drawn[:, 9:], torch.stack(alone))
    embeds = theirs.get_input_embeddings()(prompts)
    assert torch.equal(
        theirs.generate(inputs_embeds=embeds, attention_mask=LEFT, **GREEDY), drawn[:, 9:]
    )
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 5}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            texts.append(
                theirs.generate(
                    prompts,
                    attention_mask=LEFT,
                    max_new_tokens=8,
                    pad_token_id=0,
                    use_cache=use_cache,
                    **options,
                )
            )
        assert torch.equal(*texts)


def test_generate_goes_on_from_a_cache_and_returns_states(pair):
    _, theirs = pair
    theirs.generation_config.eos_token_id = None
    whole = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    options = {"return_dict_in_generate": True, "output_hidden_states": True} | GREEDY
    first = theirs.generate(
        IDS, attention_mask=torch.ones_like(IDS), **options | {"max_new_tokens": 3}
    )
    assert len(first.hidden_states) == 3 and len(first.hidden_states[0]) == 3
    rest = {CACHE: first[CACHE], "attention_mask": torch.ones_like(first.sequences)}
    assert torch.equal(
        theirs.generate(first.sequences, **rest, **GREEDY | {"max_new_tokens": 5}), whole
    )


def steps_of_trainer(model, folder, accumulate):
    """The losses that Trainer logs in two steps of 8 texts, and the trained model."""
    texts = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in TEXTS
    ]
    texts[1]["labels"] = texts[1]["labels"].clone()
    texts[1]["labels"][:7] = -100  # micro-batches have other numbers of targets
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8 // accumulate,
        gradient_accumulation_steps=accumulate, max_steps=2, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, data_seed=0,
        max_grad_norm=0.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=texts)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model


TEXTS = torch.randint(50, (16, 9), generator=torch.Generator().manual_seed(5))


def test_trainer_accumulates_gradients_as_it_does_for_llama(tmp_path):
    """The same losses and weights as a Llama's, and as without accumulation."""
    ours = build_model(MODEL_CONFIGS["transformer"](**SHAPE))
    init_weights(ours, 0)
    expected, llama = steps_of_trainer(to_llama(ours), tmp_path, 4)
    whole, _ = steps_of_trainer(to_diffx(copy.deepcopy(ours)), tmp_path, 1)
    losses, theirs = steps_of_trainer(to_diffx(copy.deepcopy(ours)), tmp_path, 4)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert whole == pytest.approx(expected, rel=1e-5)
    state = to_llama(theirs.decoder).state_dict()
    for name, weight in llama.state_dict().items():
        torch.testing.assert_close(state[name], weight, rtol=1e-3, atol=1e-4)


def test_trainer_knows_an_adapted_model_by_its_base(hf_folder, tmp_path):
    """With a zero branch, the losses are the base's, with and without accumulation."""
    losses = []
    for accumulate in (None, 1, 4):
        base = AutoModelForCausalLM.from_pretrained(hf_folder)
        if accumulate is None:
            losses.append(steps_of_trainer(base, tmp_path, 4)[0])
            continue
        layers = find_layers(base, {"input_ids": torch.tensor([[0, 1]])})
        adapted = attach(base, layers, DexConfig(), [[0] for _ in layers], 10, 0)
        model = to_dex(adapted, 0)
        model.requires_grad_(True)
        for branch in adapted.branches:  # at zero with no gradient it stays the base
            branch.w_d.requires_grad_(False)
        losses.append(steps_of_trainer(model, tmp_path, accumulate)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_trainer_evaluates_with_padding_as_it_does_for_llama(llamas, tmp_path):
    """Only logits are gathered, though the model returns a cache."""
    texts = [
        {"input_ids": row, "attention_mask": mask, "labels": row}
        for row, mask in zip(IDS, LEFT, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, use_cache=True
    )
    losses = []
    for model in llamas:
        trainer = Trainer(
            model=model,
            args=arguments,
            eval_dataset=texts,
            compute_metrics=lambda got: {"shape": got.predictions.shape},
        )
        figures = trainer.evaluate()
        assert figures["eval_shape"] == (2, 9, 50)
        losses.append(figures["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_peft_adapts_it(pair):
    """LoRA at its start changes nothing; peft passes keywords that are None."""
    ours, theirs = pair
    adapted = peft.get_peft_model(
        copy.deepcopy(theirs), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    with torch.no_grad():
        assert torch.equal(adapted(input_ids=IDS, labels=IDS).logits, ours(IDS))
    theirs.generation_config.eos_token_id = adapted.generation_config.eos_token_id = None
    prompt = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(adapted.generate(**prompt, **GREEDY), theirs.generate(**prompt, **GREEDY))


@pytest.mark.parametrize(
    "config", [GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50), LlamaConfig(**LLAMA)]
)
def test_an_adapted_model_takes_what_its_base_takes(config, tmp_path):
    base = AutoModelForCausalLM.from_config(config).eval()
    layers = find_layers(base, {"input_ids": torch.tensor([[0, 1]])})
    model = to_dex(
        attach(copy.deepcopy(base), layers, DexConfig(), [[0] for _ in layers], 10, 0), 0
    ).eval()
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert cache_keyword(model) == cache_keyword(base) == CACHE
    trainers = [
        Trainer(
            model=one,
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, use_cache=True),
        )
        for one in (base, model)
    ]
    for trainer in trainers:
        trainer._set_signature_columns_if_needed()
    expected, got = trainers
    assert set(got._signature_columns) == set(
        expected._signature_columns
    ) and got.label_names == expected.label_names == ["labels"]
    assert got.model_accepts_loss_kwargs is expected.model_accepts_loss_kwargs is True
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.get_input_embeddings().weight.zero_()
        assert not torch.equal(
            other(IDS).logits, model(IDS).logits
        )  # a copy calls the base that it holds
        assert_same_outputs(
            model(IDS, labels=IDS, num_items_in_batch=50),
            base(IDS, labels=IDS, num_items_in_batch=50),
        )
    base.accepts_loss_kwargs = model.base.accepts_loss_kwargs = False
    assert model.accepts_loss_kwargs is False
