"""Answers that are expressions in LaTeX, compared by ``math_verify``: needs the extra ``math``."""

from math_verify import LatexExtractionConfig, parse, verify

from diffx.evaluation.grading import final, is_number, matches


def score(row: dict[str, str], responses: list[str]) -> dict[str, float]:
    """Whether a response gives the row's answer, as text, as a number, or as an equal expression.

    ``math_verify`` counts a comparison of over 5 s as wrong, and works in the main thread only.
    """
    gold, response = row["answer"], responses[0]
    equal = matches(gold, response)
    if equal or is_number(gold):
        return {"exact_match": float(equal)}
    expected = parse(f"${gold.strip('$')}$", extraction_config=[LatexExtractionConfig()])
    said = final(response)
    given = parse(response if said is None else f"${said.strip('$')}$")
    return {"exact_match": float(verify(expected, given))}
