"""Arbitrary values for every key, and damaged files: success, or one ``error:`` line."""

import copy
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffx.cli import main
from diffx.config.bridge import JOBS, load_config, save_config, to_typed
from diffx.config.launch import compose
from diffx.config.messages import explain, keys
from diffx.errors import UserError, one_line

# The words that each job cannot do without; several entries of a job choose other groups.
JOB_WORDS = [
    ("train", []),
    (
        "train",
        ["model=transformer", "data=text", "data.path=x", "tokenizer=hf", "tokenizer.name=x"],
    ),
    ("train", ["model=transformer_wide_head", "data=hub", "data.name=x", "tokenizer=tiktoken"]),
    ("train", ["data=retrieval", "tokenizer=bytes"]),
    ("adapt", ["base=x"]),
    ("prepare", ["out=x"]),
    ("claim", ["name=lm_loss"]),
    ("generate", ["checkpoint=x"]),
    ("export", ["checkpoint=x", "out=x"]),
    ("quantize", ["checkpoint=x", "method=weights", "bits=[8]"]),
    ("quantize", ["checkpoint=x", "method=activations"]),
    (
        "eval",
        [
            "checkpoint=x",
            "suite=hallucination",
            "judge=endpoint",
            "judge.base_url=http://x",
            "judge.model=x",
            "data=stdlib",
        ],
    ),
    *(
        ("eval", ["checkpoint=x", f"suite={suite}"])
        for suite in ("icl", "icl_order", "retrieval", "attention_allocation")
    ),
    *(
        ("eval", ["checkpoint=x", f"suite={suite}"])
        for suite in ("math", "long_context", "outliers", "speed")
    ),
]
SAVED = ("train", "adapt")  # jobs that a run folder keeps
ODD = [
    None,
    True,
    "",
    " ",
    "null",
    "???",
    "a\nb",
    "{",
    "}}",
    "{label}{",
    "{text}{label}",
    "${",
    "${seed}",
    "${nowhere}",
    "${train.lr}",
]
ODD += [
    "inf",
    "-1K",
    "1e999",
    "1e-5",
    "½",
    "٣",
    "\0",
    "\udcff",
    "x" * 5000,
    "../x",
    "/",
    "http://[",
    "=",
    "a,b",
    "@",
    "~",
    "T",
]
ODD += [
    0,
    -1,
    2**31,
    2**63 - 1,
    2**63,
    -(2**64),
    10**400,
    0.0,
    -0.0,
    1e-300,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
]
ODD += [
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [float("nan")],
    [10**30],
    [[1, 2], [3]],
    ["a", 1],
    [{}],
    {"kind": "text"},
]
SCALARS = st.one_of(
    st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=30), st.booleans(), st.none()
)
NESTED = st.recursive(
    SCALARS,
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part, max_size=2)
    ),
)
VALUES = st.one_of(SCALARS, NESTED)
QUICK = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def composed():
    """Each job's composed config with its keys, groups of keys included."""
    made = []
    for name, words in JOB_WORDS:
        cfg = OmegaConf.structured(compose(name, words))
        own = list(keys(cfg))
        made.append(
            (name, cfg, sorted({*own, *(key.rpartition(".")[0] for key in own if "." in key)}))
        )
    return made


def check_value(composed, place, picked, value, path):
    """Set a key to a value: the job is refused in one line, or is saved and read back."""
    name, cfg, names = composed[place % len(composed)]
    key = picked if isinstance(picked, str) else names[picked % len(names)]
    cfg = copy.deepcopy(cfg)
    try:
        try:
            OmegaConf.update(cfg, key, value, merge=True)
        except OmegaConfBaseException as error:
            raise UserError(explain(error)) from error
        job = to_typed(cfg, JOBS[name])
    except UserError as error:
        assert len(one_line(str(error)).splitlines()) == 1
        return
    if name in SAVED:
        save_config(job, path)
        assert load_config(path) == job, f"{key}={value!r}"


@settings(QUICK, max_examples=100)
@given(place=st.integers(0, 1000), picked=st.integers(0, 1000), value=VALUES)
@example(0, "train.lr", float("inf"))
@example(0, "seed", 10**20)
@example(0, "train.tokens", "inf")
@example(0, "data.kind", "text")
@example(0, "model", [1])
def test_a_value_is_refused_or_can_be_read_again(composed, tmp_path_factory, place, picked, value):
    check_value(composed, place, picked, value, tmp_path_factory.getbasetemp() / "config.yaml")


@pytest.mark.slow
@settings(QUICK, max_examples=1000)
@given(place=st.integers(0, 1000), picked=st.integers(0, 1000), value=VALUES)
def test_many_values(composed, tmp_path_factory, place, picked, value):
    check_value(composed, place, picked, value, tmp_path_factory.getbasetemp() / "config.yaml")


SIGNS = st.sampled_from(["", "", "", "+", "++", "~"])
NAMES = st.sampled_from(
    [
        "model",
        "size",
        "data",
        "experiment",
        "hydra/launcher",
        "hydra.sweep.dir",
        "train",
        "train.lr",
        "seed",
        "",
        "x",
    ]
)
WORDS = st.tuples(SIGNS, NAMES, st.just("="), VALUES.map(str) | st.text(max_size=20)).map(
    "".join
) | st.text(max_size=20)


def check_word(word):
    try:
        compose("train", [word])
    except UserError as error:
        assert len(one_line(str(error)).splitlines()) == 1


@settings(QUICK, max_examples=12)
@given(word=WORDS)
@example("experiment=[1]")
@example("model=[[1]]")
@example("train.lr=" + "[" * 2000)
def test_a_word_is_refused_in_one_line(word):
    check_word(word)


@pytest.mark.slow
@settings(QUICK, max_examples=60)
@given(word=WORDS)
def test_many_words(word):
    check_word(word)


TINY = (
    "data=text data.path=text.jsonl tokenizer=bytes model.hidden_size=16 model.num_layers=1 "
    "model.num_heads=2 model.num_kv_heads=2 train.steps=2 train.seq_len=128 "
    "train.batch_tokens=128 train.sample_tokens=0 wandb.mode=disabled device=cpu "
    "data.val_tokens=300"
)
EVAL = (
    "eval checkpoint=run suite=icl suite.shots=[1] suite.queries=2 wandb.mode=disabled device=cpu"
)
COMMANDS = {
    "compare run": ("config.yaml", "metrics.jsonl", "summary.json", "data.json"),
    "compare run copy suite=icl": ("results.json", "rows.parquet", "settings.json"),
    "generate checkpoint=run max_tokens=2": (
        "config.yaml",
        "state.json",
        "model.safetensors",
        "tokenizer.json",
        "diffx_tokenizer.json",
    ),
    EVAL: ("results.json", "settings.json", "config.yaml", "state.json", "tokenizer_config.json"),
    f"train {TINY} train.resume=run": (
        *(
            "config.yaml",
            "environment.json",
            "metrics.jsonl",
            "state.json",
            "optimizer.safetensors",
            "diffx_tokenizer.json",
        ),
    ),
    "export checkpoint=run out=exported": (
        "config.yaml",
        "state.json",
        "model.safetensors",
        "tokenizer.json",
    ),
}
SHORT = (
    "data=text data.path=text.jsonl train.steps=2 train.seq_len=32 train.batch_tokens=64 "
    "data.val_tokens=100 wandb.mode=disabled device=cpu"
)
OTHERS = {  # of an export, and of a run that was adapted from it
    EVAL.replace("=run", "=hub"): (
        "config.json",
        "diffx.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ),
    EVAL.replace("=run", "=hub") + " force=true": ("model.safetensors",),
    "generate checkpoint=adapted max_tokens=2": (
        "config.yaml",
        "base.json",
        "heads.json",
        "state.json",
        "model.safetensors",
    ),
    f"adapt-dex base=hub {SHORT} train.resume=adapted": (
        "heads.json",
        "base.json",
        "metrics.jsonl",
        "state.json",
    ),
    "export checkpoint=adapted out=exported": ("heads.json",),
    "compare adapted copied": ("summary.json", "heads.json"),
}
PAIRS = [(command, "run", name) for command, names in COMMANDS.items() for name in names]
MORE = [
    (command, "hub" if "checkpoint=hub" in command else "adapted", name)
    for command, names in OTHERS.items()
    for name in names
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, its evaluation and a copy of both; the tests run in this folder."""
    folder = tmp_path_factory.mktemp("trained") / "place"
    folder.mkdir()
    rows = [{"text": f"Document {n} says that {n} times {n} is {n * n}. " * 3} for n in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("DIFFX_CACHE", str(folder.parent / "cache"))
    try:
        assert main(["train", "run.dir=run", *TINY.split()]) == 0
        assert main(EVAL.split()) == 0
        shutil.copytree("run", "copy")
        yield folder
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def adapted(trained, tmp_path_factory):
    """A folder with an export, and twice a run that was adapted from it."""
    folder = tmp_path_factory.mktemp("adapted") / "place"
    shutil.copytree(trained, folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["train", "run.dir=plain", "model=transformer", *TINY.split()]) == 0
        assert main(["export", "checkpoint=plain", "out=hub"]) == 0
        assert main(["adapt-dex", "base=hub", "run.dir=adapted", *SHORT.split()]) == 0
        shutil.copytree("adapted", "copied")
    finally:
        os.chdir(before)
    return folder


def state_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(content, how, where, text):
    """Change a file's content; ``None`` deletes it."""
    at = where % max(len(content), 1)
    if how == "value" and (
        found := _a_value(content, where)
    ):  # JSON that holds something else at one place
        return found[0] + text.encode() + found[1]
    return {
        "delete": None,
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ (1 << where % 8)]) + content[at + 1 :]
        if content
        else b"",
        "nested": b"[" * 100_000 if where % 2 else b'{"a":' * 100_000,
    }.get(how, text.encode())


def _a_value(content, where):
    try:
        line = json.loads(content.split(b"\n")[0] if content.count(b"\n{") else content)
    except (ValueError, RecursionError):
        return None
    places = []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(line)
    if not places:
        return None
    part, key = places[where % len(places)]
    part[key] = "@@"
    before, _, after = json.dumps(line).encode().partition(b'"@@"')
    return before, after + b"\n"


HOW = st.sampled_from(["delete", "cut", "flip", "nested", "value", "value", "value", "replace"])
TEXTS = [
    "null",
    "1",
    "-1",
    "1.5",
    "NaN",
    "1e400",
    "9" * 400,
    '"x"',
    "[]",
    "{}",
    "[1]",
    '{"a": 1}',
    "true",
    "",
    "\0",
    "a: [b",
    "- 1",
]
JSON_TEXTS = st.sampled_from(TEXTS)


def check_damage(whole, pair, how, where, text):
    command, folder, name = pair
    place = whole.parent / "damaged"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    os.chdir(place)
    (path,) = [path for path in sorted((place / folder).rglob(name)) if path.is_file()][:1]
    content = damage(path.read_bytes(), how, where, text)
    path.unlink() if content is None else path.write_bytes(content)
    before, err = state_of(place), StringIO()
    with redirect_stderr(err), redirect_stdout(StringIO()):
        code = main(command.split())
    told = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2) and len(told) == (code != 0), (command, name, code, err.getvalue())
    if code == 2:
        assert state_of(place) == before, (command, name, told)


@settings(QUICK, max_examples=20)
@given(pair=st.sampled_from(PAIRS), how=HOW, where=st.integers(0, 10**6), text=JSON_TEXTS)
def test_a_damaged_file_is_one_line(trained, pair, how, where, text):
    check_damage(trained, pair, how, where, text)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(
            pair, marks=() if pair[0].startswith(("generate", "eval")) else pytest.mark.slow
        )
        for pair in PAIRS
    ],
    ids=lambda pair: f"{pair[2]}-{pair[0].split()[0]}",
)
def test_deep_nesting_is_one_line(trained, pair):
    check_damage(trained, pair, "nested", 1, "")


@pytest.mark.slow
@settings(QUICK, max_examples=40)
@given(pair=st.sampled_from(PAIRS), how=HOW, where=st.integers(0, 10**6), text=JSON_TEXTS)
def test_much_damage(trained, pair, how, where, text):
    check_damage(trained, pair, how, where, text)


@pytest.mark.slow
@settings(QUICK, max_examples=20)
@given(pair=st.sampled_from(MORE), how=HOW, where=st.integers(0, 10**6), text=JSON_TEXTS)
def test_much_damage_to_exports_and_adapted_runs(adapted, pair, how, where, text):
    check_damage(adapted, pair, how, where, text)


def test_every_job_is_tried():
    assert {name for name, _ in JOB_WORDS} == JOBS.keys()
