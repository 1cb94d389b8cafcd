"""The task of a needle in a haystack: magic numbers of cities, hidden in text.

    … text. The magic number of Chicago is 1234567. More text … What is the magic number of
    Chicago? The magic number of Chicago is → 1234567.

The task of the Large World Model (arXiv 2402.08268), used in arXiv 2410.05258, section 3.4.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

_NAMES = """
Accra Adelaide Algiers Amman Amsterdam Ankara Antwerp Athens Atlanta Auckland Baghdad Baku Bangkok
Barcelona Beijing Beirut Belfast Belgrade Berlin Bern Bilbao Bogota Bologna Boston Brisbane Bristol
Brussels Bucharest Budapest Cairo Calgary Canberra Caracas Casablanca Chennai Chicago Cologne
Copenhagen Cordoba Dakar Dallas Damascus Delhi Denver Detroit Dhaka Doha Dresden Dubai Dublin Durban
Edinburgh Florence Frankfurt Geneva Genoa Ghent Glasgow Granada Hamburg Hanoi Havana Helsinki
Houston Istanbul Jakarta Jerusalem Kabul Kampala Karachi Kiev Kingston Kyoto Lagos Lahore Leeds
Leipzig Lima Lisbon Liverpool London Luanda Lusaka Lyon Madrid Manchester Manila Marseille Melbourne
Memphis Miami Milan Minsk Montreal Moscow Mumbai Munich Nairobi Naples Nice Oslo Ottawa Palermo
Paris Perth Philadelphia Phoenix Porto Portland Prague Quito Riga Rome Rotterdam Salzburg Santiago
Seattle Seoul Shanghai Singapore Sofia Stockholm Stuttgart Sydney Taipei Tallinn Tbilisi Tehran
Tokyo Toronto Tripoli Tunis Turin Valencia Vancouver Venice Verona Vienna Vilnius Warsaw Wellington
Winnipeg Zagreb Zurich
"""
CITIES = _NAMES.split()
_SENTENCE_WORDS = 16  # length of a sentence in text without full stops, such as code
_ENDS = (".", "!", "?", '."', '?"', ".'", ".)")


@dataclass(frozen=True, slots=True)
class Needles:
    """The hidden sentences and the question, independent of the text around them.

    Attributes:
        cities: one a needle, all different; those that are asked for come first.
        numbers: one a needle, all different.
        asked: how many are asked for.
        places: of each needle, as a share of the text's length; the first is the depth.
        start: where the text begins in the source, as a share of the source's length.
    """

    cities: list[str]
    numbers: list[str]
    asked: int
    places: list[float]
    start: float

    @property
    def question(self) -> str:
        """The question and the beginning of its answer."""
        return question_of(self.cities[: self.asked])

    @property
    def answer(self) -> str:
        """The rest of the answer."""
        return f" {_listed(self.numbers[: self.asked])}."


@dataclass(frozen=True, slots=True)
class Sample:
    """Needles in a text.

    Attributes:
        context: the text with the needles.
        needles: the hidden sentences.
        span: the characters of the first needle in ``context``, with the blank before it.
    """

    context: str
    needles: Needles
    span: tuple[int, int]

    @property
    def prompt(self) -> str:
        """The input of a model: the context and the question."""
        return self.context + self.needles.question


def question_of(cities: Sequence[str]) -> str:
    """Return the question for the numbers of cities and the beginning of the answer."""
    verb, noun = ("is", "magic number") if len(cities) == 1 else ("are", "magic numbers")
    return f" What {verb} the {noun} of {_listed(cities)}? The {noun} of {_listed(cities)} {verb}"


def needle_of(city: str, number: str) -> str:
    """Return the sentence with the number of a city."""
    return f"The magic number of {city} is {number}."


def draw_needles(seed: str, needles: int, asked: int, depth: float, digits: int) -> Needles:
    """Draw needles; equal arguments give equal needles on every machine."""
    choose = random.Random(seed)
    cities = choose.sample(CITIES, needles)
    numbers = choose.sample(range(10 ** (digits - 1), 10**digits), needles)
    places = [depth, *(choose.random() for _ in range(needles - 1))]
    return Needles(cities, [str(number) for number in numbers], asked, places, choose.random())


class Haystack:
    """Documents, cut into sentences, in which needles are hidden."""

    def __init__(
        self, texts: Iterable[str], encode_batch: Callable[[list[str]], Sequence[Sequence[int]]]
    ) -> None:
        self._sentences = [sentence for text in texts for sentence in _sentences(text)]
        self._encode_batch = encode_batch
        self._cost = cache(lambda sentence: self._count([f" {sentence}"])[0])

    def least(self, needles: Needles) -> int:
        """Return the tokens of needles, question and answer without text."""
        hidden = " ".join(map(needle_of, needles.cities, needles.numbers))
        return sum(self._count([hidden + needles.question, needles.answer]))

    def hide(self, needles: Needles, length: int) -> Sample:
        """Hide needles in text; prompt and answer have ``length`` tokens, or about a word less.

        Raises:
            ValueError: ``length`` is below ``least``, or the text is too short.
        """
        pieces, costs = self._take(needles.start, length - self.least(needles))
        sample = _join(pieces, costs, needles)
        # Joined sentences can have more tokens than the sum of their counts.
        while sum(self._count([sample.prompt, needles.answer])) > length:
            if not pieces:
                raise ValueError(f"{length} tokens do not hold the needles")
            pieces[-1] = pieces[-1].rpartition(" ")[0]
            if not pieces[-1]:
                del pieces[-1], costs[-1]
            sample = _join(pieces, costs, needles)
        return sample

    def _take(self, start: float, limit: int) -> tuple[list[str], list[int]]:
        """Take sentences, and the first words of the last, up to ``limit`` tokens; with counts."""
        pieces: list[str] = []
        costs: list[int] = []
        first = int(start * len(self._sentences))
        for sentence in self._sentences[first:] + self._sentences[:first]:
            cost = self._cost(sentence)
            if cost >= limit:
                parts = list(accumulate(sentence.split(), "{} {}".format))
                counts = self._count([f" {part}" for part in parts])
                fitting = [pair for pair in zip(parts, counts, strict=True) if pair[1] <= limit]
                for part, cost in fitting[-1:]:
                    pieces.append(part)
                    costs.append(cost)
                return pieces, costs
            pieces.append(sentence)
            costs.append(cost)
            limit -= cost
        raise ValueError(f"the text has only {sum(costs)} tokens")

    def _count(self, texts: list[str]) -> list[int]:
        return [len(tokens) for tokens in self._encode_batch(texts)]


def _join(pieces: list[str], costs: list[int], needles: Needles) -> Sample:
    """Put each needle between two sentences, at the position nearest to its place."""
    joints = np.cumsum([0, *costs])  # tokens before each joint
    at = [int(abs(joints - place * joints[-1]).argmin()) for place in needles.places]
    # Of several needles at one joint, the asked one is first at depth 0 and last at depth 1.
    shares = [needles.places[0], *[0.5] * (len(at) - 1)]
    order = sorted(range(len(at)), key=lambda needle: (at[needle], shares[needle], needle))
    hidden = list(map(needle_of, needles.cities, needles.numbers))
    parts: list[str] = []
    done = 0
    for needle in order:
        parts += pieces[done : at[needle]]
        done = at[needle]
        if needle == 0:
            start = len(" ".join(parts))
        parts.append(hidden[needle])
    context = " ".join(parts + pieces[done:])
    return Sample(context, needles, (start, start + len(hidden[0]) + (start > 0)))


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:-1]) + " and " * (len(items) > 1) + items[-1]


def _sentences(text: str) -> Iterator[str]:
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if word.endswith(_ENDS) or len(words) == _SENTENCE_WORDS:
            yield " ".join(words)
            words = []
    if words:
        yield " ".join(words)
