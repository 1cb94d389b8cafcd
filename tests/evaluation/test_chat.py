"""Chat templates in the suites that are not lm-eval's, against transformers' own rendering."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from diffx.cli import main
from diffx.config import UserError
from diffx.config.eval import EvalJob
from diffx.config.suite import HarnessSuite
from diffx.evaluation import hallucination, icl_prompts, retrieval
from diffx.evaluation.adapter import with_chat_template
from diffx.evaluation.model import LanguageModel
from diffx.loading import load

QUESTIONS = [
    {"context": f"Note {n} is {n * n}.", "question": f"What is note {n}?", "answers": [str(n * n)]}
    for n in range(3)
]
SUITES = {
    "retrieval": "suite.cases=[[1,1],[2,2]] suite.lengths=[250] suite.depths=[0.5] suite.samples=2",
    "icl": "suite.shots=[2] suite.queries=3",
    "icl_order": "suite.shots=2 suite.orders=2 suite.seeds=[0] suite.queries=2 "
    "suite.arrangements=[random]",
    "hallucination": "suite.tasks=[questions.jsonl] suite.max_tokens=4",
}


def run(suite, folder, documents, *more):
    keys = (
        f"checkpoint={folder} suite={suite} {SUITES[suite]} data=text data.path={documents} "
        "wandb.mode=disabled device=cpu".split()
    )
    return main(["eval", *keys, *more])


@pytest.fixture
def asked(monkeypatch):
    """The inputs that suites send to the model, as (tokens, tokens of the possible answers)."""
    sent = []

    def spy(module, name, inputs):
        function = getattr(module, name)

        def called(lm, *args, **options):
            sent.extend(inputs(*args))
            return function(lm, *args, **options)

        monkeypatch.setattr(module, name, called)

    for module in (retrieval, hallucination):
        spy(module, "generations", lambda prompts, *rest: [(prompt, []) for prompt in prompts])
    spy(
        retrieval,
        "loglikelihoods",
        lambda pairs, batch: [(prompt, [answer]) for prompt, answer in pairs],
    )
    spy(
        icl_prompts,
        "likeliest",
        lambda shared, queries, labels, batch: [(shared + query, labels) for query in queries],
    )
    return sent


@pytest.mark.parametrize("suite", SUITES)
def test_prompts_are_a_users_turn(suite, chat_folder, documents, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    assert run(suite, chat_folder, documents, "suite.chat_template=true") == 0
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    assert asked
    for tokens, answers in asked:
        text = tokenizer.decode(tokens)
        user, _, start = text.removeprefix("<user>").rpartition("<|endoftext|><assistant>")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=True, add_generation_prompt=True
        )
        assert tokens[: len(rendered["input_ids"])] == rendered["input_ids"]
        if suite == "retrieval":
            assert user.endswith("?") and (start or tokenizer.decode(answers[0])).startswith(
                "The magic number"
            )
        elif suite == "hallucination":
            assert user.endswith("Answer in a few words:") and not start
        else:
            assert user.endswith("Label:") and user.count("Label:") == 3 and not start
            assert all(
                answer[-1] == tokenizer.eos_token_id
                and not tokenizer.decode(answer).startswith(" ")
                for answer in answers
            )
    asked.clear()
    assert run(suite, chat_folder, documents) == 0 and asked
    assert not any("<assistant>" in tokenizer.decode(tokens) for tokens, _ in asked)
    assert (
        len(list(tmp_path.glob(f"runs/hub/*/evals/0/{suite}/*/results.json"))) == 2
    )  # another settings hash


def test_the_template_of_a_model(chat_folder):
    job = EvalJob(checkpoint=str(chat_folder), suite=HarnessSuite(name="harness", tasks=["a"]))
    plain = LanguageModel(load(str(chat_folder)))
    chat = with_chat_template(plain, job)
    assert chat.decode(chat.prompt("Who?", " I am")) == "<user>Who?<|endoftext|><assistant>I am"
    assert (
        chat.closing == [plain.tokenizer.eot_id]
        and plain.decode(plain.prompt("Who?", " I")) == "Who? I"
    )


@pytest.mark.parametrize(
    ("template", "system", "message"),
    [
        (
            None,
            None,
            r"suite.chat_template=true cannot be used: the tokenizer of \S+ has no chat template",
        ),
        (
            "{{ raise_exception('no') }}",
            None,
            r"suite.chat_template=true cannot be used: the template of \S+ fails: no",
        ),
        ("{{ messages | length }}", None, r"suite.chat_template=true .* leaves out a turn's text"),
        (
            "{{ messages[-1].content }}",
            "Be brief.",
            r"suite.system_instruction=Be brief. cannot be used: .* has no system role",
        ),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{{ messages[0].content }}",
            "Be brief.",
            r"suite.system_instruction=Be brief. cannot be used: .* has no system role",
        ),
    ],
)
def test_a_template_that_cannot_be_used(hf_folder, tmp_path, template, system, message):
    folder = tmp_path / "model"
    shutil.copytree(hf_folder, folder)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    job = EvalJob(checkpoint=str(folder), suite=HarnessSuite(name="harness", tasks=["a"]))
    with pytest.raises(UserError, match=message) as raised:
        with_chat_template(LanguageModel(load(str(folder))), job, system)
    assert "\n" not in str(raised.value)


def test_limit_is_a_share(hf_folder, documents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("icl", hf_folder, documents, "limit=0.5", "suite.queries=5") == 0
    (results,) = tmp_path.glob("runs/hub/*/evals/0/icl/*/results.json")
    assert json.loads(results.read_text())["examples"] == 3
