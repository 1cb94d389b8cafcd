"""Our decoders in lm-eval, against lm-eval's class for transformers with the same weights."""

import json
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, DiffLlamaConfig, DiffLlamaForCausalLM, LlamaForCausalLM

from diffx.config import RunError
from diffx.config.eval import EvalJob
from diffx.config.suite import HarnessSuite
from diffx.evaluation import adapter
from diffx.evaluation.adapter import DecoderLM, PretrainedLM, RecordingLM, generation_settings
from diffx.evaluation.model import LanguageModel
from diffx.hub.convert import from_diffllama, from_llama
from diffx.loading import Loaded, load

WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "tree",
    "stone",
    "river",
    "walks",
    "sees",
    "finds",
    "under",
    "with",
    "seven",
    "red",
    "blue",
    "small",
)


def words(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


@pytest.fixture(scope="module", params=["llama", "diffllama"])
def both(request, hf_folder, tokenizer):
    """The same weights as our decoder and as transformers' model, in lm-eval's class."""
    theirs = LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32).eval()
    convert = from_llama
    if request.param == "diffllama":
        torch.manual_seed(1)
        shape = {
            key: getattr(theirs.config, key)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        }
        more = {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "rms_norm_eps": 1e-5,
        }
        theirs, convert = (
            DiffLlamaForCausalLM(DiffLlamaConfig(**shape, **more)).eval(),
            from_diffllama,
        )
    eot = tokenizer.eot_id
    lm = LanguageModel(
        Loaded(convert(theirs), tokenizer, "tiny", "f" * 64, hf_folder, 0, 256, None, [], {eot})
    )
    return lm, HFLM(
        pretrained=theirs, tokenizer=AutoTokenizer.from_pretrained(hf_folder), batch_size=4
    )


@pytest.fixture(scope="module")
def requests():
    """Requests with shared, single, empty and too long contexts, of one token and of more."""
    rng = random.Random(0)
    pairs = []
    for _ in range(12):
        context = words(rng, 4, 30)
        pairs += [
            (context, " " + choice) for choice in (words(rng, 1, 3), words(rng, 1, 3), "x", "y")
        ]
    pairs += [(words(rng, 1, 30), " " + words(rng, 1, 4)) for _ in range(10)]
    pairs += [
        ("", words(rng, 2, 4)),
        ("ends in a space ", "then this"),
        (words(rng, 80, 90), " cut off"),
        (words(rng, 80, 90), " cut"),
    ]
    texts = [(words(rng, 3, 20),) for _ in range(6)] + [
        (words(rng, 150, 160),),
        ("",),
    ]  # longer than two windows, and none at all
    prompts = [(words(rng, 2, 40), {"until": ["e", " "], "max_gen_toks": 10}) for _ in range(6)]
    prompts += [
        (
            words(rng, 2, 90),
            {"until": "q", "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        )
        for _ in range(6)
    ]
    return {
        kind: [
            Instance(request_type=kind, doc={}, arguments=arguments, idx=0) for arguments in of_kind
        ]
        for kind, of_kind in (
            ("loglikelihood", pairs),
            ("loglikelihood_rolling", texts),
            ("generate_until", prompts),
        )
    }


def close(ours, theirs, tolerance):
    assert len(ours) == len(theirs)
    for (score, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert score == pytest.approx(expected, abs=tolerance) and greedy == expected_greedy


def test_answers_are_those_of_hflm(both, requests):
    lm, theirs = both
    ours = DecoderLM(lm)
    close(
        ours.loglikelihood(requests["loglikelihood"]),
        theirs.loglikelihood(requests["loglikelihood"]),
        1e-4,
    )
    rolling = requests["loglikelihood_rolling"]
    expected = pytest.approx(
        theirs.loglikelihood_rolling(rolling), abs=1e-4, rel=1e-7
    )  # theirs are sums in fp32
    assert ours.loglikelihood_rolling(rolling) == expected
    texts = ours.generate_until(requests["generate_until"])
    assert texts == theirs.generate_until(requests["generate_until"]) and len(set(texts)) > 4


def test_the_batch_changes_nothing(both, requests):
    lm, _ = both
    alone, together = (DecoderLM(lm, batch) for batch in (1, 7))
    close(
        together.loglikelihood(requests["loglikelihood"]),
        alone.loglikelihood(requests["loglikelihood"]),
        1e-5,
    )
    close(
        DecoderLM(lm).loglikelihood(requests["loglikelihood"]),
        alone.loglikelihood(requests["loglikelihood"]),
        1e-5,
    )
    rolling = requests["loglikelihood_rolling"]
    assert together.loglikelihood_rolling(rolling) == pytest.approx(
        alone.loglikelihood_rolling(rolling), abs=1e-5
    )
    assert together.generate_until(requests["generate_until"]) == alone.generate_until(
        requests["generate_until"]
    )


def test_a_context_that_choices_share_is_read_once(both, monkeypatch):
    lm, _ = both
    read = []
    start = lm.start
    monkeypatch.setattr(lm, "start", lambda texts: read.extend(texts) or start(texts))
    pairs = [
        ("two and two", " are four"),
        ("two and two", " are five"),
        ("two and two", " are many"),
    ]
    DecoderLM(lm).loglikelihood(
        [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    )
    assert read == [lm.encode("two and two")]


def test_a_runs_texts_begin_with_its_prefix(tiny):
    lm = tiny("diff_v1")
    model, eot = DecoderLM(lm), lm.tokenizer.eot_id
    assert model.tok_encode("ab") == [eot, *lm.encode("ab")] and model.tok_encode(
        "ab", add_special_tokens=False
    ) == lm.encode("ab")
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)
        for pair in (("ab", "cd"), ("", "abcd"))
    ]
    (part, _), (whole, _) = model.loglikelihood(requests)
    logits = lm.logits(torch.tensor([[eot, *lm.encode("abcd")]]))[0].log_softmax(-1)
    scores = [logits[place, token].item() for place, token in enumerate(lm.encode("abcd"))]
    assert part == pytest.approx(sum(scores[2:]), abs=1e-5) and whole == pytest.approx(
        sum(scores), abs=1e-5
    )
    (rolled,) = model.loglikelihood_rolling(
        [Instance(request_type="loglikelihood_rolling", doc={}, arguments=("abcd",), idx=0)]
    )
    after_two = lm.logits(torch.tensor([[eot, eot, *lm.encode("abc")]]))[0].log_softmax(
        -1
    )  # lm-eval scores the first token too
    expected = sum(
        after_two[place, token].item() for place, token in enumerate([eot, *lm.encode("abcd")])
    )
    assert rolled == pytest.approx(expected, abs=1e-5)


def test_requests_that_do_not_fit(tiny):
    model = DecoderLM(tiny())
    for pair, message in (
        (("a", "b" * 257), "has 257 tokens: it must have from 1 to 256"),
        (("a", ""), "has no tokens: it must"),
    ):
        with pytest.raises(RunError, match=message):
            model.loglikelihood(
                [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0)]
            )
    pairs = (("a" * 300, "b"), ("a", "b"))
    model.loglikelihood(
        [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    )
    assert model.cut == 1


def test_a_pretrained_model_is_asked_in_batches_that_fit(hf_folder, requests, monkeypatch):
    job = EvalJob(checkpoint=str(hf_folder), suite=HarnessSuite(name="harness", tasks=["x"]))
    lm = LanguageModel(load(str(hf_folder)))
    asked_of = PretrainedLM(lm, job)
    ask, model = asked_of.ask, asked_of.hflm
    expected = HFLM(
        pretrained=lm.model, tokenizer=AutoTokenizer.from_pretrained(hf_folder)
    ).loglikelihood(requests["loglikelihood"])
    close(ask("loglikelihood", requests["loglikelihood"]), expected, 1e-5)
    assert model.batch_size == 64 and asked_of.cut == 2  # the model is tiny
    monkeypatch.setattr(adapter, "_CPU_LOGITS", 8 * 257 * 256 * 3)  # three sequences of the longest
    ask("generate_until", requests["generate_until"])
    assert model.batch_size == 3
    call, sizes = model._model_call, []

    def limited(inputs, **kwargs):
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise torch.OutOfMemoryError
        return call(inputs, **kwargs)

    monkeypatch.setattr(model, "_model_call", limited)
    close(ask("loglikelihood", requests["loglikelihood"][-6:]), expected[-6:], 1e-5)
    assert sizes[:2] == [3, 1]
    monkeypatch.setattr(model, "_model_call", lambda inputs: limited([1, 2]))
    with pytest.raises(RunError, match="does not fit in the memory of cpu"):
        ask("loglikelihood", requests["loglikelihood"][:4])


def test_special_tokens_are_read_as_such_by_a_pretrained_model(hf_folder):
    lm = LanguageModel(load(str(hf_folder)))
    model = PretrainedLM(
        lm, EvalJob(checkpoint=str(hf_folder), suite=HarnessSuite(name="harness", tasks=["x"]))
    ).hflm
    assert model.tok_encode("<|endoftext|>") == [lm.tokenizer.eot_id] != lm.encode("<|endoftext|>")


def test_answers_are_kept_and_not_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "_CHUNK", 2)
    path, asked, told = tmp_path / "requests.jsonl", [], []

    def ask(method, chunk):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([request.args for request in chunk])
        return [(float(len(request.args[1])), False) for request in chunk]

    pairs = [("a", "b"), ("a", "bc"), ("a", "bcd"), ("a", "b"), ("a", "bcde")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    with pytest.raises(KeyboardInterrupt):
        RecordingLM(ask, path, lambda *counts: told.append(counts)).loglikelihood(requests)
    assert asked == [pairs[:2], pairs[2:4]] and told == [(0, 5), (2, 5), (4, 5)]
    with path.open("a") as file:
        file.write('["torn')
    asked.clear(), told.clear()
    model = RecordingLM(ask, path, lambda *counts: told.append(counts))
    assert model.loglikelihood(requests) == [
        (1.0, False),
        (2.0, False),
        (3.0, False),
        (1.0, False),
        (4.0, False),
    ]
    assert asked == [pairs[4:]] and told == [
        (4, 5),
        (5, 5),
    ]  # the same request twice has two answers: they may be sampled
    assert (
        len([json.loads(line) for line in path.read_text().splitlines() if line != '["torn']) == 5
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace("-1.5", "-7.5"),  # another figure
        lambda line: line.replace("true", "false"),
        lambda line: line[: len(line) // 2],
        lambda line: "[" * 100_000,
        lambda line: '["key", [1.0, true]]',
        lambda line: '{"request": ["x"], "answer": 1}',
        lambda line: "\x00\xff",
    ],
)
def test_a_damaged_answer_is_asked_again(tmp_path, damage, caplog):
    path, asked = tmp_path / "requests.jsonl", []

    def ask(method, chunk):
        asked.extend(request.args for request in chunk)
        return [(-float(request.args[1]), True) for request in chunk]

    pairs = [("a", "1.5"), ("b", "2.5"), ("c", "3.5")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
    ]
    expected = RecordingLM(ask, path, lambda *counts: None).loglikelihood(requests)
    first, *rest = path.read_text().splitlines()
    assert damage(first) != first
    path.write_text("\n".join([damage(first), *rest]) + "\n", encoding="latin-1")
    asked.clear()
    for _ in range(2):
        assert RecordingLM(ask, path, lambda *counts: None).loglikelihood(requests) == expected
    assert asked == pairs[:1]


def test_settings_of_generation():
    assert generation_settings({"until": "x"})["max_gen_toks"] == 256
    assert generation_settings({"max_new_tokens": 7, "until": []})["max_gen_toks"] == 7
    assert (
        generation_settings({"temperature": 0.5})["do_sample"]
        and not generation_settings({})["do_sample"]
    )
