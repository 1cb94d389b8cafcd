"""Sampling with the cache."""

import pytest
import torch

from diffx.config.model import MODEL_CONFIGS
from diffx.models import build_model, generate, init_weights
from diffx.models.generation import sample

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def make(kind="diff_v1"):
    model = build_model(
        MODEL_CONFIGS[kind](
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=64,
            vocab_size=40,
            init_std=0.3,
        )
    )
    init_weights(model, 0)
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", MODEL_CONFIGS)
def test_greedy_is_the_argmax_of_full_forwards(kind):
    model = make(kind)
    ids = PROMPT
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    expected = ids[0, 5:].tolist()
    assert list(generate(model, PROMPT, max_tokens=12, temperature=0)) == expected
    assert list(generate(model, PROMPT, max_tokens=12, top_k=1)) == expected
    assert list(generate(model, PROMPT, max_tokens=12, top_p=1e-6)) == expected


def test_seeds():
    model = make()
    first = list(generate(model, PROMPT, max_tokens=30, seed=1))
    assert first == list(generate(model, PROMPT, max_tokens=30, seed=1))
    assert first != list(generate(model, PROMPT, max_tokens=30, seed=2))
    assert len(first) == 30


def test_streams_and_leaves_gradients_on():
    stream = generate(make(), PROMPT, max_tokens=1000)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_stops_at_end_of_text():
    model = make()
    tokens = list(generate(model, PROMPT, max_tokens=12, temperature=0))
    stop = tokens.index(tokens[7])
    assert (
        list(generate(model, PROMPT, max_tokens=12, temperature=0, eot_id=tokens[7]))
        == tokens[:stop]
    )


def frequencies(logits, n=4000, **settings):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings
    draws = generator()
    return (
        torch.bincount(
            torch.tensor([sample(logits, generator=draws, **options) for _ in range(n)]),
            minlength=len(logits),
        )
        / n
    )


def test_distribution():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()  # not in order
    for temperature in (1.0, 0.5):
        expected = (logits / temperature).softmax(0)
        assert (frequencies(logits, temperature=temperature) - expected).abs().max() < 0.03
    top_2 = torch.tensor([0, 4 / 7, 0, 3 / 7])
    assert (frequencies(logits, top_k=2) - top_2).abs().max() < 0.03
    assert (
        frequencies(logits, top_p=0.65) - top_2
    ).abs().max() < 0.03  # 0.4 + 0.3 reach it, 0.4 does not
    assert frequencies(logits, top_p=0.75)[0] == 0 < frequencies(logits, top_p=0.75)[2]
    # after top_k the probabilities are 4/7 and 3/7, so that the first alone reaches 0.5
    assert frequencies(logits, n=50, top_k=2, top_p=0.5)[1] == 1


def test_prompt_is_checked():
    for prompt in (
        torch.zeros(1, 0, dtype=torch.long),
        torch.zeros(2, 3, dtype=torch.long),
        torch.zeros(3, dtype=torch.long),
    ):
        with pytest.raises(ValueError, match="must be \\(1, T\\)"):
            next(generate(make(), prompt, max_tokens=1))
