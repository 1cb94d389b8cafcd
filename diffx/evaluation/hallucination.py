"""``suite=hallucination``: summaries and answers, judged for their faithfulness to the text (arXiv 2410.05258, section 3.6)."""

import random
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffx.config import UserError
from diffx.config.eval import EndpointJudge
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations
from diffx.evaluation.suite import Context, Example, Record
from diffx.files import json_sha256, open_text, parse_json
from diffx.results.declare import Average, Declaration, Metric, Picture, Table, metrics
from diffx.results.published import published

# (name, subset, revision) of data sets that `datasets` reads without a script; LongBench has a script, and an archive beside it.
_HUB: dict[str, tuple[str, str | None, str | None]] = {
    "xsum": ("EdinburghNLP/xsum", None, "refs/convert/parquet"),
    "cnn_dm": ("abisee/cnn_dailymail", "3.0.0", None),
    "multinews": ("Awesome075/multi_news_parquet", None, None),
}
_LONGBENCH, _ARCHIVE = "zai-org/LongBench", "data.zip"
_LONGBENCH_TASKS = ("qasper", "hotpotqa", "2wikimqa")
_SUFFIXES = (".jsonl", ".jsonl.gz")
_ACCEPTED = (
    '{"document", "reference"} (a summary) or {"context", "question", "answers"} (a question)'
)
_CUT = "\n[...]\n"  # stands where the middle of a long text was left out


@dataclass(frozen=True, slots=True)
class _Form:
    """How a sort of task is asked.

    Attributes:
        prompt: what the model reads, with the places of text and question.
        max_tokens: tokens of an answer, unless ``suite.max_tokens`` says otherwise.
        stop: what ends an answer that has begun.
    """

    prompt: str
    max_tokens: int
    stop: str


_FORMS = {
    "summary": _Form(
        "{text}\n\nTL;DR:", 128, "\n\n"
    ),  # as GPT-2 was asked for summaries (Radford et al., 2019, section 3.6)
    "question": _Form("Text: {text}\n\nQuestion: {question}\n\nAnswer in a few words:", 32, "\n"),
}


def plan(context: Context) -> list[Example]:
    """Draw the samples of each task, the same ones for every model.

    Raises:
        UserError: a task that cannot be read or fetched or has rows of another form, two tasks of one name, or a model whose context
            has no room for a question and its answer.
    """
    suite, tasks = context.suite, {}
    for task in suite.tasks:
        name, rows = _load(task, suite.data_dir)
        if name in tasks:
            raise UserError(
                f"suite.tasks={','.join(suite.tasks)} cannot be used: two tasks would be called {name}; rename a file"
            )
        drawn = list(
            {json_sha256(row, sort_keys=False)[:16]: row for row in rows}.items()
        )  # equal rows once
        context.sources[name] = json_sha256(rows, sort_keys=False)
        random.Random(f"{context.seed}/{name}").shuffle(drawn)
        tasks[name] = context.limited(drawn[: suite.samples])
    examples = [
        Example(f"{name}/{key}", {"task": name, **row})
        for name, drawn in tasks.items()
        for key, row in drawn
    ]
    for example in examples:
        max_tokens = suite.max_tokens or _FORMS[example.data["kind"]].max_tokens
        needed = len(context.lm.prompt(_prompt(example.data, _CUT))) + max_tokens
        if needed > context.lm.context:
            what = f"{example.id} and its answer take {needed} tokens without any text, and the model was trained on {context.lm.context}"
            raise UserError(
                f"suite.max_tokens={max_tokens} cannot be used: {what}; lower it or leave the task out"
            )
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Generate greedily. A record's ``prompt`` is all that the model saw, ``text_seen`` the share of the text's tokens that is in it."""
    from diffx.evaluation.text_metrics import answer_scores, summary_scores  # slow to import

    lm = context.lm
    for kind, form in _FORMS.items():
        chosen = [example for example in examples if example.data["kind"] == kind]
        max_tokens = context.suite.max_tokens or form.max_tokens
        prompts = [fit(lm, example.data, max_tokens) for example in chosen]
        tokens = [lm.prompt(prompt) for prompt, _ in prompts]
        for index, text in generations(lm, tokens, max_tokens, batch=context.batch):
            example, (prompt, seen) = chosen[index], prompts[index]
            said = (
                text.strip().partition(form.stop)[0].rstrip()
            )  # many models begin with an empty line
            scores = (summary_scores if kind == "summary" else answer_scores)(
                said, example.data["references"]
            )
            scores |= {
                "answer_tokens": len(lm.encode(said)),
                "empty": float(not said),
                "text_seen": seen,
            }
            asked = {
                key: value for key, value in example.data.items() if key not in ("text", "task")
            }
            yield {
                "id": example.id,
                "by": {"task": example.data["task"]},
                **asked,
                "prompt": prompt,
                "answer": said,
                "scores": scores,
            }


def fit(lm: LanguageModel, row: dict[str, Any], max_tokens: int) -> tuple[str, float]:
    """Lay out a prompt that fits the model's context together with its answer.

    A text that is too long loses its middle, as in LongBench (arXiv 2308.14508), and ``[...]`` stands there; the question stays whole.

    Args:
        lm: the model.
        row: the ``kind``, the ``text`` and, of a question, the ``question``.
        max_tokens: tokens of the answer.

    Returns:
        The prompt, and the share of the text's tokens that it holds.
    """
    room = lm.context - len(lm.prefix) - len(lm.suffix) - max_tokens
    prompt = _prompt(row, row["text"])
    tokens, excess = lm.encode(row["text"]), len(lm.encode(prompt)) - room
    kept = len(tokens)
    while excess > 0 and kept > 0:  # again, since tokens may fall otherwise around the cut
        kept = max(0, kept - excess)
        start, end = (
            lm.decode(tokens[: kept - kept // 2]),
            lm.decode(tokens[len(tokens) - kept // 2 :]),
        )
        half = "\N{REPLACEMENT CHARACTER}"  # of a character that the cut went through
        prompt = _prompt(row, start.rstrip(half) + _CUT + end.lstrip(half))
        excess = len(lm.encode(prompt)) - room
    return prompt, kept / max(1, len(tokens))


def judge(context: Context, records: list[Record]) -> list[Record]:
    """Give finished records their verdicts: ``scores["faithful"]`` where the judge's can be used, and ``verdict``.

    Needs no model. An empty answer is not faithful, and the judge is not asked. Verdicts stand in the folder, in a file named by the judge.

    Raises:
        RunError: the endpoint cannot judge; what it said so far is kept.
    """
    from diffx.evaluation.judge import Verdict, ask, judge_prompt  # slow to import

    config = context.job.judge
    if not isinstance(config, EndpointJudge):
        return records
    asked = [record for record in records if record["answer"]]
    prompts = [
        judge_prompt(record["prompt"], record["references"], record["answer"]) for record in asked
    ]
    name = re.sub(r"[^\w.-]+", "-", config.model)
    with context.reporter.progress("judge", len(prompts), unit="answers") as bar:
        verdicts = ask(config, prompts, context.folder / f"verdicts_{name}.jsonl", bar.at)
    found = {record["id"]: verdict for record, verdict in zip(asked, verdicts, strict=True)}
    judged = []
    for record in records:
        verdict = found.get(record["id"], Verdict(False, ""))
        scores = {} if verdict.faithful is None else {"faithful": float(verdict.faithful)}
        scores |= {
            key: value for key, value in record["scores"].items() if key != "faithful"
        }  # it may be another judge's
        judged.append(
            {
                **record,
                "scores": scores,
                "verdict": {
                    "judge": config.model,
                    "faithful": verdict.faithful,
                    "said": verdict.said,
                },
            }
        )
    return judged


_AGREEMENT = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
_DIVERSITY = {
    "distinct_1": "higher",
    "distinct_2": "higher",
    "distinct_3": "higher",
    "self_bleu": "lower",
}
_MOST_UNUSABLE = 0.1  # share of verdicts; above it there is a warning


def declare(context: Context) -> Declaration:
    """Means by task; and figures of all answers together: their diversity, unusable verdicts."""
    others = {"answer_tokens": "tokens", "empty": "share", "text_seen": "share"}
    judge = context.job.judge
    judged = f", judged by {judge.model}" if isinstance(judge, EndpointJudge) else ""
    titles = {
        f"Faithful answers{judged}": ["faithful"],
        "Agreement with the references": list(_AGREEMENT),
        "Diversity of the answers (self_bleu: lower is more diverse)": list(_DIVERSITY),
    }
    return Declaration(
        metrics=[
            *metrics(["faithful", *_AGREEMENT]),
            *(Metric(name=name, unit=unit, better="none") for name, unit in others.items()),
            *(Metric(name=k, better=v, aggregate="given") for k, v in _DIVERSITY.items()),
            Metric(name="unusable_verdicts", better="lower", aggregate="given"),
        ],
        tables=[
            Table(
                by=["task"],
                label="{task}",
                average=Average(over=["task"], metrics={"faithful": ["faithful"]}),
            )
        ],
        pictures=[
            Picture(kind="bars", title=title, metrics=names, x="task", limits=[0, 1.08])
            for title, names in titles.items()
        ],
        references=published("hallucination"),
    )


def figures(context: Context, records: list[Record]) -> list[Record]:
    """The diversity of each task's answers, and the share of verdicts that could not be used."""
    from diffx.evaluation.text_metrics import diversity  # slow to import

    rows = []
    for task in dict.fromkeys(record["by"]["task"] for record in records):
        of_task = [record for record in records if record["by"]["task"] == task]
        texts = [record["answer"] for record in of_task if record["answer"]]
        place = {"task": task, "aggregate": "corpus", "n": len(texts)}
        rows += [place | {"metric": k, "value": v} for k, v in diversity(texts).items()]
        judged = [record for record in of_task if "verdict" in record]
        if judged:
            lost = sum(record["verdict"]["faithful"] is None for record in judged)
            unusable, n = lost / len(judged), len(judged)
            place = {"task": task, "aggregate": "mean", "n": n}
            rows.append(place | {"metric": "unusable_verdicts", "value": unusable})
            if unusable > _MOST_UNUSABLE:
                context.reporter.warn(
                    f"{task}: {unusable:.0%} of the judge's {n} replies give no verdict; "
                    "`faithful` is a mean over the others"
                )
    return rows


def _prompt(row: dict[str, Any], text: str) -> str:
    return _FORMS[row["kind"]].prompt.format(text=text, question=row.get("question"))


def _load(task: str, data_dir: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Read a task's name and rows: ``kind``, ``text``, ``references``, and of a question ``question``."""
    if task in _HUB or task in _LONGBENCH_TASKS:
        paths = (
            [Path(data_dir).expanduser() / f"{task}{suffix}" for suffix in _SUFFIXES]
            if data_dir
            else []
        )
        path = next((path for path in paths if path.is_file()), None)
        if data_dir and path is None:
            raise UserError(
                f"suite.data_dir={data_dir} cannot be used: it has no {task}.jsonl or {task}.jsonl.gz; rows as on the hub, or {_ACCEPTED}"
            )
        name, rows = task, _fetch(task) if path is None else _read(path)
    else:
        path = Path(task).expanduser()
        if not path.is_file() or not path.name.endswith(_SUFFIXES):
            known = ", ".join([*_HUB, *_LONGBENCH_TASKS])
            raise UserError(
                f"suite.tasks={task} cannot be used: there is no such .jsonl or .jsonl.gz file, and the known tasks are {known}"
            )
        name, rows = path.name.removesuffix(".gz").removesuffix(".jsonl"), _read(path)
    read = [
        _row(row, f"suite.tasks={task} cannot be used: row {number}")
        for number, row in enumerate(rows, 1)
    ]
    kept = [row for row in read if row["text"].strip() and row["references"]]
    if not kept:
        raise UserError(
            f"suite.tasks={task} cannot be used: it holds no row with a text and a reference; accepted are {_ACCEPTED}"
        )
    return name, kept


def _read(path: Path) -> list[Any]:
    try:
        with open_text(path) as file:
            return [parse_json(line) for line in file if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(
            f"{path} cannot be used: {reason(error)}; it must be JSON lines in UTF-8, or those in .gz"
        ) from error


def _fetch(task: str) -> list[Any]:
    try:
        if task in _HUB:
            import datasets  # slow to import, and local data needs no hub

            name, subset, revision = _HUB[task]
            with asking_hub(name):
                return list(datasets.load_dataset(name, subset, split="test", revision=revision))
        name = _LONGBENCH
        from huggingface_hub import hf_hub_download

        with asking_hub(name):
            path = hf_hub_download(name, _ARCHIVE, repo_type="dataset")
        with zipfile.ZipFile(path) as archive, archive.open(f"data/{task}.jsonl") as file:
            return [parse_json(line) for line in file]
    except Exception as error:  # any library below may fail here, each with an exception of its own
        local = f"set suite.data_dir to a folder with {task}.jsonl"
        raise UserError(
            f"suite.tasks={task} cannot be used: the data set {name} cannot be fetched: {reason(error)}; {local}"
        ) from error


def _row(row: Any, where: str) -> dict[str, Any]:
    """Read a row by the names of its fields; besides ours those of the hub's data sets: article, summary, highlights, input."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object; accepted are {_ACCEPTED}")

    def field(*names: str) -> Any:
        return next((row[name] for name in names if name in row), None)

    read: dict[str, Any] = {"kind": "summary", "text": field("document", "article")}
    references = field("reference", "summary", "highlights")
    if read["text"] is None or references is None:
        read = {
            "kind": "question",
            "text": field("context"),
            "question": field("question", "input"),
        }
        references = field("answers")
    references = [references] if isinstance(references, str) else references
    texts = [
        *(value for key, value in read.items() if key != "kind"),
        *(references if isinstance(references, list) else [None]),
    ]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, row)) or 'none'}; accepted are {_ACCEPTED}, texts or lists of them"
        )
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds half of a surrogate pair, which is no text") from error
    return {**read, "references": [text for text in references if text.strip()]}
