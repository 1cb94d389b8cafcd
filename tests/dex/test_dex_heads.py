"""Choice of heads: scores against transformers' maps and finite differences; heads.json."""

import json

import pytest
import torch

from diffx.config import UserError
from diffx.config.dex import DexConfig
from diffx.dex import heads as module
from diffx.dex.heads import choose_heads, draw_heads, entropies, importances, load_plan
from diffx.dex.layout import find_layers
from diffx.models.view import AttentionView

TEXT = torch.randint(1, 48, (3, 20), generator=torch.Generator().manual_seed(2))
BATCHES = TEXT.split([2, 1])
SEEN = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt"]


@pytest.fixture
def llama(make_model):
    model = make_model("llama")
    return model, find_layers(model, {"input_ids": TEXT[:1, :2]})


def choose(llama, seed=0, **options):
    return choose_heads(*llama, DexConfig(**options), BATCHES, "base", seed, "text")


@pytest.mark.parametrize("kind", SEEN)
def test_entropies_are_those_of_the_maps_that_transformers_returns(kind, make_model):
    model = make_model(kind)
    ours = entropies(model, find_layers(model, {"input_ids": TEXT[:1, :2]}), BATCHES)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(TEXT, output_attentions=True).attentions  # each (B, H, T, T)
    theirs = torch.stack([torch.special.entr(p).sum(-1).mean((0, 2)) for p in maps])
    assert theirs.std() > 0.003
    torch.testing.assert_close(torch.tensor(ours), theirs, rtol=2e-5, atol=0)


def test_a_map_is_never_whole(llama, monkeypatch):
    rows, whole = [], AttentionView.head_map

    def head_map(view, j, start, stop):
        rows.append(stop - start)
        return whole(view, j, start, stop)

    at_once = entropies(*llama, [TEXT])
    monkeypatch.setattr(AttentionView, "head_map", head_map)
    monkeypatch.setattr(module, "_ROWS", 7)
    torch.testing.assert_close(
        torch.tensor(entropies(*llama, [TEXT])), torch.tensor(at_once), rtol=1e-6, atol=0
    )
    assert set(rows) == {7, 6} and len(rows) == 3 * 4 * 2  # of 20 rows, a head of a layer at a time


@pytest.mark.parametrize("kind", ["phi", "gpt2"])  # whose norms keep fp64
def test_importances_are_slopes_of_the_loss(kind, make_model):
    model = make_model(kind)
    layers = find_layers(model, {"input_ids": TEXT[:1, :2]})
    model.double()
    gate = {}

    def loss(row):
        with torch.no_grad():
            logits = model(row[None]).logits[0, :-1]
            return float(torch.nn.functional.cross_entropy(logits, row[1:]))

    for number, layer in enumerate(layers):

        def scale(_, args, number=number, layer=layer):
            o = args[0].unflatten(-1, (layer.num_heads, layer.width)).clone()
            if gate.get("layer") == number:
                o[..., gate["head"], :] *= gate["value"]
            return (o.flatten(-2),)

        model.get_submodule(layer.output).register_forward_pre_hook(scale)
    expected = torch.zeros(len(layers), 4, dtype=torch.float64)
    for number in range(len(layers)):
        for head in range(4):
            for row in TEXT:
                ends = []
                for value in (1 + 1e-5, 1 - 1e-5):
                    gate.update(layer=number, head=head, value=value)
                    ends.append(loss(row))
                expected[number, head] += abs(ends[0] - ends[1]) / 2e-5 / len(TEXT)
    gate.clear()
    torch.testing.assert_close(
        torch.tensor(importances(model, layers, BATCHES), dtype=torch.float64),
        expected,
        rtol=1e-4,
        atol=1e-7,
    )
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize(
    ("criterion", "best"),
    [
        ("entropy_high", lambda s: sorted(s)[-2:]),
        ("entropy_low", lambda s: sorted(s)[:2]),
        ("importance_low", None),
    ],
)
def test_half_of_the_heads_are_chosen_by_their_score(llama, criterion, best):
    plan = choose(llama, heads=criterion)
    best = best or (lambda s: sorted(s)[:2])
    assert plan.num_heads == [4, 4] and plan.criterion == criterion
    for scores, chosen in zip(plan.scores, plan.heads, strict=True):
        assert chosen == sorted(chosen) and sorted(scores[head] for head in chosen) == best(scores)
    assert plan.settings == {"k": None, "tokens": 60, "text": "text", "seed": 0}


@pytest.mark.parametrize(("k", "expected"), [(1, 1), (3, 3), (4, 4), (None, 2)])
def test_k(llama, k, expected):
    assert [len(chosen) for chosen in choose(llama, k=k).heads] == [expected] * 2


def test_random_heads_follow_the_seed_and_all_are_all(llama):
    first = choose(llama, heads="random")
    assert first.heads == choose(llama, heads="random").heads
    assert len({str(choose(llama, seed=seed, heads="random").heads) for seed in range(6)}) > 2
    assert (
        first.heads[0] != first.heads[1]
        or choose(llama, seed=1, heads="random").heads[0]
        != choose(llama, seed=1, heads="random").heads[1]
    )
    assert first.scores == [] and first.settings["tokens"] == 0
    assert choose(llama, heads="all").heads == [[0, 1, 2, 3]] * 2


def test_a_plan_is_read_back_verbatim(llama, tmp_path):
    path = tmp_path / "heads.json"
    plan = choose(llama)
    plan.save(path)
    assert load_plan(path, "base", llama[1]) == plan
    assert set(json.loads(path.read_text())) == {
        "base",
        "criterion",
        "settings",
        "num_heads",
        "scores",
        "heads",
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"base": "another"}, "it is of another model"),
        ({"heads": [[0, 4], [1]]}, "layers or heads that the model does not have"),
        ({"heads": [[0, -1], [1]]}, "layers or heads that the model does not have"),
        ({"heads": [[0, 1]]}, "layers or heads that the model does not have"),
        ({"heads": [[0, 1]] * 3}, "layers or heads that the model does not have"),
        ({"heads": 3}, "must be the heads.json of a run"),
        ({"more": 1}, "must be the heads.json of a run"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(llama, tmp_path, change, reason):
    path = tmp_path / "heads.json"
    choose(llama).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=reason) as caught:
        load_plan(path, "base", llama[1])
    assert str(caught.value).startswith(f"dex.heads={path} cannot be used: ") and "\n" not in str(
        caught.value
    )


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_no_plan_is_refused(llama, tmp_path, text):
    path = tmp_path / "heads.json"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=r"must be the heads\.json of a run"):
        load_plan(path, "base", llama[1])


def test_more_heads_than_there_are(llama):
    with pytest.raises(UserError, match=r"dex\.k=5 cannot be used: the model has 4 heads a layer"):
        choose(llama, k=5)


def test_half_of_one_head_is_none(make_model):
    model = make_model("llama", num_attention_heads=1, num_key_value_heads=1)
    one = model, find_layers(model, {"input_ids": TEXT[:1, :2]})
    with pytest.raises(UserError, match=r"dex\.k=null cannot be used.*give dex\.k=1"):
        choose(one)
    assert choose(one, k=1).heads == choose(one, heads="all").heads == [[0], [0]]


@pytest.mark.parametrize(("heads", "k"), [("all", 2), ("x/heads.json", 2)])
def test_k_beside_what_says_it_itself(heads, k):
    with pytest.raises(UserError, match=rf"dex\.k=2 cannot be used with dex\.heads={heads}"):
        DexConfig(heads=heads, k=k)


def test_a_model_that_does_not_show_its_maps(make_model):
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=48, head_dim=8,
        num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    sinks = model, find_layers(model, {"input_ids": TEXT[:1, :2]})
    with pytest.raises(
        UserError, match=r"dex\.heads=entropy_high cannot be used: .*importance_low, random, all"
    ):
        choose(sinks)
    assert len(choose(sinks, heads="importance_low").heads[0]) == 2


@pytest.mark.parametrize("criterion", ["entropy_high", "random"])
def test_the_picture(llama, criterion, tmp_path):
    draw_heads(choose(llama, heads=criterion), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
