"""DEX: what is adapted, how, and the job of ``diffx adapt-dex``."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from diffx.config.checks import check_seed, count, require
from diffx.config.data import DataConfig
from diffx.config.train import Device, RunConfig, Schedule, TrainConfig, WandbConfig
from diffx.errors import UserError

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
        return self in (
            Variant.dex,
            Variant.dex_plus,
            Variant.adapter_only,
            Variant.fixed_lambda,
            Variant.dex_mirror,
        )

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


@dataclass(kw_only=True, slots=True)
class DexConfig:
    """The differential step (arXiv 2505.16333).

    Attributes:
        variant: ``dex``, or a control: ``dex_plus`` (adds), ``attn_only``, ``adapter_only``, ``fixed_lambda``, ``lora``, ``full``;
            or ``dex_mirror``, which is ``dex_plus`` from the negated W_D: it must train to what ``dex`` does, which checks the machinery.
        heads: how heads are chosen: ``entropy_high``, ``entropy_low``, ``importance_low``, ``random``, ``all``; or a path of a heads.json.
        k: heads chosen in each layer; ``null`` is half of them, rounded down. ``heads=all`` and a heads.json know it themselves.
        share: one W_D a ``layer``, or one a ``head``.
        init: W_D at the start. ``zeros`` leaves the pretrained model undisturbed until the branch has learnt something; ``linear`` is
            random, and disturbs it as soon as lambda is not 0. ``fixed_lambda``, whose lambda never is 0, always starts with zeros.
        anneal_steps: steps T until lambda is the learned one (equation 4); ``null`` is half of the run.
        calibration_tokens: tokens of training text by which heads are chosen.
        lora_rank: rank of the ``lora`` variant's adapters, on all four attention projections.
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
        self.calibration_tokens = count("dex.calibration_tokens", self.calibration_tokens)
        for key in ("k", "lora_rank"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"dex.{key}", value, "a positive whole number")
        require(
            self.anneal_steps is None or self.anneal_steps >= 0,
            "dex.anneal_steps",
            self.anneal_steps,
            "zero or more",
        )
        if self.heads not in CRITERIA and not self.heads.endswith(".json"):
            raise UserError(
                f"dex.heads={self.heads} cannot be used: it must be one of {', '.join(CRITERIA)}, or a heads.json of another run"
            )
        if self.k is not None and (self.heads == "all" or self.heads not in CRITERIA):
            raise UserError(
                f"dex.k={self.k} cannot be used with dex.heads={self.heads}, which says itself which heads; leave it out"
            )
        if self.variant is Variant.fixed_lambda:
            self.init = Init.zeros
        if self.anneal_steps == 0 and self.variant.anneals and self.init is Init.zeros:
            raise UserError(
                "dex.anneal_steps=0 cannot be used with dex.init=zeros: W_D = 0 and lambda = 0 have no gradient, so nothing would ever "
                "move; give more steps, or dex.init=linear"
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


@dataclass(kw_only=True, slots=True)
class AdaptJob:
    """``diffx adapt-dex``.

    Attributes:
        kind: tells a saved config's schema.
        base: the pretrained model: a name or folder of the Hugging Face hub.
        revision: the hub's revision.
        trust_remote_code: run Python code that comes with the model; a resumed run needs it again.
        dex: the step.
        data: the text; it is read with the model's own tokenizer.
        train: the recipe; without ``steps`` and ``tokens`` it is 1M tokens (the paper: 887M).
        wandb: the tracker.
        run: the run folder.
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
        if self.train.init_from is not None:
            raise UserError(
                f"train.init_from={self.train.init_from} cannot be used: an adaptation starts from base="
            )
        if self.train.mask_documents:
            raise UserError(
                "train.mask_documents=true cannot be used: a pretrained model reads its text without document masks"
            )
        if self.train.fused_attention:
            raise UserError(
                "train.fused_attention=true cannot be used: a pretrained model has an attention of its own"
            )
        if self.train.sample_tokens:
            raise UserError(
                f"train.sample_tokens={self.train.sample_tokens} cannot be used: `diffx generate` draws samples afterwards"
            )
        if self.train.steps is None and self.train.tokens is None:
            self.train.tokens = _TOKENS
        if self.dex.anneal_steps is None:
            self.dex.anneal_steps = max(self.train.num_steps // 2, 1)
