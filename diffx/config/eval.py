"""The job of ``diffx eval``, and the judge of its generations."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import (
    POSITIVE,
    check_fields,
    check_seed,
    count,
    new_path,
    path_name,
    refuse,
    require,
)
from diffx.config.suite import SuiteConfig
from diffx.config.train import Device, WandbConfig

_ADDRESS = r"https?://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-6]?[0-9]{1,4})?(/[!-~]*)?"


class Dtype(str, Enum):
    """The type of weights and activations; ``auto`` is the checkpoint's on a GPU, fp32 on a CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class JudgeConfig:
    """Who judges whether an answer is faithful to its text."""

    kind: str = "none"


@dataclass
class EndpointJudge(JudgeConfig):
    """A model behind an OpenAI-compatible endpoint; ``OPENAI_API_KEY`` may hold its key.

    Attributes:
        base_url: such as ``http://localhost:8000/v1``.
        model: the judge's name there.
        concurrency: requests at once.
        retries: tries after a failure that may pass.
        timeout: seconds of one try, from the connection to the last byte of the reply.
        temperature: ``null`` leaves it to the endpoint, as some models demand.
    """

    kind: str = "endpoint"
    base_url: str = MISSING
    model: str = MISSING
    concurrency: int = 8
    retries: int = 5
    timeout: float = 60.0
    temperature: float | None = 0.0

    def __post_init__(self) -> None:
        secret = "it holds a password or a query; it must be bare, the key in OPENAI_API_KEY"
        refuse(bool({*"@?"} & {*self.base_url}), "judge.base_url", secret)
        accepted = "an http or https address such as http://localhost:8000/v1"
        good = re.fullmatch(_ADDRESS, self.base_url, re.I) is not None
        require(good, "judge.base_url", self.base_url, accepted)
        check_fields(self, "judge", "concurrency", POSITIVE)
        check_fields(self, "judge", "retries temperature", "zero or more")
        check_fields(self, "judge", "timeout", "positive")


@dataclass
class ExportJob:
    """``diffx export``.

    Attributes:
        checkpoint: a run (``runs/x``, ``runs/x@best``, ``runs/x@1000``).
        out: the folder to write, which must not exist.
        format: ``hf``: a folder that ``transformers`` loads.
        fold: fold DEX's branch into the output projections, for a model of the base's architecture;
            ``false`` keeps the branch, and the model loads after ``import diffx``.
        dtype: of the weights; ``auto`` is fp32.
        trust_remote_code: run Python code that comes with the base of an adapted run.
    """

    kind: str = "export"
    checkpoint: str = MISSING
    out: str = MISSING
    format: str = "hf"
    fold: bool = True
    dtype: Dtype = Dtype.auto
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(self.format == "hf", "format", self.format, "hf")
        out = new_path("out", self.out)
        exists = out.exists() and (not out.is_dir() or any(out.iterdir()))
        refuse(exists, f"out={self.out}", "it exists; choose a new folder")


@dataclass
class EvalJob:
    """``diffx eval``.

    Attributes:
        checkpoint: a run (``runs/x``, ``runs/x@best``, ``runs/x@1000``), or a model by hub name or
            folder.
        data: the text of a suite; ``null`` is the run's held-out text, or for a model of the hub
            Python's source.
        device: where to compute.
        dtype: the model's type.
        batch: sequences at once, or ``auto``.
        limit: examples measured at most in each task or cell, or their share between 0 and 1,
            rounded up as lm-eval does; ``null`` is all.
        seed: of everything that is drawn.
        force: measure again where results with the same settings exist.
        revision: the hub's revision.
        trust_remote_code: run Python code of a model of the hub or the base of an adapted run.
    """

    kind: str = "eval"
    checkpoint: str = MISSING
    suite: SuiteConfig = field(default_factory=SuiteConfig)
    data: Any = None  # a DataConfig, whose unions OmegaConf cannot merge into an optional node
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    device: Device = Device.auto
    dtype: Dtype = Dtype.auto
    batch: int | str = "auto"
    limit: int | float | None = None
    seed: int = 0
    force: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.suite.name != MISSING:  # a suite that a benchmark makes has none
            path_name("suite.name", self.suite.name)
        if self.batch != "auto":
            self.batch = count("batch", self.batch)
        limit = self.limit
        good = limit is None or 0 < limit < 1 or (isinstance(limit, int) and limit >= 1)
        accepted = f"{POSITIVE}, a share between 0 and 1, or null for all"
        require(good, "limit", limit, accepted)
        check_seed("seed", self.seed)
        unused = self.judge.kind != "none" and self.suite.kind != "hallucination"
        reason, suite = "only suite=hallucination is judged", f"suite={self.suite.name}"
        refuse(unused, f"judge={self.judge.kind}", reason, suite)


JUDGE_CONFIGS: dict[str, type[JudgeConfig]] = {"none": JudgeConfig, "endpoint": EndpointJudge}
