"""Scores of generated texts against references and against each other."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torchmetrics.functional.text import squad

_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
_BLEU = BLEU(lowercase=True, effective_order=True)
_WORDS = Tokenizer13a()


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 (0 to 1), nearest reference, as in SQuAD (arXiv 1606.05250)."""
    # the start is not used
    answers: dict[str, list[str] | list[int]] = {"text": list(references), "answer_start": [0]}
    scores = squad({"id": "0", "prediction_text": answer}, {"id": "0", "answers": answers})
    return {name: float(scores[name]) / 100 for name in ("exact_match", "f1")}


def summary_scores(summary: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measure of stems, 0 to 1) with the nearest reference (Lin, 2004)."""
    scores = _ROUGE.score_multi(references, summary)
    return {name: float(score.fmeasure) for name, score in scores.items()}


def diversity(texts: Sequence[str], most: int = 100) -> dict[str, float]:
    """How much the first ``most`` texts of one task differ, from 0 to 1, as far as defined.

    ``distinct_n``, n = 1, 2, 3: distinct n-grams per n-gram (Li et al., arXiv 1510.03055); it falls
    with the number and the length of the texts, so compare equal numbers. ``self_bleu``: mean BLEU
    of each text with all others as references (Zhu et al., arXiv 1802.01886); lower is diverse.
    """
    texts = list(texts[:most])
    words = [_WORDS(text.lower()).split() for text in texts]
    figures = {}
    for n in (1, 2, 3):
        grams = [tuple(line[i : i + n]) for line in words for i in range(len(line) - n + 1)]
        if grams:
            figures[f"distinct_{n}"] = len(set(grams)) / len(grams)
    if len(texts) > 1 and figures:
        others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
        scores = [_BLEU.sentence_score(*pair).score for pair in zip(texts, others, strict=True)]
        figures["self_bleu"] = sum(scores) / len(scores) / 100
    return figures
