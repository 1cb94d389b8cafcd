"""Metrics of generated text against figures computed by hand, from documentation, from NLTK."""

import pytest
from nltk.translate.bleu_score import sentence_bleu

from diffx.evaluation.text_metrics import answer_scores, diversity, summary_scores


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Palm House.", ["palm house"], 1, 1),  # case, articles and punctuation do not count
        ("the palm house", ["Palm House in Warsaw"], 0, 2 / 3),  # 2 of 2 words right, 2 of 4 found
        ("in Praga", ["Ochota", "Praga", "Wola"], 0, 2 / 3),  # the nearest reference counts
        ("Paris", ["London"], 0, 0),
        ("", ["London"], 0, 0),
    ],
)
def test_answers(answer, references, exact, f1):
    assert answer_scores(answer, references) == pytest.approx({"exact_match": exact, "f1": f1})


def test_summaries():
    # The example of rouge_score's documentation, where precision is 6/8 and recall 6/9 for ROUGE-1.
    scores = summary_scores(
        "The quick brown dog jumps on the log.", ["The quick brown fox jumps over the lazy dog"]
    )
    assert scores == pytest.approx({"rouge1": 12 / 17, "rouge2": 4 / 15, "rougeL": 10 / 17})
    assert summary_scores("the sky is blue", ["rain", "the sky is blue"]) == {
        "rouge1": 1,
        "rouge2": 1,
        "rougeL": 1,
    }
    assert summary_scores("", ["rain"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_distinct_words():
    figures = diversity(["a b a b", "a b c"])
    assert figures["distinct_1"] == pytest.approx(3 / 7)
    assert figures["distinct_2"] == pytest.approx(3 / 5)  # ab ba ab, ab bc
    assert figures["distinct_3"] == pytest.approx(3 / 3)


def test_self_bleu_is_that_of_nltk():
    texts = [
        "the cat sat on the mat today",
        "the cat sat on the mat",
        "a dog and the cat sat on the mat",
    ]
    words = [text.split() for text in texts]
    each = [sentence_bleu(words[:i] + words[i + 1 :], own) for i, own in enumerate(words)]
    assert diversity(texts)["self_bleu"] == pytest.approx(sum(each) / 3)
    assert diversity(["one and the same answer"] * 3)["self_bleu"] == pytest.approx(1)
    assert diversity(["red green blue white", "one two three four"])["self_bleu"] == 0


def test_nothing_is_no_diversity():
    assert diversity([]) == {}
    assert diversity(["word"]) == {"distinct_1": 1}
    assert diversity(["same words"] * 3 + ["other"], most=3) == diversity(["same words"] * 3)
