"""The training recipe, the tracker, the run folder, and the jobs of the commands."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import (
    POSITIVE,
    check_fields,
    check_seed,
    count_fields,
    new_path,
    path_name,
    refuse,
    require,
)
from diffx.config.data import DataConfig, TokenizerConfig
from diffx.config.model import ModelConfig
from diffx.errors import UserError

DEFAULT_STEPS = 3500  # of 1,024 tokens: four minutes at 14,500 tokens a second


class Schedule(str, Enum):
    """The learning rate's course after warmup."""

    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"
    constant = "constant"


class Precision(str, Enum):
    """The type of matrix products; ``auto`` is bf16 on a GPU that has it, else fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Device(str, Enum):
    """Where to compute. ``auto`` takes CUDA, then MPS, then the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class WandbMode(str, Enum):
    """W&B modes; ``offline`` writes beside the run."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class TrainConfig:
    """One recipe for every architecture.

    Attributes:
        steps: optimizer steps; without ``steps`` and ``tokens`` those of the default run.
        tokens: training tokens (100M, 1.5B …) in place of ``steps``, rounded up to whole steps.
        batch_tokens: tokens of a step on all devices; a multiple of ``seq_len``.
        seq_len: context length T in tokens.
        micro_batch_size: sequences a device takes at once, accumulating gradients; ``null`` is the
            whole batch.
        lr: peak learning rate of AdamW.
        min_lr_ratio: final learning rate as a share of ``lr``.
        warmup: linear, in steps if 1 or more, else a share of the run.
        schedule: ``linear``, ``cosine``, ``wsd`` (constant, then linear over ``decay_ratio`` of the
            run) or ``constant``.
        decay_ratio: share of the run that ``wsd`` decays.
        beta1: AdamW's decay of the first moment.
        beta2: AdamW's decay of the second moment.
        eps: AdamW's epsilon.
        weight_decay: of matrices; not of norms, biases and lambda vectors.
        grad_clip: bound on the global gradient norm; 0 turns clipping off.
        precision: of autocast; weights and optimizer state stay fp32.
        compile: ``torch.compile`` each block.
        fused_attention: differential attention of diff_v1 and diff_gda by Triton kernels, on a GPU
            (that of diff_v2 stays one ordinary call); tested by Triton's interpreter and compiled,
            but not timed yet: ``diffx bench attention`` does.
        activation_checkpointing: recompute the activations of each block, but for the outputs of
            attention kernels, in the backward pass.
        mask_documents: attention stays within a document.
        log_every: steps between lines of ``metrics.jsonl``.
        eval_every: steps between validations, from step 0 to the end; ``null`` is a twelfth of the
            run, 500 at most.
        save_every: steps between checkpoints; the last step always has one.
        keep_last: newest checkpoints kept, besides the best.
        resume: ``auto`` (the newest checkpoint in ``run.dir``, or a fresh start), a run folder, or
            ``null``.
        init_from: a run whose weights start this one (``runs/x``, ``runs/x@best``).
        sample_prompt: text that the samples at the end continue; empty is the end-of-text token.
        sample_tokens: tokens of a sample; 0 draws none.
    """

    steps: int | str | None = None
    tokens: int | str | None = None
    batch_tokens: int | str = 1024
    seq_len: int = 256
    micro_batch_size: int | None = None
    lr: float = 5e-3
    min_lr_ratio: float = 0.0
    warmup: float = 0.03
    schedule: Schedule = Schedule.linear
    decay_ratio: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    precision: Precision = Precision.auto
    compile: bool = False
    fused_attention: bool = False
    activation_checkpointing: bool = False
    mask_documents: bool = False
    log_every: int = 20
    eval_every: int | None = None
    save_every: int = 500
    keep_last: int = 2
    resume: str | None = None
    init_from: str | None = None
    sample_prompt: str = ""
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        both = self.steps is not None and self.tokens is not None
        refuse(both, f"train.steps={self.steps} with train.tokens={self.tokens}", "give one")
        refuse(
            self.compile and self.mask_documents,
            "train.mask_documents=true",
            "every batch cuts other documents and would compile anew",
            "train.compile=true",
        )
        count_fields(self, "train", "batch_tokens steps tokens")
        names = "seq_len micro_batch_size log_every eval_every save_every keep_last"
        check_fields(self, "train", names, POSITIVE)
        tokens, multiple = int(self.batch_tokens), f"a multiple of train.seq_len={self.seq_len}"
        require(tokens % self.seq_len == 0, "train.batch_tokens", tokens, multiple)
        check_fields(self, "train", "lr eps", "positive")
        names = "weight_decay grad_clip warmup sample_tokens"
        check_fields(self, "train", names, "zero or more")
        check_fields(self, "train", "beta1 beta2", "in [0, 1)")
        check_fields(self, "train", "min_lr_ratio", "in [0, 1]")
        check_fields(self, "train", "decay_ratio", "in (0, 1]")
        most = f"at most the run's {self.num_steps} steps"
        require(self.warmup <= self.num_steps, "train.warmup", self.warmup, most)

    @property
    def eval_steps(self) -> int:
        """Steps between validations."""
        return self.eval_every or min(max(self.num_steps // 12, 1), 500)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.tokens is not None:
            return -(-int(self.tokens) // int(self.batch_tokens))
        return int(self.steps or DEFAULT_STEPS)

    @property
    def warmup_steps(self) -> int:
        """Warmup in optimizer steps."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * self.num_steps)


@dataclass
class WandbConfig:
    """Weights & Biases.

    Attributes:
        mode: ``offline`` needs no account and no network.
        project: its name.
        entity: user or team; ``null`` is the account's default.
        group: of runs in the interface; in a multirun the sweep's name.
    """

    mode: WandbMode = WandbMode.offline
    project: str = "diffx"
    entity: str | None = None
    group: str | None = None


@dataclass
class RunConfig:
    """The run folder.

    Attributes:
        dir: its path; ``null`` is ``runs/<date-time>-<name>``, in a multirun
            ``<hydra.sweep.dir>/<job number>``.
        name: ``null`` is made of the architecture, the data and the seed.
    """

    dir: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.dir is not None:
            good = self.dir and not {*"=,"} & {*self.dir}
            require(bool(good), "run.dir", self.dir, "a path without '=' and ','")
            new_path("run.dir", self.dir)
        if self.name is not None:
            path_name("run.name", self.name)


@dataclass
class TrainJob:
    """``diffx train``.

    Attributes:
        device: where to compute.
        seed: of the initial weights, the data order and the samples.
    """

    kind: str = "train"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    run: RunConfig = field(default_factory=RunConfig)
    device: Device = Device.auto
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)


@dataclass
class PrepareJob:
    """``diffx data prepare``.

    Attributes:
        out: the folder to write; an unfinished one is continued.
        workers: processes that tokenize; 0 is one a core.
        shard_tokens: tokens of a shard file.
    """

    kind: str = "prepare"
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    out: str = MISSING
    workers: int = 0
    shard_tokens: int | str = "100M"

    def __post_init__(self) -> None:
        check_fields(self, "", "workers", "zero or more")
        count_fields(self, "", "shard_tokens")
        new_path("out", self.out)
        reasons = {
            "shards": "`diffx data prepare` writes it",
            **dict.fromkeys(("retrieval", "recall"), "its samples are made as they are needed"),
        }
        kind = self.data.kind
        if kind in reasons:
            accepted = "choose data=text, hub or stdlib"
            raise UserError(f"data={kind} cannot be prepared: {reasons[kind]}; {accepted}")


@dataclass
class GenerateJob:
    """``diffx generate``.

    Attributes:
        checkpoint: a run folder, with ``@best`` or ``@STEP``.
        prompt: text to continue; ``-`` is standard input.
        prompt_file: a UTF-8 file to continue.
        max_tokens: tokens to draw.
        temperature: 0 is greedy.
        top_k: draw among the k likeliest; 0 is all.
        top_p: draw among the likeliest whose probabilities reach p; 1 is all.
        device: where to compute.
        seed: of the draws.
        trust_remote_code: run Python code of a model of the hub or the base of an adapted run.
    """

    kind: str = "generate"
    checkpoint: str = MISSING
    prompt: str = ""
    prompt_file: str | None = None
    max_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    device: Device = Device.auto
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        check_fields(self, "", "max_tokens", POSITIVE)
        check_fields(self, "", "temperature top_k", "zero or more")
        check_fields(self, "", "top_p", "in (0, 1]")
        setting = f"prompt={self.prompt!r} with prompt_file={self.prompt_file}"
        refuse(bool(self.prompt and self.prompt_file), setting, "give one")
