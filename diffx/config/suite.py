"""Suites of ``diffx eval``: one dataclass a kind."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import check_seed, count, require
from diffx.errors import UserError


@dataclass(kw_only=True, slots=True)
class SuiteConfig:
    """What every suite shares.

    Attributes:
        kind: the sort of suite (set by ``suite=``, not by hand).
        name: the suite's own name, as in ``suite=``; its results stand under it.
    """

    kind: str = MISSING
    name: str = MISSING


@dataclass(kw_only=True, slots=True)
class HarnessSuite(SuiteConfig):
    """Any tasks of ``lm-eval``: ``suite.tasks=[...]``.

    ``include_path`` adds task YAMLs (lm-eval's format: docs/new_task_guide.md of its repository).
    ``data_dir`` replaces the hub for all tasks: ``<data_dir>/<task>/<split>.jsonl`` or ``.parquet``,
    rows as on the hub. A task reads the split it is measured on and the one its demonstrations come
    from, such as arc_easy/test.jsonl and arc_easy/train.jsonl; a group needs a folder for each of its
    tasks.

    Attributes:
        tasks: task or group names.
        shots: numbers of demonstrations; each gives a run over all tasks. ``null`` is each task's own number.
        include_path: a folder of task YAMLs of your own.
        data_dir: a folder with local copies of the tasks' data, ``<data_dir>/<task>/<split>.jsonl`` (or ``.parquet``), rows as on the hub.
        chat_template: apply the tokenizer's chat template (models of the hub only).
        fewshot_as_multiturn: with ``chat_template``, each demonstration is a turn of the user and one of the
            assistant; ``null`` is the same as ``chat_template``, as with lm-eval.
        system_instruction: a text before every prompt; with ``chat_template``, the system's turn.
        max_tokens: tokens of a generated answer; ``null`` is each task's own number.
        gen_kwargs: settings of generation that replace each task's, such as ``{temperature: 0.7, do_sample: true}``;
            ``null`` is each task's own.
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
        good = isinstance(self.gen_kwargs, dict)
        require(
            good,
            "suite.gen_kwargs",
            self.gen_kwargs,
            "names and values, such as {temperature: 0.7, do_sample: true}",
        )
        if self.fewshot_as_multiturn is None:
            self.fewshot_as_multiturn = self.chat_template
        if self.fewshot_as_multiturn and not self.chat_template:
            raise UserError(
                "suite.fewshot_as_multiturn=true cannot be used without suite.chat_template=true"
            )
        self.tasks = _texts("suite.tasks", self.tasks)
        self.shots = None if self.shots is None else _counts("suite.shots", self.shots, least=0)
        require(
            self.max_tokens is None or self.max_tokens >= 1,
            "suite.max_tokens",
            self.max_tokens,
            "a positive whole number",
        )


@dataclass(kw_only=True, slots=True)
class RetrievalSuite(SuiteConfig):
    """Magic numbers of cities, hidden in text (arXiv 2410.05258, section 3.4).

    Attributes:
        cases: pairs [N, R]: needles in the text, and how many of them are asked for.
        lengths: lengths of the whole input in tokens; ``null`` is the model's context and its half and quarter, 4096 at most, without
            those that do not hold the needles.
        depths: places of the first queried needle, as shares of the text.
        samples: samples for each case, length and depth.
        digits: digits of a magic number.
        constrained: also choose among the numbers in the text by their likelihood; guessing is right once in N.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "retrieval"
    cases: Any = ((1, 1), (2, 2), (4, 2), (6, 2))
    lengths: Any = None
    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 50
    digits: int = 7
    constrained: bool = True
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.cases = _cases(self.cases)
        self.lengths = (
            None if self.lengths is None else _counts("suite.lengths", self.lengths, least=1)
        )
        self.depths = _shares("suite.depths", self.depths)
        _number("suite.samples", self.samples)
        require(1 <= self.digits <= 18, "suite.digits", self.digits, "from 1 to 18")


@dataclass(kw_only=True, slots=True)
class AllocationSuite(SuiteConfig):
    """Attention to the answer and to the noise in the retrieval task (arXiv 2410.05258, table 3).

    Attributes:
        case: [N, R]: needles in the text, and how many of them are asked for; the first is the answer.
        length: length of the whole input in tokens; ``null`` is the model's context, 4096 at most.
        depths: places of the answer, as shares of the text.
        samples: samples for each depth.
        digits: digits of a magic number.
    """

    kind: str = "attention_allocation"
    case: Any = (6, 1)
    length: int | str | None = None
    depths: Any = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 50
    digits: int = 7

    def __post_init__(self) -> None:
        (self.case,) = _cases([self.case])
        self.length = None if self.length is None else count("suite.length", self.length)
        self.depths = _shares("suite.depths", self.depths)
        _number("suite.samples", self.samples)
        require(1 <= self.digits <= 18, "suite.digits", self.digits, "from 1 to 18")


@dataclass(kw_only=True, slots=True)
class IclSuite(SuiteConfig):
    """Many-shot classification with the labels as the only answers (arXiv 2410.05258, section 3.5).

    A task may be a file of JSON lines (.jsonl or .jsonl.gz) with at least two labels and more lines
    than ``queries``; queries and demonstrations both come from it. A line:

        {"text": "a mail", "label": "its class"}

    Attributes:
        tasks: ``trec``, ``trec_fine``, ``banking77``, ``clinc150`` (from the hub), ``synthetic``, or paths of JSON lines {"text", "label"}.
        shots: numbers of demonstrations; ``null`` doubles from 1 until the context is full.
        queries: texts to classify.
        template: a demonstration; ``{text}`` and ``{label}`` are filled in, and the label must stand at the end.
        labels: labels of the synthetic task.
        per_class: count ``shots`` for each class, with 0 allowed, instead of in all.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "icl"
    tasks: Any = ("synthetic",)
    shots: Any = None
    queries: int = 100
    template: str = "Text: {text}\nLabel: {label}\n\n"
    labels: int = 6
    per_class: bool = False
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tasks = _texts("suite.tasks", self.tasks)
        self.shots = None if self.shots is None else _counts("suite.shots", self.shots, least=0)
        _number("suite.queries", self.queries)
        require(2 <= self.labels <= 100, "suite.labels", self.labels, "from 2 to 100")
        _template(self.template)


@dataclass(kw_only=True, slots=True)
class IclOrderSuite(SuiteConfig):
    """The spread of accuracy over orders of the same demonstrations (arXiv 2410.05258, section 3.5).

    Attributes:
        tasks: as in ``icl``.
        shots: demonstrations; ``null`` is as many as fill half of the context, 256 at most.
        orders: permutations for each arrangement and seed.
        arrangements: ``random`` and ``alternating`` (by class).
        seeds: each draws demonstrations and queries of its own.
        queries: texts to classify for each order.
        template: as in ``icl``.
        labels: labels of the synthetic task.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "icl_order"
    tasks: Any = ("synthetic",)
    shots: int | None = None
    orders: int = 10
    arrangements: Any = ("random", "alternating")
    seeds: Any = (0, 1, 2)
    queries: int = 50
    template: str = "Text: {text}\nLabel: {label}\n\n"
    labels: int = 6
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tasks = _texts("suite.tasks", self.tasks)
        self.arrangements = _texts("suite.arrangements", self.arrangements)
        for name in self.arrangements:
            require(
                name in ("random", "alternating"),
                "suite.arrangements",
                name,
                "random or alternating",
            )
        self.seeds = _counts("suite.seeds", self.seeds, least=0)
        for seed in self.seeds:
            check_seed("suite.seeds", seed)
        for key in ("orders", "queries"):
            _number(f"suite.{key}", getattr(self, key))
        require(
            self.orders >= 2, "suite.orders", self.orders, "2 or more: a spread needs two orders"
        )
        require(self.shots is None or self.shots >= 2, "suite.shots", self.shots, "2 or more")
        require(2 <= self.labels <= 100, "suite.labels", self.labels, "from 2 to 100")
        _template(self.template)


@dataclass(kw_only=True, slots=True)
class LongContextSuite(SuiteConfig):
    """Loss by position in long texts, and where it falls: on repeated n-grams (AR-hit) or on the rest.

    Attributes:
        length: tokens of a text; ``null`` is the model's context.
        texts: texts, cut from the documents of ``data=`` laid end to end.
        chunk: tokens computed at once behind the key/value cache.
        frequent: an n-gram seen more often than this in the training tokens is not counted as an AR-hit.
    """

    kind: str = "long_context"
    length: int | str | None = None
    texts: int = 20
    chunk: int = 1024
    frequent: int = 1250

    def __post_init__(self) -> None:
        self.length = None if self.length is None else count("suite.length", self.length)
        for key in ("texts", "chunk", "frequent"):
            _number(f"suite.{key}", getattr(self, key))
        require(
            self.length is None or int(self.length) >= 2,
            "suite.length",
            self.length,
            "2 tokens or more",
        )


@dataclass(kw_only=True, slots=True)
class OutliersSuite(SuiteConfig):
    """The largest attention logits and hidden states, and their medians (arXiv 2410.05258, table 5).

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
        self.tokens = count("suite.tokens", self.tokens)
        self.length = None if self.length is None else count("suite.length", self.length)
        self.top = _counts("suite.top", self.top, least=1)


@dataclass(kw_only=True, slots=True)
class HallucinationSuite(SuiteConfig):
    """Summaries and answers, judged for their faithfulness to the text (arXiv 2410.05258, section 3.6).

    A task may be a file of JSON lines (.jsonl or .jsonl.gz) of either form:

        {"document": "a text", "reference": "its summary"}
        {"context": "a text", "question": "about it", "answers": ["right", "right too"]}

    "reference" and "answers" are a text or a list of texts.

    Attributes:
        tasks: ``xsum``, ``cnn_dm``, ``multinews``, ``qasper``, ``hotpotqa``, ``2wikimqa`` (from the hub), or paths of JSON lines:
            {"document", "reference"} for a summary, {"context", "question", "answers"} for a question; several references are a list.
        samples: samples a task.
        max_tokens: tokens of an answer; ``null`` is 128 for a summary and 32 for an answer.
        data_dir: a folder with local copies of the hub's data, rows as there: ``<data_dir>/<task>.jsonl`` or ``.jsonl.gz``.
        chat_template: ask within the tokenizer's chat template (instruct models of the hub only).
    """

    kind: str = "hallucination"
    tasks: Any = ("xsum", "cnn_dm", "multinews", "qasper", "hotpotqa", "2wikimqa")
    samples: int = 100
    max_tokens: int | None = None
    data_dir: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tasks = _texts("suite.tasks", self.tasks)
        for key in ("samples", "max_tokens"):
            value = getattr(self, key)
            _number(f"suite.{key}", 1 if value is None else value)


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
        self.batches = _counts("suite.batches", self.batches, least=1)
        self.lengths = _counts("suite.lengths", self.lengths, least=2)
        for key in ("decode_tokens", "rounds"):
            _number(f"suite.{key}", getattr(self, key))


def _listed(key: str, value: Any) -> list[Any]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        raise UserError(f"{key}={value} cannot be used: it must have one entry at least")
    return items


def _texts(key: str, value: Any) -> list[str]:
    items = _listed(key, value)
    if not all(isinstance(item, str) and item for item in items):
        raise UserError(f"{key}={value} cannot be used: it must be a name or a list of names")
    return items


def _number(key: str, value: int) -> None:
    require(
        1 <= value <= 10**6, key, value, "a whole number from 1 to 1,000,000"
    )  # each is an example in memory


def _counts(key: str, value: Any, least: int) -> list[int]:
    items = [0 if item == 0 else count(key, item) for item in _listed(key, value)]
    require(
        min(items) >= least and len(set(items)) == len(items),
        key,
        value,
        f"different whole numbers of {least} or more",
    )
    return items


def _shares(key: str, value: Any) -> list[float]:
    items = _listed(key, value)
    good = all(isinstance(item, int | float) and 0 <= item <= 1 for item in items) and len(
        set(items)
    ) == len(items)
    require(good, key, value, "different numbers from 0 to 1")
    return [float(item) for item in items]


def _cases(value: Any) -> list[list[int]]:
    def good(case: Any) -> bool:
        return (
            isinstance(case, list | tuple)
            and len(case) == 2
            and all(isinstance(n, int) for n in case)
            and 1 <= case[1] <= case[0] <= 64
        )

    if not isinstance(value, list | tuple) or not value or not all(map(good, value)):
        raise UserError(
            f"suite.cases={value} cannot be used: it must be pairs [N, R], 1 <= R <= N <= 64, such as [[1,1],[4,2]]"
        )
    return [list(case) for case in value]


def _template(template: str) -> None:
    good = (
        "{text}" in template
        and template.count("{label}") == 1
        and template.index("{text}") < template.index("{label}")
    )
    require(
        good and not template.rpartition("{label}")[2].strip(),
        "suite.template",
        template,
        "a text with {text}, then {label} at its end",
    )


SUITE_CONFIGS: dict[str, type[SuiteConfig]] = {
    "harness": HarnessSuite,
    "retrieval": RetrievalSuite,
    "attention_allocation": AllocationSuite,
    "icl": IclSuite,
    "icl_order": IclOrderSuite,
    "long_context": LongContextSuite,
    "outliers": OutliersSuite,
    "hallucination": HallucinationSuite,
    "speed": SpeedSuite,
}
