"""Multi-needle retrieval (arXiv 2410.05258, section 3.4): magic numbers of cities, hidden in text, asked for at its end.

The first queried needle stands at the depth, the others at random places. A score is the share of the asked numbers that are right:

    greedy        the numbers in the greedy continuation, in the order asked
    constrained   each number chosen by its likelihood among all those in the text

A length counts the whole input in the model's tokens, with the room for the answer.
"""

import re
from collections.abc import Iterator

from diffx.config import UserError
from diffx.data.needles import CITIES, Haystack, Needles, Sample, draw_needles, question_of
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.scoring import generations, loglikelihoods
from diffx.evaluation.suite import Context, Example, Record
from diffx.results.declare import Average, Declaration, Metric, Picture, Reference, Table
from diffx.results.published import published

_CHUNK = 32768  # tokens read between two writings of records


def plan(context: Context) -> list[Example]:
    """Cases, lengths, depths and samples; the needles depend on the seed, the case and the depth, not on the model.

    Raises:
        UserError: a length that the model cannot read, that does not hold the needles, or is more than the text.
    """
    suite = context.suite
    most = min(context.lm.context, 4096)
    examples = []
    for needles, asked in suite.cases:
        group = _case(needles, asked)
        for length in suite.lengths or [most // 4, most // 2, most]:
            for depth in suite.depths:
                data = {
                    "task": group,
                    "draw": group,
                    "needles": needles,
                    "asked": asked,
                    "length": length,
                    "depth": depth,
                }
                cell = []
                for number in range(suite.samples):
                    name = f"{group}/depth={depth:g}/{number}"  # the same needles at every length
                    place = data | {"number": number, "example": name}
                    cell.append(Example(f"{name}/T={length}", place))
                examples += context.limited(cell)
    return long_enough(context, haystack_of(context), examples, "suite.lengths")


def haystack_of(context: Context) -> Haystack:
    """The text to hide needles in."""
    return Haystack(context.documents(), context.lm.encode_batch)


def needles_of(context: Context, example: Example) -> Needles:
    """The needles of an example."""
    data = example.data
    draw = f"{context.seed}/{data['draw']}/{data['depth']:g}/{data['number']}"  # the same at every length
    return draw_needles(draw, data["needles"], data["asked"], data["depth"], context.suite.digits)


def hide(context: Context, haystack: Haystack, example: Example) -> Sample:
    """The example's sample, with which the model's input has the example's length at most."""
    return haystack.hide(
        needles_of(context, example),
        example.data["length"] - len(context.lm.prefix + context.lm.suffix),
    )


def long_enough(
    context: Context, haystack: Haystack, examples: list[Example], key: str
) -> list[Example]:
    """Leave out default lengths that do not hold the needles, and refuse what cannot be asked.

    Args:
        context: what the suite works with.
        haystack: the text.
        examples: of every length.
        key: the lengths' setting; the lengths are the default's where it is null.

    Raises:
        UserError: as ``plan`` says, or no default length holds the needles.
    """
    lm, digits = context.lm, context.suite.digits
    needles = max(example.data["needles"] for example in examples)
    if needles > min(len(CITIES), 9 * 10 ** (digits - 1)):
        raise UserError(
            f"suite.digits={digits} cannot be used with {needles} needles: there are not so many numbers; give more digits"
        )
    least = len(lm.prefix + lm.suffix) + max(
        haystack.least(needles_of(context, example)) for example in examples
    )
    lengths = sorted({example.data["length"] for example in examples})
    short = [length for length in lengths if length < least]
    what = f"{needles} needles, question and answer take {least} tokens"
    if short and getattr(context.suite, key.removeprefix("suite.")) is not None:
        raise UserError(f"{key}={short[0]} cannot be used: {what}; give more")
    if short == lengths:
        cases = key.replace("length", "case")
        ways = f"give fewer needles by {cases}, or more tokens by {key}"
        raise UserError(
            f"{key}=null cannot be used with {lm.name}: {what}, and the longest default is {lengths[-1]}; {ways}"
        )
    if short:
        context.reporter.warn(f"{key}=null leaves out {' and '.join(map(str, short))}: {what}")
        examples = [example for example in examples if example.data["length"] >= least]
    if lengths[-1] > (lm.limit or lengths[-1]):
        raise UserError(
            f"{key}={lengths[-1]} cannot be used with {lm.name}: it reads {lm.limit} tokens at most"
        )
    if lengths[-1] > lm.context:
        context.reporter.warn(
            f"{key}={lengths[-1]} is more than the {lm.context} tokens that {lm.name} was trained on"
        )
    try:
        haystack.hide(needles_of(context, examples[0]), lengths[-1])
    except ValueError as error:
        raise UserError(
            f"{key}={lengths[-1]} cannot be used: {error}; choose more text by data=, or give less"
        ) from error
    return examples


def answer(context: Context, examples: list[Example]) -> Iterator[Record]:
    """Ask, the longest first, a few at a time."""
    lm, haystack = context.lm, haystack_of(context)
    left = sorted(examples, key=lambda example: -example.data["length"])
    while left:
        size = max(
            1,
            _CHUNK // left[0].data["length"],
            0 if context.batch == "auto" else int(context.batch),
        )
        chunk, left = left[:size], left[size:]
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
    """The likeliest number for each asked city, of those in the text; each is asked for by itself, so that no answer helps another."""
    lm = context.lm
    requests, places = [], []
    for index, sample in enumerate(samples):
        needles, before = sample.needles, lm.prefix + lm.encode(sample.context)
        for place in range(needles.asked):
            question, start = _parts(question_of([needles.cities[place]]))
            if lm.suffix:
                asked = before + _behind(lm, [question])[0] + lm.suffix
                requests += [
                    (asked, lm.encode(f"{start.lstrip()} {number}")) for number in needles.numbers
                ]
            else:
                texts = _behind(lm, [f"{question}{start} {number}" for number in needles.numbers])
                requests += [(before, tokens) for tokens in texts]
            places += [(index, place, number) for number in needles.numbers]
    best: dict[tuple[int, int], tuple[float, str]] = {}
    for (index, place, number), (score, _) in zip(
        places, loglikelihoods(lm, requests, context.batch), strict=True
    ):
        if (index, place) not in best or score > best[index, place][0]:
            best[index, place] = (score, number)
    return [
        [best[index, place][1] for place in range(sample.needles.asked)]
        for index, sample in enumerate(samples)
    ]


def _parts(prompt: str) -> tuple[str, str]:
    """Split a prompt into what a user asks and the beginning of the answer."""
    text, mark, start = prompt.rpartition("?")
    return text + mark, start


def _behind(lm: LanguageModel, texts: list[str]) -> list[list[int]]:
    """Encode texts as they are behind another text: some tokenizers begin a text with a blank."""
    stop = lm.encode(".")
    return [tokens[len(stop) :] for tokens in lm.encode_batch([f".{text}" for text in texts])]


def _share(said: list[str], asked: list[str]) -> float:
    return sum(mine == right for mine, right in zip(said, asked, strict=False)) / len(asked)


def declare(context: Context) -> Declaration:
    """Shares by case, by case and length, and by cell of the grid of lengths and depths.

    The same needles are hidden at every length, so that a case's examples are its needles, each
    with its mean over lengths.
    """
    names = ["greedy", *(["constrained"] if context.suite.constrained else [])]
    guessing = [
        Reference(
            label="guessing",
            metric="constrained",
            value=1 / needles,
            by={"task": _case(needles, asked)},
        )
        for needles, asked in context.suite.cases
    ]
    return Declaration(
        metrics=[Metric(name=name, unit="share of numbers right") for name in names],
        tables=[
            Table(by=["task"], label="{task}", average=Average(over=["task"])),
            Table(by=["task", "length"], label="{task} T={length}", compared=False),
            Table(
                by=["task", "length", "depth"],
                label="{task} T={length} depth {depth:.0%}",
                compared=False,
            ),
        ],
        pictures=[
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
        ],
        references=[*published("retrieval"), *guessing],
    )


def _case(needles: int, asked: int) -> str:
    return f"N={needles} R={asked}"
