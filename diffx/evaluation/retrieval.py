"""Multi-needle retrieval (arXiv 2410.05258, section 3.4): magic numbers of cities, hidden in text.

The first queried needle is at the depth, the others at random places. A score is the share of the
asked numbers that are right: ``greedy`` in the greedy continuation, in order; ``constrained`` by
likelihood among all numbers in the text. A length is that of input and answer in tokens.
"""

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.data.needles import CITIES, Haystack, Needles, Sample, draw_needles, question_of
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations, loglikelihoods
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Average, Declaration, Picture, Reference, Table, metrics
from diffx.results.published import published

_CHUNK = 32768  # tokens read between two writings of records


def plan(context: Context) -> list[Example]:
    """Cases, lengths, depths and samples; needles depend on seed, case and depth only."""
    suite, examples = context.suite, []
    most = min(context.lm.context, 4096)
    lengths = suite.lengths or [most // 4, most // 2, most]
    for (needles, asked), length, depth in product(suite.cases, lengths, suite.depths):
        case = _case(needles, asked)
        data = {"task": case, "draw": case, "needles": needles, "asked": asked}
        data |= {"length": length, "depth": depth}
        for number in context.limited(range(suite.samples)):
            name = f"{case}/depth={depth:g}/{number}"  # the same needles at every length
            sample = data | {"number": number, "example": name}
            examples.append(Example(f"{name}/T={length}", sample))
    return long_enough(context, haystack_of(context), examples, "suite.lengths")


def haystack_of(context: Context) -> Haystack:
    """The text to hide needles in."""
    return Haystack(context.documents(), context.lm.encode_batch)


def needles_of(context: Context, example: Example) -> Needles:
    """The needles of an example, the same at every length."""
    data = example.data
    draw = f"{context.seed}/{data['draw']}/{data['depth']:g}/{data['number']}"
    return draw_needles(draw, data["needles"], data["asked"], data["depth"], context.suite.digits)


def hide(context: Context, haystack: Haystack, example: Example) -> Sample:
    """The example's sample, whose input has at most the example's length."""
    tokens = example.data["length"] - len(context.lm.prefix + context.lm.suffix)
    return haystack.hide(needles_of(context, example), tokens)


def long_enough(
    context: Context, haystack: Haystack, examples: list[Example], key: str
) -> list[Example]:
    """Drop default lengths (the setting ``key`` is null) that do not hold the needles.

    Raises:
        UserError: the model cannot read a length; a length that is set, or every default one, does
            not hold the needles; or the text is too short.
    """
    lm, digits = context.lm, context.suite.digits
    needles = max(example.data["needles"] for example in examples)
    few, most = "there are not so many numbers; give more digits", 9 * 10 ** (digits - 1)
    refuse(needles > min(len(CITIES), most), f"suite.digits={digits}", few, f"{needles} needles")
    text = max(haystack.least(needles_of(context, example)) for example in examples)
    least = text + len(lm.prefix + lm.suffix)
    lengths = sorted({example.data["length"] for example in examples})
    short, longest = [length for length in lengths if length < least], lengths[-1]
    needed = f"{needles} needles, question and answer take {least} tokens"
    if getattr(context.suite, key.removeprefix("suite.")) is not None:
        refuse(bool(short), f"{key}={lengths[0]}", f"{needed}; give more")
    case = key.replace("length", "case")
    fewer = f"give fewer needles by {case}, or more tokens by {key}"
    default = f"{needed}, and the longest default is {longest}; {fewer}"
    refuse(short == lengths, f"{key}=null", default, lm.name)
    if short:
        context.reporter.warn(f"{key}=null leaves out {' and '.join(map(str, short))}: {needed}")
        examples = [example for example in examples if example.data["length"] >= least]
    context.check_length(key, longest)
    if longest > lm.context:
        trained = f"{lm.context} tokens that {lm.name} was trained on"
        context.reporter.warn(f"{key}={longest} is more than the {trained}")
    try:
        haystack.hide(needles_of(context, examples[0]), longest)
    except ValueError as error:
        more = "choose more text by data=, or give less"
        raise UserError(f"{key}={longest} cannot be used: {error}; {more}") from error
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Ask, the longest first, in chunks."""
    lm, haystack = context.lm, haystack_of(context)
    batch = 0 if context.batch == "auto" else int(context.batch)
    todo = sorted(examples, key=lambda example: -example.data["length"])
    while todo:
        size = max(1, _CHUNK // todo[0].data["length"], batch)
        chunk, todo = todo[:size], todo[size:]
        samples = [hide(context, haystack, example) for example in chunk]
        prompts = [lm.prompt(*_parts(sample.prompt)) for sample in samples]
        room = max(map(len, lm.encode_batch([sample.needles.answer for sample in samples])))
        said = dict(generations(lm, prompts, room, batch=context.batch))
        chosen = _choose(context, samples) if context.suite.constrained else [None] * len(chunk)
        for index, (example, sample, choice) in enumerate(zip(chunk, samples, chosen, strict=True)):
            needles = sample.needles
            asked = needles.numbers[: needles.asked]
            scores = {"greedy": _share(numbers_in(said[index]), asked)}
            if choice is not None:
                scores["constrained"] = _share(choice, asked)
            yield {
                "id": example.id,
                "example": example.data["example"],
                "by": {key: example.data[key] for key in ("task", "length", "depth")},
                "scores": scores,
                "tokens": len(prompts[index]),
                "needles": dict(zip(needles.cities, needles.numbers, strict=True)),
                "answers": asked,
                "said": said[index],
                "chosen": choice,
                "prompt": sample.prompt,
            }


def numbers_in(text: str) -> list[str]:
    """The whole numbers of a text, without commas of thousands."""
    return re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


def _choose(context: Context, samples: list[Sample]) -> list[list[str]]:
    """The likeliest number in the text for each asked city; each city is asked for by itself."""
    lm = context.lm
    requests: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        needles, before = sample.needles, lm.prefix + lm.encode(sample.context)
        for city in needles.cities[: needles.asked]:
            question, start = _parts(question_of([city]))
            answers = [f"{start} {number}" for number in needles.numbers]
            if lm.suffix:
                asked = before + _encode_after(lm, [question])[0] + lm.suffix
                texts = [lm.encode(answer.lstrip()) for answer in answers]
            else:
                asked, texts = before, _encode_after(lm, [question + answer for answer in answers])
            requests += [(asked, tokens) for tokens in texts]
    scores = iter(loglikelihoods(lm, requests, context.batch))
    chosen = []
    for needles in (sample.needles for sample in samples):
        sums = [[next(scores)[0] for _ in needles.numbers] for _ in range(needles.asked)]
        chosen.append([needles.numbers[of_city.index(max(of_city))] for of_city in sums])
    return chosen


def _parts(prompt: str) -> tuple[str, str]:
    """Split a prompt into what a user asks and the beginning of the answer."""
    text, mark, start = prompt.rpartition("?")
    return text + mark, start


def _encode_after(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    """Encode texts as they are after another text: some tokenizers begin a text with a blank."""
    stop = lm.encode(".")
    return [tokens[len(stop) :] for tokens in lm.encode_batch([f".{text}" for text in texts])]


def _share(said: list[str], asked: list[str]) -> float:
    return sum(map(str.__eq__, said, asked)) / len(asked)


def declare(context: Context) -> Declaration:
    """Shares by case, by case and length, and by length and depth.

    The same needles are hidden at every length: a case's examples are means over lengths.
    """
    suite = context.suite
    names = ["greedy", "constrained"] if suite.constrained else ["greedy"]
    label = "{task} T={length}"
    guessing = [
        Reference(label="guessing", metric="constrained", value=1 / n, by={"task": _case(n, asked)})
        for n, asked in suite.cases
    ]
    axes: Any = {"x": "length", "y": "depth", "limits": [0, 1], "xlabel": "tokens"}
    axes |= {"ylabel": "depth of the answer", "panels": ["task", "metric"], "title": "{panel}"}
    cell = label + " depth {depth:.0%}"
    return Declaration(
        metrics=metrics(names, unit="share of numbers right"),
        tables=[
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
            Table(by=["task", "length"], label=label, compared=False),
            Table(by=["task", "length", "depth"], label=cell, compared=False),
        ],
        pictures=[Picture(kind="heat", metrics=[name], **axes) for name in names],
        references=[*published("retrieval"), *guessing],
    )


def _case(needles: int, asked: int) -> str:
    return f"N={needles} R={asked}"
