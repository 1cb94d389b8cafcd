"""Generated text against references, and generated texts against each other; libraries do the counting."""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torchmetrics.functional.text import squad

_ROUGE = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
_BLEU = BLEU(lowercase=True, effective_order=True)
_WORDS = Tokenizer13a()


def answer_scores(answer: str, references: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 (0 to 1) with the nearest reference, as SQuAD normalises and counts them (arXiv 1606.05250, section 6.1)."""
    # The places of the answers do not count.
    scores = squad(
        {"id": "0", "prediction_text": answer},
        {"id": "0", "answers": {"text": list(references), "answer_start": [0]}},
    )
    return {name: float(scores[name]) / 100 for name in ("exact_match", "f1")}


def summary_scores(summary: str, references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L (F-measure of word stems, 0 to 1), each with its nearest reference (Lin, 2004)."""
    return {
        name: float(score.fmeasure)
        for name, score in _ROUGE.score_multi(references, summary).items()
    }


def diversity(texts: Sequence[str], most: int = 100) -> dict[str, float]:
    """How much the texts of one task differ, from 0 to 1.

    ``distinct_n``, n = 1, 2, 3: different n-grams per n-gram of all texts (Li et al., arXiv 1510.03055); more is more diverse, but it also
    falls with the number and the length of the texts, so compare it between equal numbers and look at the length.
    ``self_bleu``: mean BLEU of each text with all others as its references (Zhu et al., arXiv 1802.01886); less is more diverse.

    Args:
        texts: the generations; of more than ``most`` the first are taken, since the work grows with their square.
        most: texts compared at most.

    Returns:
        The figures that can be formed: none without words, no ``self_bleu`` of a single text.
    """
    texts = list(texts[:most])
    words = [_WORDS(text.lower()).split() for text in texts]
    figures = {}
    for n in (1, 2, 3):
        grams = [tuple(line[i : i + n]) for line in words for i in range(len(line) - n + 1)]
        if grams:
            figures[f"distinct_{n}"] = len(set(grams)) / len(grams)
    if len(texts) > 1 and figures:
        each = [
            _BLEU.sentence_score(text, texts[:i] + texts[i + 1 :]).score
            for i, text in enumerate(texts)
        ]
        figures["self_bleu"] = sum(each) / len(each) / 100
    return figures
