"""Answers that are expressions in LaTeX, compared by ``math_verify``: needs the extra ``math``."""

from math_verify import LatexExtractionConfig, parse, verify

from diffx.evaluation.grading import final, is_number, matches


def score(row: dict[str, str], responses: list[str]) -> dict[str, float]:
    """Whether a response gives the row's answer, as text, as a number, or as an equal expression.

    A number is compared by ``matches`` alone, which is exact. ``math_verify`` counts a comparison
    of over 5 s as wrong, and works in the main thread only (it uses a signal).
    """
    gold, response = row["answer"], responses[0]
    if matches(gold, response) or is_number(gold):
        return {"exact_match": float(matches(gold, response))}
    expected = parse(f"${gold.strip('$')}$", extraction_config=[LatexExtractionConfig()])
    said = final(response)
    given = parse(response if said is None else f"${said.strip('$')}$")
    return {"exact_match": float(verify(expected, given))}
