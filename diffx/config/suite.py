"""Suites of ``diffx eval``: one dataclass a kind."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import (
    POSITIVE,
    check_fields,
    check_seed,
    count,
    count_fields,
    listed,
    refuse,
    require,
    shares,
    texts,
)


@dataclass(kw_only=True, slots=True)
class SuiteConfig:
    """What every suite shares.

    Attributes:
        kind: the sort of suite (set by ``suite=``, not by hand).
        name: the suite's name, as in ``suite=``; its results stand under it.
    """

    kind: str = MISSING
    name: str = MISSING


@dataclass(kw_only=True, slots=True)
class HarnessSuite(SuiteConfig):
    """Any tasks of ``lm-eval``: ``suite.tasks=[...]``.

    A task reads the split it is measured on and the one its demonstrations come from, such as
    arc_easy/test.jsonl and arc_easy/train.jsonl of ``data_dir``; a group needs a folder for each
    of its tasks. The format of task YAMLs is in docs/new_task_guide.md of lm-eval's repository.

    Attributes:
        tasks: task or group names.
        shots: numbers of demonstrations; each gives a run over all tasks. ``null`` is each task's
            default.
        include_path: a folder of more task YAMLs.
        data_dir: a folder with local copies of all tasks' data, ``<data_dir>/<task>/<split>.jsonl``
            (or ``.parquet``), rows as on the hub.
        chat_template: apply the tokenizer's chat template (models of the hub only).
        fewshot_as_multiturn: with ``chat_template``, each demonstration is a turn of the user and
            one of the assistant; ``null`` is the same as ``chat_template``, as with lm-eval.
        system_instruction: a text before every prompt; with ``chat_template``, the system's turn.
        max_tokens: tokens of a generated answer; ``null`` is each task's default.
        gen_kwargs: settings of generation that replace each task's, such as
            ``{temperature: 0.7, do_sample: true}``; ``null`` is each task's default.
    """

    kind: str = "harness"
    tasks: Any = MISSING
    shots: Any = (0,)
    include_path: str | None = None
    data_dir: str | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    max_tokens: int | None = None
    gen_kwargs: Any = None

    def __post_init__(self) -> None:
        self.gen_kwargs = self.gen_kwargs or {}
        accepted = "names and values, such as {temperature: 0.7, do_sample: true}"
        check_fields(self, "suite", "gen_kwargs", accepted, lambda value: isinstance(value, dict))
        if self.fewshot_as_multiturn is None:
            self.fewshot_as_multiturn = self.chat_template
        refuse(
            self.fewshot_as_multiturn and not self.chat_template,
            "suite.fewshot_as_multiturn=true",
            "it needs suite.chat_template=true",
        )
        self.tasks = texts("suite.tasks", self.tasks)
        self.shots = _counts("suite.shots", self.shots, 0, optional=True)
        check_fields(self, "suite", "max_tokens", POSITIVE)


@dataclass(kw_only=True, slots=True)
class _NeedleSuite(SuiteConfig):
    """What the suites of magic numbers share.

    Attributes:
        depths: places of the first queried needle, as shares of the text.
        samples: samples for each case, length and depth.
        digits: digits of a magic number.
    """

    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 50
    digits: int = 7

    def __post_init__(self) -> None:
        self.depths = shares("suite.depths", self.depths)
        _check_numbers(self, "samples")
        check_fields(self, "suite", "digits", "from 1 to 18")


@dataclass(kw_only=True, slots=True)
class RetrievalSuite(_NeedleSuite):
    """Magic numbers of cities, hidden in text (arXiv 2410.05258, section 3.4).

    Attributes:
        cases: pairs [N, R]: needles in the text, and how many of them are asked for.
        lengths: lengths of the whole input in tokens; ``null`` is the model's context (4096 at
            most), its half and its quarter, without those that do not hold the needles.
        constrained: also choose among the numbers in the text by their likelihood; guessing is
            right once in N.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "retrieval"
    cases: Any = ((1, 1), (2, 2), (4, 2), (6, 2))
    lengths: Any = None
    constrained: bool = True
    chat_template: bool = False

    def __post_init__(self) -> None:
        _NeedleSuite.__post_init__(self)
        self.cases = _cases("suite.cases", self.cases)
        self.lengths = _counts("suite.lengths", self.lengths, 1, optional=True)


@dataclass(kw_only=True, slots=True)
class AllocationSuite(_NeedleSuite):
    """Attention to the answer and to the noise in the retrieval task (arXiv 2410.05258, table 3).

    Attributes:
        case: [N, R]: needles in the text, and how many are asked for; the first is the answer.
        length: length of the whole input in tokens; ``null`` is the model's context, 4096 at most.
    """

    kind: str = "attention_allocation"
    case: Any = (6, 1)
    length: int | str | None = None

    def __post_init__(self) -> None:
        _NeedleSuite.__post_init__(self)
        (self.case,) = _cases("suite.case", [self.case])
        count_fields(self, "suite", "length")


@dataclass(kw_only=True, slots=True)
class _LabelSuite(SuiteConfig):
    """What the suites of classification share.

    Attributes:
        tasks: ``trec``, ``trec_fine``, ``banking77``, ``clinc150`` (from the hub), ``synthetic``,
            or paths of JSON lines {"text", "label"}.
        queries: texts to classify.
        template: a demonstration; ``{text}`` and ``{label}`` are filled in, and the label must
            stand at the end.
        labels: labels of the synthetic task.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    tasks: Any = ("synthetic",)
    queries: int = 100
    template: str = "Text: {text}\nLabel: {label}\n\n"
    labels: int = 6
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tasks = texts("suite.tasks", self.tasks)
        _check_numbers(self, "queries")
        check_fields(self, "suite", "labels", "from 2 to 100")
        before, _, end = self.template.partition("{label}")
        good = "{text}" in before and "{label}" in self.template and not end.strip()
        accepted = "a text with {text}, then {label} at its end"
        require(good, "suite.template", self.template, accepted)


@dataclass(kw_only=True, slots=True)
class IclSuite(_LabelSuite):
    """Many-shot classification with the labels as the only answers (2410.05258, section 3.5).

    A task may be a file of JSON lines (.jsonl or .jsonl.gz) with at least two labels and more lines
    than ``queries``; queries and demonstrations both come from it. A line:

        {"text": "a mail", "label": "its class"}

    Attributes:
        shots: numbers of demonstrations; ``null`` doubles from 1 until the context is full.
        per_class: count ``shots`` for each class, with 0 allowed, instead of in all.
    """

    kind: str = "icl"
    shots: Any = None
    per_class: bool = False

    def __post_init__(self) -> None:
        _LabelSuite.__post_init__(self)
        self.shots = _counts("suite.shots", self.shots, 0, optional=True)


@dataclass(kw_only=True, slots=True)
class IclOrderSuite(_LabelSuite):
    """The spread of accuracy over orders of the same demonstrations (2410.05258, section 3.5).

    Attributes:
        shots: demonstrations; ``null`` is as many as fill half of the context, 256 at most.
        orders: permutations for each arrangement and seed.
        arrangements: ``random`` and ``alternating`` (by class).
        seeds: each draws other demonstrations and queries.
        queries: texts to classify for each order.
    """

    kind: str = "icl_order"
    shots: int | None = None
    orders: int = 10
    arrangements: Any = ("random", "alternating")
    seeds: Any = (0, 1, 2)
    queries: int = 50

    def __post_init__(self) -> None:
        _LabelSuite.__post_init__(self)
        self.arrangements = texts("suite.arrangements", self.arrangements)
        for name in self.arrangements:
            known = name in ("random", "alternating")
            require(known, "suite.arrangements", name, "random or alternating")
        self.seeds = _counts("suite.seeds", self.seeds, 0)
        for seed in self.seeds:
            check_seed("suite.seeds", seed)
        _check_numbers(self, "orders")
        check_fields(self, "suite", "orders shots", "2 or more")


@dataclass(kw_only=True, slots=True)
class LongContextSuite(SuiteConfig):
    """Loss by position in long texts, and where it falls: on repeated n-grams (AR-hit) or the rest.

    Attributes:
        length: tokens of a text; ``null`` is the model's context.
        texts: texts, cut from the documents of ``data=`` laid end to end.
        chunk: tokens computed at once behind the key/value cache.
        frequent: an n-gram seen more often than this in the training tokens is not counted as an
            AR-hit.
    """

    kind: str = "long_context"
    length: int | str | None = None
    texts: int = 20
    chunk: int = 1024
    frequent: int = 1250

    def __post_init__(self) -> None:
        count_fields(self, "suite", "length")
        _check_numbers(self, "texts chunk frequent")
        check_fields(self, "suite", "length", "2 or more")


@dataclass(kw_only=True, slots=True)
class RecallSuite(SuiteConfig):
    """Accuracy and loss against the number of pairs, of a run of ``data=recall`` (2312.04927).

    Attributes:
        pairs: numbers of pairs in a sample; ``null`` doubles from 1 to as many as a sample holds,
            which may be more than in training.
        samples: samples for each number of pairs.
        length: tokens of a sample; ``null`` is that of training.
    """

    kind: str = "recall"
    pairs: Any = None
    samples: int = 200
    length: int | str | None = None

    def __post_init__(self) -> None:
        self.pairs = _counts("suite.pairs", self.pairs, 1, optional=True)
        _check_numbers(self, "samples")
        count_fields(self, "suite", "length")
        check_fields(self, "suite", "length", "5 or more")


@dataclass(kw_only=True, slots=True)
class OutliersSuite(SuiteConfig):
    """The largest attention logits and hidden states, and their medians (2410.05258, table 5).

    Attributes:
        tokens: tokens measured (the paper: 400K).
        length: tokens of a window; ``null`` is the model's context, 2048 at most.
        top: ranks of the largest magnitudes to report.
    """

    kind: str = "outliers"
    tokens: int | str = "400K"
    length: int | str | None = None
    top: Any = (1, 2, 3, 10, 100)

    def __post_init__(self) -> None:
        count_fields(self, "suite", "tokens length")
        self.top = _counts("suite.top", self.top, 1)


@dataclass(kw_only=True, slots=True)
class HallucinationSuite(SuiteConfig):
    """Summaries and answers, judged for faithfulness to the text (arXiv 2410.05258, section 3.6).

    A task may be a file of JSON lines (.jsonl or .jsonl.gz) of either form:

        {"document": "a text", "reference": "its summary"}
        {"context": "a text", "question": "about it", "answers": ["right", "right too"]}

    "reference" and "answers" are a text or a list of texts.

    Attributes:
        tasks: ``xsum``, ``cnn_dm``, ``multinews``, ``qasper``, ``hotpotqa``, ``2wikimqa`` (from the
            hub), or paths of JSON lines: {"document", "reference"} for a summary, {"context",
            "question", "answers"} for a question; several references are a list.
        samples: samples a task.
        max_tokens: tokens of an answer; ``null`` is 128 for a summary and 32 for an answer.
        data_dir: a folder with local copies of the hub's data: ``<data_dir>/<task>.jsonl`` or
            ``.jsonl.gz``, rows as on the hub.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "hallucination"
    tasks: Any = ("xsum", "cnn_dm", "multinews", "qasper", "hotpotqa", "2wikimqa")
    samples: int = 100
    max_tokens: int | None = None
    data_dir: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tasks = texts("suite.tasks", self.tasks)
        _check_numbers(self, "samples max_tokens")


@dataclass(kw_only=True, slots=True)
class SpeedSuite(SuiteConfig):
    """Training, prefill and decoding speed, and peak memory.

    Attributes:
        batches: sequences at once.
        lengths: tokens of a sequence.
        decode_tokens: tokens decoded one at a time behind each sequence.
        rounds: how often each figure is taken; the median counts.
        train: also time forward and backward of training.
    """

    kind: str = "speed"
    batches: Any = (1, 8)
    lengths: Any = (512, 2048)
    decode_tokens: int = 32
    rounds: int = 5
    train: bool = True

    def __post_init__(self) -> None:
        self.batches = _counts("suite.batches", self.batches, 1)
        self.lengths = _counts("suite.lengths", self.lengths, 2)
        _check_numbers(self, "decode_tokens rounds")


def _check_numbers(config: SuiteConfig, names: str) -> None:
    """Each is a number of examples in memory."""
    check_fields(config, "suite", names, "a whole number from 1 to 1,000,000")


def _counts(key: str, value: Any, least: int, optional: bool = False) -> Any:
    if value is None and optional:
        return None
    items = [0 if item == 0 else count(key, item) for item in listed(key, value)]
    good = min(items) >= least and len(set(items)) == len(items)
    require(good, key, value, f"different whole numbers of {least} or more")
    return items


def _cases(key: str, value: Any) -> list[list[int]]:
    def good(case: Any) -> bool:
        pair = isinstance(case, list | tuple) and [type(number) for number in case] == [int, int]
        return pair and 1 <= case[1] <= case[0] <= 64

    usable = isinstance(value, list | tuple) and value and all(map(good, value))
    accepted = "pairs [N, R], 1 <= R <= N <= 64, such as [[1,1],[4,2]]"
    require(bool(usable), key, value, accepted)
    return [list(case) for case in value]


SUITE_CONFIGS: dict[str, type[SuiteConfig]] = {
    "harness": HarnessSuite,
    "retrieval": RetrievalSuite,
    "attention_allocation": AllocationSuite,
    "icl": IclSuite,
    "icl_order": IclOrderSuite,
    "long_context": LongContextSuite,
    "recall": RecallSuite,
    "outliers": OutliersSuite,
    "hallucination": HallucinationSuite,
    "speed": SpeedSuite,
}
