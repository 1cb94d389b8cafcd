"""One interface to our models and transformers': all results equal plain forward passes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, OPTConfig

from diffx.config import RunError
from diffx.config.model import MODEL_CONFIGS
from diffx.evaluation.scoring import cut, generations, in_batches, loglikelihoods

SIZE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
THEIRS = {
    "llama": LlamaConfig(**SIZE, initializer_range=0.2),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "opt": OPTConfig(
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "mistral": MistralConfig(**SIZE, sliding_window=5, initializer_range=0.2),
}


@pytest.fixture(params=[*sorted(MODEL_CONFIGS), *THEIRS])
def lm(request, tiny, wrap, tokenizer):
    if request.param in MODEL_CONFIGS:
        return tiny(request.param)
    torch.manual_seed(0)
    config = THEIRS[request.param]
    config.vocab_size, config.pad_token_id = tokenizer.vocab_size, None
    return wrap(AutoModelForCausalLM.from_config(config), limit=128)


def plain(lm, text):
    """Logits of a text, computed alone and without a cache."""
    ids = torch.tensor([text])
    with torch.no_grad():
        output = lm.model(ids)
    return (output if isinstance(output, torch.Tensor) else output.logits)[0].float()


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_prefixes_of_different_lengths(lm):
    texts = [lm.encode("one two three"), lm.encode("ab"), lm.encode("seven")]
    prefix = lm.start(texts)
    for row, text in enumerate(texts):
        close(prefix.logits[row], plain(lm, text)[-1])
    rows, more = [2, 0, 2, 1], [lm.encode(t) for t in ("x", "yyyy", "zz", "www")]
    second, logits = lm.extend(prefix, rows, more)
    for i, (row, new) in enumerate(zip(rows, more, strict=True)):
        expected = plain(lm, texts[row] + new)
        close(logits[i, : len(new)], expected[-len(new) :])
        close(second.logits[i], expected[-1])
    third, _ = lm.extend(second, [3, 0], [lm.encode("!"), lm.encode("??")])
    close(third.logits[0], plain(lm, texts[1] + more[3] + lm.encode("!"))[-1])
    close(third.logits[1], plain(lm, texts[2] + more[0] + lm.encode("??"))[-1])
    _, again = lm.extend(prefix, [1], [lm.encode("www")])  # the first prefix is as it was
    close(again[0], logits[3, :3])


def test_loglikelihoods(lm):
    """Shared, single and repeated contexts, in any batches, equal one text at a time."""
    contexts = ["The number is", "A", "The number is", "Something quite different, and longer:"]
    continuations = [" one", " twenty-two", " x"]
    requests = [(lm.encode(a), lm.encode(b)) for a in contexts for b in continuations] + [
        (lm.encode("alone"), lm.encode(" again"))
    ]
    expected = []
    for context, continuation in requests:
        logs = plain(lm, context + continuation).log_softmax(-1)[len(context) - 1 : -1]
        target = torch.tensor(continuation)
        expected.append(
            (logs.gather(1, target[:, None]).sum().item(), bool((logs.argmax(-1) == target).all()))
        )
    for batch in ("auto", 1, 3):
        found = loglikelihoods(lm, requests, batch)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [score for score, _ in found] == pytest.approx(
            [score for score, _ in expected], abs=1e-4
        )


def test_the_greedy_continuation_is_greedy(lm):
    lm.ends, context = set(), lm.encode("Once")
    (drawn,) = lm.generate([context], 4)
    ((_, greedy),) = loglikelihoods(lm, [(context, drawn)])
    assert greedy and len(drawn) == 4


def test_generations_equal_drawing_one_token_at_a_time(lm):
    lm.ends = set()
    prompts = [lm.encode(text) for text in ("Hello", "A longer prompt", "Hi", "Hello")]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(6):
            text.append(int(plain(lm, text)[-1].argmax()))
        expected.append(lm.decode(text[len(prompt) :]))
    for batch in ("auto", 1, 2):
        assert [text for _, text in sorted(generations(lm, prompts, 6, batch=batch))] == expected
    stop = expected[1][2:4]
    assert dict(generations(lm, prompts, 6, stop=[stop]))[1] == cut(expected[1], [stop])


def test_ends_at_the_end_of_the_text(tiny):
    lm = tiny()
    (drawn,) = lm.generate([lm.encode("Hello")], 5)
    lm.ends = {drawn[2]}
    assert lm.generate([lm.encode("Hello")], 5) == [drawn[: drawn.index(drawn[2])]]
    assert (
        list(lm.sample(lm.encode("Hello"), 5, temperature=0, top_k=0, top_p=1, seed=0))
        == drawn[: drawn.index(drawn[2])]
    )


def test_memory_that_ends_halves_the_batch():
    seen = []

    def work(items):
        if len(items) > 2:
            raise torch.OutOfMemoryError("no more")
        seen.append(list(items))
        return len(items)

    with pytest.warns(UserWarning, match="do not fit"):
        results = list(
            in_batches([3, 1, 5, 4, 2], lambda item: item, "auto", torch.device("cpu"), work)
        )
    assert seen == [[5, 4], [3, 2], [1]] and [taken for taken, _ in results] == seen

    def never(items):
        raise torch.OutOfMemoryError("none")

    with pytest.raises(RunError, match="7 tokens do not fit"):
        list(in_batches([7], lambda item: item, 4, torch.device("cpu"), never))


def test_batches_hold_a_budget_of_tokens():
    lengths = [2000, 100, 1000, 1000, 30]
    batches = [
        taken for taken, _ in in_batches(lengths, lambda n: n, "auto", torch.device("cpu"), len)
    ]
    assert batches == [[2000], [1000, 1000], [100, 30]]
