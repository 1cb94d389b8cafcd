"""A variant of attention and a suite, added as ``CONTRIBUTING.md`` says, work everywhere."""

import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MODULE = '''
import torch

from diffx.models.attention import Attention
from diffx.ops import attention


class ToyAttention(Attention):
    """Subtract the second map of each head, times 1/2 and 1/4 for alternating heads."""

    def __init__(self, config, layer):
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        sizes = {"queries": (2 * heads, d), "keys": (kv_heads, d), "values": (kv_heads, d)}
        super().__init__(config, layer, **sizes, features=heads * d)

    def lambda_value(self, x):
        return torch.tensor([0.5, 0.25], device=x.device).repeat(self.queries[0] // 4)

    def context(self, x, attend):
        first, second = attend(attention).unflatten(2, (-1, 2)).unbind(3)
        return first - self.lambda_value(x)[:, None] * second
'''
CONFIG = '''
@dataclass(kw_only=True, slots=True)
class ToyConfig(ModelConfig):
    """A toy."""

    kind: str = "diff_toy"


MODEL_CONFIGS: dict'''
SUITE_CONFIG = '''
@dataclass(kw_only=True, slots=True)
class SurpriseSuite(SuiteConfig):
    """How surprising given texts are."""

    kind: str = "surprise"
    texts: Any = ("one", "two words")


SUITE_CONFIGS: dict'''
SUITE = """
import torch

from diffx.evaluation.suite import Example
from diffx.results.declare import Declaration, Metric, Picture, Table


def plan(context):
    texts = enumerate(context.suite.texts)
    return context.limited([Example(str(n), {"text": text}) for n, text in texts])


def answer(context, examples):
    for example in examples:
        ids = torch.tensor([context.lm.encode(example.data["text"])])
        score = float(context.lm.logits(ids).logsumexp(-1).mean())
        yield {"id": example.id, "by": {}, "scores": {"surprise": score}}


def declare(context):
    return Declaration(
        metrics=[Metric(name="surprise", unit="nats", better="lower")],
        tables=[Table(by=[], label="all")],
        pictures=[Picture(kind="bars", title="Surprise")],
    )
"""
VARIANT = {
    "diffx/config/model.py": [
        ("MODEL_CONFIGS: dict", CONFIG),
        (
            '    "diff_v2": DiffV2Config,',
            '    "diff_v2": DiffV2Config,\n    "diff_toy": ToyConfig,',
        ),
    ],
    "diffx/models/diff_toy.py": MODULE,
    "diffx/models/decoder.py": [
        (
            "from diffx.models.diff_v2",
            "from diffx.models.diff_toy import ToyAttention\nfrom diffx.models.diff_v2",
        ),
        (
            '    "diff_v2": DiffV2Attention,',
            '    "diff_v2": DiffV2Attention,\n    "diff_toy": ToyAttention,',
        ),
    ],
}
NEW_SUITE = {
    "diffx/config/suite.py": [
        ("SUITE_CONFIGS: dict", SUITE_CONFIG),
        ('    "speed": SpeedSuite,', '    "speed": SpeedSuite,\n    "surprise": SurpriseSuite,'),
    ],
    "diffx/evaluation/surprise.py": SUITE,
}
TRAIN = (
    "train model=diff_toy model.hidden_size=32 model.num_layers=2 model.num_heads=4 "
    "model.num_kv_heads=2 tokenizer=bytes data=text data.path=text.jsonl data.val_tokens=500 "
    "train.steps=4 train.seq_len=256 train.batch_tokens=256 train.log_every=1 "
    "train.sample_tokens=4 run.dir=run"
)
SUITES = [
    "surprise",
    "retrieval suite.cases=[[1,1]] suite.lengths=[512] suite.samples=1",
    "attention_allocation suite.length=512 suite.samples=1",
    "icl suite.shots=[1] suite.queries=2 suite.labels=2",
    "icl_order suite.shots=2 suite.orders=2 suite.queries=2",
    "long_context suite.texts=2",
    "outliers suite.tokens=256",
    "harness suite.tasks=[squares] suite.include_path=.",
    "hallucination suite.tasks=[boxes.jsonl]",
    "speed suite.lengths=[8] suite.batches=[1] suite.decode_tokens=2 suite.rounds=2",
]
TASK = """
task: squares
dataset_path: json
dataset_kwargs: {data_files: {test: text.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_choice: [" yes", " no"]
doc_to_target: 0
"""


def change(root, files):
    for name, edits in files.items():
        path = root / name
        if isinstance(edits, str):
            assert not path.exists()
            path.write_text(edits)
            continue
        text = path.read_text()
        for before, after in edits:
            assert text.count(before) == 1
            text = text.replace(before, after)
        path.write_text(text)


def touched(one, other):
    compared = filecmp.dircmp(one, other, ignore=["__pycache__"])
    inner = [touched(one / name, other / name) for name in compared.common_dirs]
    return len(compared.left_only + compared.right_only + compared.diff_files) + sum(inner)


@pytest.mark.slow
def test_a_variant_and_a_suite_by_the_words_of_the_guide(tmp_path):
    for name in ("diffx", "conf", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    change(tmp_path, VARIANT)
    assert sum(touched(ROOT / name, tmp_path / name) for name in ("diffx", "conf")) == 3
    change(tmp_path, NEW_SUITE)
    assert sum(touched(ROOT / name, tmp_path / name) for name in ("diffx", "conf")) == 3 + 2

    rows = (
        {"text": f"Note {n}. The square of {n} is {n * n}. Nothing else is known of it. " * 3}
        for n in range(200)
    )
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxes = (
        {"context": f"Box {n} is red.", "question": f"Which colour is box {n}?", "answers": ["red"]}
        for n in range(3)
    )
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in boxes))
    (tmp_path / "squares.yaml").write_text(TASK)
    evals = [f"eval checkpoint=run suite={suite} limit=2" for suite in SUITES]
    commands = [
        TRAIN,
        "generate checkpoint=run max_tokens=4",
        *evals,
        "quantize checkpoint=run bits=[8] suite.texts=2",
        "export checkpoint=run out=out",
    ]
    script = (
        "import sys; from diffx.cli import main\nfor line in sys.argv[1:]:\n"
        "    assert main(line.split()) == 0, line"
    )
    words = [
        f"{command} wandb.mode=disabled"
        if command.split()[0] in ("train", "eval", "quantize")
        else command
        for command in commands
    ]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]

    logged = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert [logged[f"diff/lambda/{layer}"] for layer in ("00", "01")] == [0.375, 0.375]
    measured = {path.parts[-3] for path in tmp_path.glob("run/evals/4/*/*/results.json")}
    assert measured >= {suite.split()[0] for suite in SUITES}
