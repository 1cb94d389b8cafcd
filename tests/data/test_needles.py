"""Needles: their positions, the amount of text around them, and reproducible draws."""

import re

import pytest

from diffx.config.data import BpeTokenizer, BytesTokenizer
from diffx.data.needles import CITIES, Haystack, draw_needles, question_of
from diffx.data.tokenizers import make_tokenizer

TEXTS = [
    " ".join(f"Sentence {i} of {j} has a few words in it." for i in range(60)) for j in range(3)
] + ["no stop " * 100]
NEEDLE = re.compile(r"The magic number of (\w+) is (\d+)\.")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return make_tokenizer(
        BytesTokenizer() if request.param == "bytes" else BpeTokenizer(vocab_size=400), TEXTS
    )


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return Haystack(TEXTS, tokenizer.encode_batch)


def test_cities_are_unique_and_none_hides_in_another():
    assert len(set(CITIES)) == len(CITIES) >= 100
    assert not [(a, b) for a in CITIES for b in CITIES if a != b and a in b]


@pytest.mark.parametrize("length", [200, 350, 700])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_samples_are_as_long_as_they_may_be(tokenizer, haystack, depth, length):
    for number in range(5):
        needles = draw_needles(f"{number}", 2, 1, depth, 3)
        length_asked = max(length, haystack.least(needles))
        sample = haystack.hide(needles, length_asked)
        used = len(tokenizer.encode(sample.prompt)) + len(tokenizer.encode(needles.answer))
        assert length_asked - 12 <= used <= length_asked, "a word or so is all that may be missing"


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_first_needle_stands_at_the_depth(haystack, depth):
    for number in range(10):
        needles = draw_needles(f"{number}", 6, 2, depth, 4)
        sample = haystack.hide(needles, 2000)
        start, stop = sample.span
        assert (
            sample.context[start:stop].strip()
            == f"The magic number of {needles.cities[0]} is {needles.numbers[0]}."
        )
        others = NEEDLE.sub("", sample.context)
        before = NEEDLE.sub("", sample.context[:start])
        assert len(before) / len(others) == pytest.approx(depth, abs=0.05)
        assert (
            start == 0 if depth == 0 else stop == len(sample.context) if depth == 1 else start > 0
        )


def test_every_needle_is_in_the_text_once(haystack):
    needles = draw_needles("x", 8, 2, 0.5, 5)
    found = NEEDLE.findall(haystack.hide(needles, 2000).context)
    assert sorted(found) == sorted(zip(needles.cities, needles.numbers, strict=True))
    assert len(set(needles.cities)) == len(set(needles.numbers)) == 8
    assert all(len(number) == 5 and number[0] != "0" for number in needles.numbers)


def test_draws_depend_on_the_seed_alone():
    assert (
        draw_needles("a", 3, 2, 0.5, 4)
        == draw_needles("a", 3, 2, 0.5, 4)
        != draw_needles("b", 3, 2, 0.5, 4)
    )


def test_other_needles_stand_anywhere(haystack):
    places = [
        place for seed in range(200) for place in draw_needles(str(seed), 2, 1, 0.5, 4).places[1:]
    ]
    assert (
        min(places) < 0.05
        and max(places) > 0.95
        and sum(places) / len(places) == pytest.approx(0.5, abs=0.06)
    )


def test_questions():
    assert question_of(["Rome"]) == " What is the magic number of Rome? The magic number of Rome is"
    needles = draw_needles("x", 4, 3, 0.0, 2)
    one, two, three = needles.cities[:3]
    cities = f"{one}, {two} and {three}"
    assert (
        needles.question
        == f" What are the magic numbers of {cities}? The magic numbers of {cities} are"
    )
    assert needles.answer == " {}, {} and {}.".format(*needles.numbers)


def test_too_short(haystack):
    needles = draw_needles("x", 4, 1, 0.5, 4)
    least = haystack.least(needles)
    assert NEEDLE.sub("", haystack.hide(needles, least).context).strip() == "", (
        "the least leaves no room for text"
    )
    with pytest.raises(ValueError, match="do not hold"):
        haystack.hide(needles, least - 1)
    with pytest.raises(ValueError, match="the text has only"):
        haystack.hide(needles, 10**6)
