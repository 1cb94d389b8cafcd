"""Multi-needle retrieval (arXiv 2410.05258, section 3.4): magic numbers of cities, hidden in text.

The first queried needle is at the depth, the others at random places. A score is the share of the
asked numbers that are right: ``greedy`` in the greedy continuation, in order; ``constrained`` by
likelihood among all numbers in the text. A length counts the whole input and answer in tokens.
"""

import re
from collections.abc import Iterator
from itertools import product

from diffx.config import UserError
from diffx.data.needles import CITIES, Haystack, Needles, Sample, draw_needles, question_of
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations, loglikelihoods
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Average, Declaration, Picture, Reference, Table, metrics
from diffx.results.published import published

_CHUNK = 32768  # tokens read between two writings of records


def plan(context: Context) -> list[Example]:
    """Cases, lengths, depths and samples; needles depend on seed, case and depth only.

    Raises:
        UserError: the model cannot read a length, or it does not hold the needles or exceeds the
            text.
    """
    suite = context.suite
    most = min(context.lm.context, 4096)
    examples = []
    for (needles, asked), length, depth in product(
        suite.cases, suite.lengths or [most // 4, most // 2, most], suite.depths
    ):
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
    """Drop default lengths that do not hold the needles, and refuse what cannot be asked.

    Args:
        context: the suite's context.
        haystack: the text.
        examples: of every length.
        key: the setting of the lengths, null for the default ones.

    Raises:
        UserError: see ``plan``; or no default length holds the needles.
    """
    lm, digits = context.lm, context.suite.digits
    needles = max(example.data["needles"] for example in examples)
    if needles > min(len(CITIES), 9 * 10 ** (digits - 1)):
        raise UserError(
            f"suite.digits={digits} cannot be used with {needles} needles: there are not so many "
            "numbers; give more digits"
        )
    text = max(haystack.least(needles_of(context, example)) for example in examples)
    least = text + len(lm.prefix + lm.suffix)
    lengths = sorted({example.data["length"] for example in examples})
    short, longest = [length for length in lengths if length < least], lengths[-1]
    needed = f"{needles} needles, question and answer take {least} tokens"
    if short and getattr(context.suite, key.removeprefix("suite.")) is not None:
        raise UserError(f"{key}={short[0]} cannot be used: {needed}; give more")
    if short == lengths:
        raise UserError(
            f"{key}=null cannot be used with {lm.name}: {needed}, and the longest default is "
            f"{longest}; give fewer needles by {key.replace('length', 'case')}, or more tokens by "
            f"{key}"
        )
    if short:
        context.reporter.warn(f"{key}=null leaves out {' and '.join(map(str, short))}: {needed}")
        examples = [example for example in examples if example.data["length"] >= least]
    if longest > (lm.limit or longest):
        raise UserError(
            f"{key}={longest} cannot be used with {lm.name}: it reads {lm.limit} tokens at most"
        )
    if longest > lm.context:
        context.reporter.warn(
            f"{key}={longest} is more than the {lm.context} tokens that {lm.name} was trained on"
        )
    try:
        haystack.hide(needles_of(context, examples[0]), longest)
    except ValueError as error:
        raise UserError(
            f"{key}={longest} cannot be used: {error}; choose more text by data=, or give less"
        ) from error
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
    """The whole numbers of a text; commas of thousands, as in 1,234,567, are left out."""
    return re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text))


def _choose(context: Context, samples: list[Sample]) -> list[list[str]]:
    """The likeliest number in the text for each asked city; each city is asked for by itself."""
    lm = context.lm
    requests: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        needles, before = sample.needles, lm.prefix + lm.encode(sample.context)
        for city in needles.cities[: needles.asked]:
            question, start = _parts(question_of([city]))
            if lm.suffix:
                asked = before + _encode_after(lm, [question])[0] + lm.suffix
                texts = [lm.encode(f"{start.lstrip()} {number}") for number in needles.numbers]
            else:
                asked = before
                texts = _encode_after(
                    lm, [f"{question}{start} {number}" for number in needles.numbers]
                )
            requests += [(asked, tokens) for tokens in texts]
    scores = iter(loglikelihoods(lm, requests, context.batch))
    return [
        [
            max((next(scores)[0], -place, number) for place, number in enumerate(numbers))[2]
            for _ in range(sample.needles.asked)
        ]
        for sample in samples
        for numbers in [sample.needles.numbers]
    ]


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
    pictures = [
        Picture(
            kind="heat",
            title="{panel}",
            metrics=[name],
            x="length",
            y="depth",
            panels=["task", "metric"],
            xlabel="tokens",
            ylabel="depth of the answer",
            limits=[0, 1],
        )
        for name in names
    ]
    cell = label + " depth {depth:.0%}"
    return Declaration(
        metrics=metrics(names, unit="share of numbers right"),
        tables=[
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
            Table(by=["task", "length"], label=label, compared=False),
            Table(by=["task", "length", "depth"], label=cell, compared=False),
        ],
        pictures=pictures,
        references=[*published("retrieval"), *guessing],
    )


def _case(needles: int, asked: int) -> str:
    return f"N={needles} R={asked}"
