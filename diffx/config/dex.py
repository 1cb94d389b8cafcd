"""DEX: what is adapted, how, and the job of ``diffx adapt-dex``."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import POSITIVE, check_fields, check_seed, count_fields, refuse, require
from diffx.config.data import DataConfig
from diffx.config.train import Device, RunConfig, Schedule, TrainConfig, WandbConfig

_TOKENS = 10**6  # a short adaptation; the paper: 887M
CRITERIA = ("entropy_high", "entropy_low", "importance_low", "random", "all")


class Variant(str, Enum):
    """What the adaptation changes and trains; all but ``dex`` are controls."""

    dex = "dex"
    dex_plus = "dex_plus"
    attn_only = "attn_only"
    adapter_only = "adapter_only"
    fixed_lambda = "fixed_lambda"
    lora = "lora"
    full = "full"
    dex_mirror = "dex_mirror"

    @property
    def branches(self) -> bool:
        """Whether the model gets W_D."""
        return self not in (Variant.attn_only, Variant.lora, Variant.full)

    @property
    def anneals(self) -> bool:
        """Whether lambda follows equation 4."""
        return self.branches and self is not Variant.fixed_lambda


class Init(str, Enum):
    """W_D at the start: ``zeros``, or what ``nn.Linear`` starts with."""

    zeros = "zeros"
    linear = "linear"


class Share(str, Enum):
    """One W_D for a layer's heads, or one for each head."""

    layer = "layer"
    head = "head"


@dataclass
class DexConfig:
    """The differential step (arXiv 2505.16333).

    Attributes:
        variant: ``dex``, or a control; ``dex_plus`` adds, ``dex_mirror`` is ``dex_plus`` from the
            negated W_D, which must train to the model of ``dex``.
        heads: ``entropy_high``, ``entropy_low``, ``importance_low``, ``random``, ``all``, or a path
            of a heads.json.
        k: heads chosen in each layer; ``null`` is half of them, rounded down. ``heads=all`` and a
            heads.json do not take it.
        share: one W_D a ``layer``, or one a ``head``.
        init: W_D at the start: ``zeros`` leaves the model as it is until the branch has learnt
            something; ``linear`` is random. ``fixed_lambda``, whose lambda is never 0, always
            starts with zeros.
        anneal_steps: steps T until lambda is the learned one (equation 4); ``null`` is half of the
            run.
        calibration_tokens: tokens of training text by which heads are chosen.
        lora_rank: of the adapters of ``lora``, on all four attention projections.
    """

    variant: Variant = Variant.dex
    heads: str = "entropy_high"
    k: int | None = None
    share: Share = Share.layer
    init: Init = Init.zeros
    anneal_steps: int | None = None
    calibration_tokens: int | str = 8192
    lora_rank: int = 16

    def __post_init__(self) -> None:
        count_fields(self, "dex", "calibration_tokens")
        check_fields(self, "dex", "k lora_rank", POSITIVE)
        check_fields(self, "dex", "anneal_steps", "zero or more")
        file = self.heads.endswith(".json")
        accepted = f"one of {', '.join(CRITERIA)}, or a heads.json of another run"
        require(file or self.heads in CRITERIA, "dex.heads", self.heads, accepted)
        if file or self.heads == "all":
            reason = "dex.heads gives the number of heads; leave dex.k out"
            refuse(self.k is not None, f"dex.k={self.k}", reason, f"dex.heads={self.heads}")
        if self.variant is Variant.fixed_lambda:
            self.init = Init.zeros
        refuse(
            self.anneal_steps == 0 and self.variant.anneals and self.init is Init.zeros,
            "dex.anneal_steps=0",
            "W_D = 0 and lambda = 0 have no gradient; give more steps, or dex.init=linear",
            "dex.init=zeros",
        )


def _recipe() -> TrainConfig:
    return TrainConfig(
        lr=1e-4,
        schedule=Schedule.cosine,
        seq_len=512,
        batch_tokens=4096,
        log_every=5,
        save_every=50,
        sample_tokens=0,
    )


@dataclass
class AdaptJob:
    """``diffx adapt-dex``, by default for 1M tokens; the text is read with the model's tokenizer.

    Attributes:
        base: the pretrained model, by hub name or folder.
        revision: the hub's revision.
        trust_remote_code: run Python code that comes with the model; a resumed run needs it again.
        device: where to compute.
        seed: of the data order, W_D, random heads and the samples.
    """

    kind: str = "adapt"
    base: str = MISSING
    revision: str | None = None
    trust_remote_code: bool = False
    dex: DexConfig = field(default_factory=DexConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_recipe)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    run: RunConfig = field(default_factory=RunConfig)
    device: Device = Device.auto
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        for name, reason in {
            "init_from": "an adaptation starts from base=",
            "mask_documents": "a pretrained model reads its text without document masks",
            "fused_attention": "a pretrained model has an attention of its own",
            "sample_tokens": "`diffx generate` draws samples afterwards",
        }.items():
            value = getattr(self.train, name)
            shown = "true" if value is True else value
            refuse(value not in (None, 0), f"train.{name}={shown}", reason)
        if self.train.steps is None and self.train.tokens is None:
            self.train.tokens = _TOKENS
        if self.dex.anneal_steps is None:
            self.dex.anneal_steps = max(self.train.num_steps // 2, 1)
