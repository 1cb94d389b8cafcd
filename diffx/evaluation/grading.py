"""Our mathematics tasks: their rows in one shape, and whether an answer is right."""

import math
import re
from typing import Any

from datasets import Dataset

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?|-?\.\d+")


def rows(dataset: Dataset) -> Dataset:
    """Give each row a ``question`` and an ``answer``.

    Rows are those of MATH (problem, solution), SVAMP (Body, Question, Answer), MAWPS (input, target), CARP (content, answer), TabMWP
    (table, table_title, question, choices, answer) or CollegeMath (question, answer); ``question`` and ``answer`` alone serve for all.
    """
    return dataset.map(_row, remove_columns=dataset.column_names)


def _row(row: dict[str, Any]) -> dict[str, str]:
    question = next((row[key] for key in ("question", "problem", "content", "input") if row.get(key)), "")
    if row.get("Body"):
        body = row["Body"].strip()
        question = f"{body if body.endswith(('.', '!', '?')) else body + '.'} {row['Question']}"
    if row.get("table"):
        about = f' regarding "{row["table_title"]}"' if row.get("table_title") else ""
        question = f"Read the following table{about} and answer a question.\n{row['table']}\n{question}"
        if row.get("choices"):
            question += f" Choose from: {', '.join(map(str, row['choices']))}."
    answer = next((row[key] for key in ("answer", "Answer", "target") if row.get(key) is not None), None)
    if answer is None:
        answer = final(row["solution"])
    return {"question": question.strip(), "answer": str(answer).strip()}


def score(row: dict[str, str], responses: list[str]) -> dict[str, float]:
    """Whether a response gives the row's answer: as a number if that is one, else as a text."""
    return {"exact_match": float(matches(row["answer"], responses[0]))}


def matches(gold: str, response: str) -> bool:
    """Compare a response's final answer to the right one, or, where it has none (see ``final``), its last number."""
    said = final(response)
    number = _value(gold)
    if number is None:
        return said is not None and _plain(said) == _plain(gold)
    found = _NUMBER.findall(response if said is None else said)
    value = _value(found[-1 if said is None else 0]) if found else None
    return value is not None and math.isclose(value, number, rel_tol=1e-4, abs_tol=1e-9)


def final(response: str) -> str | None:
    """What stands in the last LaTeX box behind the last "answer is", or the rest of that line; None if there is neither."""
    _, said, rest = response.rpartition("answer is")
    _, box, inside = rest.rpartition("\\boxed{")
    if not box:
        return rest.strip(" :\n").split("\n")[0].strip().removesuffix(".") if said else None
    depth = 1
    for index, char in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return inside[:index]
    return inside


def _value(text: str) -> float | None:
    text = text.strip().strip("$%").replace("\\$", "").replace(",", "").removesuffix("\\")
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    return re.sub(r"[\s$.\"']", "", text).casefold()
