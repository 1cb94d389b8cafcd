"""``suite=hallucination``: judged summaries and answers (arXiv 2410.05258, 3.6)."""

import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffx.config.checks import refuse
from diffx.config.eval import EndpointJudge
from diffx.data.hub import asking_hub
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations
from diffx.evaluation.suite import Context, Example, Record
from diffx.evaluation.task_rows import check_names, read_rows, refusing, short_name
from diffx.files import json_sha256, parse_json
from diffx.results.declare import Average, Declaration, Picture, Table, metrics
from diffx.results.published import published

# (name, subset, revision) of data sets that `datasets` reads without a script
_HUB: dict[str, tuple[str, str | None, str | None]] = {
    "xsum": ("EdinburghNLP/xsum", None, "refs/convert/parquet"),
    "cnn_dm": ("abisee/cnn_dailymail", "3.0.0", None),
    "multinews": ("Awesome075/multi_news_parquet", None, None),
}
_LONGBENCH = "zai-org/LongBench"  # a script, and data.zip
_LONGBENCH_TASKS = ("qasper", "hotpotqa", "2wikimqa")
_SUFFIXES = (".jsonl", ".jsonl.gz")
_ACCEPTED = (
    'accepted are {"document", "reference"} (a summary) or {"context", "question", "answers"} '
    "(a question), texts or lists of them"
)
_CUT = "\n[...]\n"  # in place of the middle of a long text

# kind: (prompt, tokens of an answer, end of an answer)
_FORMS = {
    # as GPT-2 was asked for summaries (Radford et al., 2019, section 3.6)
    "summary": ("{text}\n\nTL;DR:", 128, "\n\n"),
    "question": ("Text: {text}\n\nQuestion: {question}\n\nAnswer in a few words:", 32, "\n"),
}
_AGREEMENT = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
_DISTINCT = ("distinct_1", "distinct_2", "distinct_3")
_MAX_UNUSABLE = 0.1  # share of verdicts above which there is a warning


def plan(context: Context) -> list[Example]:
    """Draw the samples of each task, the same ones for every model."""
    suite, examples = context.suite, []
    loaded = [_load(task, suite.data_dir) for task in suite.tasks]
    check_names(suite.tasks, [name for name, _ in loaded])
    for name, rows in loaded:
        context.sources[name] = json_sha256(rows, sort_keys=False)
        distinct = list({json_sha256(row, sort_keys=False)[:16]: row for row in rows}.items())
        random.Random(f"{context.seed}/{name}").shuffle(distinct)
        for key, row in context.limited(distinct[: suite.samples]):
            examples.append(Example(f"{name}/{key}", {"task": name, **row}))
    for example in examples:
        max_tokens = suite.max_tokens or _FORMS[example.data["kind"]][1]
        needed = len(context.lm.prompt(_prompt(example.data, _CUT))) + max_tokens
        refuse(
            needed > context.lm.context,
            f"suite.max_tokens={max_tokens}",
            f"{example.id} and its answer take {needed} tokens without any text, and the model was "
            f"trained on {context.lm.context}; lower it or leave the task out",
        )
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Generate greedily; ``text_seen`` is the share of the text in the prompt."""
    from diffx.evaluation.text_metrics import answer_scores, summary_scores  # slow to import

    lm = context.lm
    for kind, (_, max_tokens, stop) in _FORMS.items():
        score = summary_scores if kind == "summary" else answer_scores
        chosen = [example for example in examples if example.data["kind"] == kind]
        max_tokens = context.suite.max_tokens or max_tokens
        prompts = [fit(lm, example.data, max_tokens) for example in chosen]
        tokens = [lm.prompt(prompt) for prompt, _ in prompts]
        for index, text in generations(lm, tokens, max_tokens, batch=context.batch):
            data, (prompt, seen) = chosen[index].data, prompts[index]
            said = text.strip().partition(stop)[0].rstrip()  # many models begin with an empty line
            scores = score(said, data["references"])
            scores |= {"answer_tokens": len(lm.encode(said)), "empty": float(not said)}
            record = {key: value for key, value in data.items() if key not in ("text", "task")}
            record |= {"id": chosen[index].id, "by": {"task": data["task"]}, "prompt": prompt}
            yield record | {"answer": said, "scores": scores | {"text_seen": seen}}


def fit(lm: LanguageModel, row: dict[str, Any], max_tokens: int) -> tuple[str, float]:
    """Return a prompt that fits the context together with ``max_tokens`` of answer.

    A long text loses its middle, as in LongBench (arXiv 2308.14508): the share of its tokens that
    are in the prompt is returned too.
    """
    room = lm.context - len(lm.prefix) - len(lm.suffix) - max_tokens
    prompt = _prompt(row, row["text"])
    tokens, excess = lm.encode(row["text"]), len(lm.encode(prompt)) - room
    kept = len(tokens)
    while excess > 0 and kept > 0:  # repeated, since the text around the cut has other tokens
        kept = max(0, kept - excess)
        start = lm.decode(tokens[: kept - kept // 2])
        end = lm.decode(tokens[len(tokens) - kept // 2 :])
        half = "\N{REPLACEMENT CHARACTER}"  # of a character that the cut divided
        prompt = _prompt(row, start.rstrip(half) + _CUT + end.lstrip(half))
        excess = len(lm.encode(prompt)) - room
    return prompt, kept / max(1, len(tokens))


def judge(context: Context, records: list[Record]) -> list[Record]:
    """Add a ``verdict`` to records, and ``scores["faithful"]`` where the judge gave one.

    An empty answer is not faithful, without asking. Replies are kept in a file of the folder.

    Raises:
        RunError: the endpoint cannot judge.
    """
    from diffx.evaluation.judge import Verdict, ask, judge_prompt  # slow to import

    config = context.job.judge
    if not isinstance(config, EndpointJudge):
        return records
    asked = [record for record in records if record["answer"]]
    prompts = [judge_prompt(row["prompt"], row["references"], row["answer"]) for row in asked]
    name = re.sub(r"[^\w.-]+", "-", config.model)
    cache = context.folder / f"verdicts_{name}.jsonl"
    with context.reporter.progress("judge", len(prompts), unit="answers") as bar:
        answers = ask(config, prompts, cache, bar.at)
    verdicts = {record["id"]: verdict for record, verdict in zip(asked, answers, strict=True)}
    judged = []
    for record in records:
        verdict = verdicts.get(record["id"], Verdict(False, ""))
        scores = {} if verdict.faithful is None else {"faithful": float(verdict.faithful)}
        scores |= {k: v for k, v in record["scores"].items() if k != "faithful"}  # another judge's
        verdict_data = {"judge": config.model, **asdict(verdict)}
        judged.append({**record, "scores": scores, "verdict": verdict_data})
    return judged


def declare(context: Context) -> Declaration:
    """Means by task, the diversity of all answers of a task, and the share of unusable verdicts."""
    judge = context.job.judge
    judged = f", judged by {judge.model}" if isinstance(judge, EndpointJudge) else ""
    titles = {
        f"Faithful answers{judged}": ["faithful"],
        "Agreement with the references": list(_AGREEMENT),
        "Diversity of the answers (self_bleu: lower is more diverse)": [*_DISTINCT, "self_bleu"],
    }
    average = Average(over=["task"], metrics={"faithful": ["faithful"]})
    return Declaration(
        metrics=[
            *metrics(["faithful", *_AGREEMENT]),
            *metrics(["answer_tokens"], unit="tokens", better="none"),
            *metrics(["empty", "text_seen"], better="none"),
            *metrics(_DISTINCT, aggregate="given"),
            *metrics(["self_bleu", "unusable_verdicts"], better="lower", aggregate="given"),
        ],
        tables=[Table(by=["task"], label="{task}", average=average)],
        pictures=[
            Picture(kind="bars", title=title, metrics=names, x="task", limits=[0, 1.08])
            for title, names in titles.items()
        ],
        references=published("hallucination"),
    )


def figures(context: Context, records: list[Record]) -> Iterator[Record]:
    """The diversity of each task's answers, and the share of verdicts that could not be used."""
    from diffx.evaluation.text_metrics import diversity  # slow to import

    for task in dict.fromkeys(record["by"]["task"] for record in records):
        of_task = [record for record in records if record["by"]["task"] == task]
        texts = [record["answer"] for record in of_task if record["answer"]]
        place = {"task": task, "aggregate": "corpus", "n": len(texts)}
        for name, value in diversity(texts).items():
            yield place | {"metric": name, "value": value}
        judged = [record["verdict"]["faithful"] for record in of_task if "verdict" in record]
        if not judged:
            continue
        place |= {"aggregate": "mean", "n": len(judged)}
        unusable = judged.count(None) / len(judged)
        yield place | {"metric": "unusable_verdicts", "value": unusable}
        if unusable > _MAX_UNUSABLE:
            share = f"{unusable:.0%} of the judge's {len(judged)} replies give no verdict"
            context.reporter.warn(f"{task}: {share}; `faithful` is a mean over the others")


def _prompt(row: dict[str, Any], text: str) -> str:
    return _FORMS[row["kind"]][0].format(text=text, question=row.get("question"))


def _load(task: str, data_dir: str | None) -> tuple[str, list[dict[str, Any]]]:
    """A task's name and rows: ``kind``, ``text``, ``references``, maybe ``question``."""
    name, setting, known = task, f"suite.tasks={task}", [*_HUB, *_LONGBENCH_TASKS]
    if task not in known:
        path = Path(task).expanduser()
        valid = path.is_file() and path.name.endswith(_SUFFIXES)
        tasks = f"the known tasks are {', '.join(known)}"
        refuse(not valid, setting, f"there is no such .jsonl or .jsonl.gz file, and {tasks}")
        name, rows = short_name(path), read_rows(path)
    elif data_dir:
        paths = [Path(data_dir).expanduser() / f"{task}{suffix}" for suffix in _SUFFIXES]
        existing = [path for path in paths if path.is_file()]
        problem = f"it has no {task}.jsonl or {task}.jsonl.gz; rows as on the hub, or {_ACCEPTED}"
        refuse(not existing, f"suite.data_dir={data_dir}", problem)
        rows = read_rows(existing[0], "suite.data_dir")
    else:
        rows = list(enumerate(_fetch(task), 1))
    parsed = [_row(row, setting, f"row {number}") for number, row in rows]
    usable = [row for row in parsed if row["text"].strip() and row["references"]]
    refuse(not usable, setting, f"it holds no row with a text and a reference; {_ACCEPTED}")
    return name, usable


def _fetch(task: str) -> list[Any]:
    name, subset, revision = _HUB.get(task, (_LONGBENCH, None, None))
    advice = f"set suite.data_dir to a folder with {task}.jsonl"
    with refusing(f"suite.tasks={task}", f"{name} cannot be fetched", advice), asking_hub(name):
        if task in _HUB:
            import datasets  # slow to import, and local data needs no hub

            return list(datasets.load_dataset(name, subset, split="test", revision=revision))
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(name, "data.zip", repo_type="dataset")
        with zipfile.ZipFile(path) as archive, archive.open(f"data/{task}.jsonl") as file:
            return [parse_json(line) for line in file]


def _row(row: Any, setting: str, place: str) -> dict[str, Any]:
    """Parse a row of a file, or of the hub (article, summary, highlights, input)."""
    refuse(not isinstance(row, dict), setting, f"{place} is no JSON object; {_ACCEPTED}")

    def field(*names: str) -> Any:
        return next((row[name] for name in names if name in row), None)

    parsed: dict[str, Any] = {"kind": "summary", "text": field("document", "article")}
    references = field("reference", "summary", "highlights")
    if parsed["text"] is None or references is None:
        question = field("question", "input")
        parsed = {"kind": "question", "text": field("context"), "question": question}
        references = field("answers")
    references = references if isinstance(references, list) else [references]
    texts = [*parsed.values(), *references]
    names = ", ".join(map(repr, row)) or "none"
    valid = all(isinstance(text, str) for text in texts)
    refuse(not valid, setting, f"{place} has the fields {names}; {_ACCEPTED}")
    joined = "".join(texts)
    half = joined.encode(errors="ignore").decode() != joined
    refuse(half, setting, f"{place} holds half of a surrogate pair, which is no text")
    return {**parsed, "references": [text for text in references if text.strip()]}
