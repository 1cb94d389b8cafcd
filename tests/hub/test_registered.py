"""Our decoders as models of transformers: registration whatever is imported first, the cache, padding, the loss, saving."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffx.config.model import MODEL_CONFIGS, LambdaScope
from diffx.hub.configs import DiffxConfig
from diffx.hub.registered import DiffxForCausalLM, to_registered
from diffx.models import build_model, generate, init_weights

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48, "vocab_size": 50, "init_std": 0.2}
IDS = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=["transformer", "diff_v1", "diff_v2"])
def pair(request):
    """A decoder, and itself as a model of transformers."""
    options = {"lambda_scope": LambdaScope.head} if request.param == "diff_v1" else {}
    ours = build_model(MODEL_CONFIGS[request.param](**SHAPE, **options))
    init_weights(ours, 0)
    return ours.eval(), to_registered(ours, 64).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved diff_v2."""
    ours = build_model(MODEL_CONFIGS["diff_v2"](**SHAPE))
    init_weights(ours, 0)
    path = tmp_path_factory.mktemp("registered")
    to_registered(ours, 64).save_pretrained(path)
    return path


def test_registration_where_transformers_was_loaded_before(folder):  # the other way round is what the exports' tests do
    script = "from transformers import AutoConfig, AutoModelForCausalLM; AutoConfig; AutoModelForCausalLM; import diffx\n"
    script += f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
    script += f"print(type(model).__name__, type(AutoConfig.from_pretrained({str(folder)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["DiffxForCausalLM", "DiffxConfig"], done.stderr[-2000:]


def test_importing_diffx_loads_neither_transformers_nor_torch():
    script = "import sys, diffx; print([name for name in ('torch', 'transformers', 'omegaconf') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_logits_are_the_decoders(pair):
    ours, theirs = pair
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, ours(IDS))
        assert torch.equal(theirs(IDS, logits_to_keep=2).logits, ours(IDS)[:, -2:])


def test_saved_and_loaded(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DiffxForCausalLM and not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, ours(IDS))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.decoder_config() == ours.config and config.max_position_embeddings == 64
    assert (config.vocab_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (50, 2, 4, 2)
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
    assert torch.equal(drawn, theirs.generate(IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **GREEDY))
    for row, ids in enumerate(IDS):
        assert drawn[row, 9:].tolist() == list(generate(ours, ids[None], max_tokens=8, temperature=0.0))


def test_padding_on_the_left_changes_nothing(pair):
    _, theirs = pair
    theirs.generation_config.eos_token_id = None
    padded = torch.nn.functional.pad(IDS, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(padded, attention_mask=mask).logits[:, 3:], theirs(IDS).logits, rtol=1e-4, atol=1e-5)
    alone = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **GREEDY)[:, 3:], alone)


def test_the_loss_is_that_of_the_next_token(pair):
    ours, theirs = pair
    labels = IDS.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(ours(IDS)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        assert float(theirs(IDS, labels=labels).loss) == pytest.approx(float(expected))
