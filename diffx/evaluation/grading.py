"""Mathematics tasks of ``tasks/``: their rows in one form, and whether an answer is right."""

import re
from contextlib import suppress
from fractions import Fraction
from typing import Any

from datasets import Dataset

_DIGITS = r"(?<!\d)\d{1,100}(?!\d)"  # bounded, so that a search is linear
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)])-)?(?P<value>(?:{_DIGITS}\s+)?{_DIGITS}\s*/\s*{_DIGITS}"
    rf"|(?:{_DIGITS}(?:\.\d{{1,100}})?|\.\d{{1,100}})(?:[eE][-+]?\d{{1,3}})?)"
)
_QUESTIONS = ("question", "problem", "content", "input")
_ANSWERS = ("answer", "Answer", "target")
_WORDS = re.compile(r"\\(?:text|textbf|mathbf|mathrm)\s*\{([^{}]*)\}")


def rows(dataset: Dataset) -> Dataset:
    """Give rows of MATH, SVAMP, MAWPS, CARP, TabMWP or CollegeMath ``question`` and ``answer``."""
    return dataset.map(_row, remove_columns=dataset.column_names)


def _row(row: dict[str, Any]) -> dict[str, str]:
    question = next((row[key] for key in _QUESTIONS if row.get(key)), "")
    if row.get("Body"):
        body = row["Body"].strip()
        question = f"{body}{'' if body.endswith(('.', '!', '?')) else '.'} {row['Question']}"
    if row.get("table"):
        title = f' regarding "{row["table_title"]}"' if row.get("table_title") else ""
        head = f"Read the following table{title} and answer a question."
        question = f"{head}\n{row['table']}\n{question}"
        if row.get("choices"):
            question += f" Choose from: {', '.join(map(str, row['choices']))}."
    answers = [row[key] for key in _ANSWERS if row.get(key) is not None]
    answer = answers[0] if answers else final(row["solution"])
    return {"question": question.strip(), "answer": str(answer).strip()}


def score(row: dict[str, str], responses: list[str]) -> dict[str, float]:
    """Whether a response gives the row's answer: as a number if that is one, else as a text."""
    return {"exact_match": float(matches(row["answer"], responses[0]))}


def matches(gold: str, response: str) -> bool:
    """Compare the right answer with a response's final one (see ``final``), else its last number.

    Whole numbers must be equal, others to a part in 10,000. Words may be followed by reasons.
    """
    response = response.rpartition("</think>")[2]
    said = final(response)
    number = _number(_bare(gold))
    if number is None:
        parts = [] if said is None else [said, re.split(r"[,;:.]|\bbecause\b", said)[0]]
        return _plain(gold) in map(_plain, parts)
    answer = _bare(response if said is None else said)
    if said is not None and _number(end := answer.rpartition("=")[2]) is not None:  # "3 + 4 = 7"
        answer = end
    numbers = [match[0] for match in _NUMBER.finditer(answer)]
    value = _number(numbers[-1 if said is None else 0]) if numbers else None
    if value is None or (value.denominator == 1 and number.denominator == 1):
        return value == number
    # exact, since a float may not hold what a model writes
    return abs(value - number) <= max(abs(value), abs(number)) / 10_000


def is_number(gold: str) -> bool:
    """Whether a right answer is a number, a fraction or a mixed number."""
    return _number(_bare(gold)) is not None


def final(response: str) -> str | None:
    """The last LaTeX box after the last "answer is", or the rest of its line; else None."""
    _, said, rest = response.rpartition("answer is")
    _, box, inside = rest.rpartition("\\boxed{")
    if not box:
        return rest.strip(" :\n*").split("\n")[0].strip(" *").removesuffix(".") if said else None
    depth = 1
    for index, char in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return inside[:index]
    return inside


def _bare(text: str) -> str:
    """The text without LaTeX, signs of units, bold type and commas of thousands."""
    text = " ".join(text.split())  # single blanks, so that searches are linear
    text = text.replace("\N{MINUS SIGN}", "-").replace("**", "")
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac)", " ", text)  # a mixed number
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = _WORDS.sub(r"\1", text)
    times = r"(?:\\times|\\cdot|\N{MULTIPLICATION SIGN})"
    text = re.sub(rf"\s*{times}\s*10\s*\^\s*\{{?(-?\d+)\}}?", r"e\1", text)
    text = re.sub(r"\\[ ,;!]|[$%\\]", "", text)
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _number(text: str) -> Fraction | None:
    """The value of a number, fraction or mixed number; None if the text is anything else."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    parts = re.sub(r"\s*/\s*", "/", match["value"]).split()  # of a mixed number
    with suppress(ZeroDivisionError):
        return sum(map(Fraction, parts), Fraction()) * (-1 if match["sign"] else 1)
    return None


def _plain(text: str) -> str:
    return re.sub(r"[\s$.\"'*]", "", _WORDS.sub(r"\1", text)).casefold()
