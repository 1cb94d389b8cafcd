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


@dataclass(kw_only=True, slots=True)
class DexConfig:
    """The differential step (arXiv 2505.16333).

    Attributes:
        variant: ``dex``, or a control: ``dex_plus`` (adds), ``attn_only``, ``adapter_only``,
            ``fixed_lambda``, ``lora``, ``full``; or ``dex_mirror``, which is ``dex_plus`` from the
            negated W_D and must train to the same model as ``dex``.
        heads: how heads are chosen: ``entropy_high``, ``entropy_low``, ``importance_low``,
            ``random``, ``all``; or a path of a heads.json.
        k: heads chosen in each layer; ``null`` is half of them, rounded down. It cannot be given
            with ``heads=all`` or a heads.json.
        share: one W_D a ``layer``, or one a ``head``.
        init: W_D at the start. ``zeros`` leaves the pretrained model as it is until the branch has
            learnt something; ``linear`` is random, and changes the model as soon as lambda is not
            0. ``fixed_lambda``, whose lambda is never 0, always starts with zeros.
        anneal_steps: steps T until lambda is the learned one (equation 4); ``null`` is half of the
            run.
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
        count_fields(self, "dex", "calibration_tokens")
        check_fields(self, "dex", "k lora_rank", POSITIVE)
        check_fields(self, "dex", "anneal_steps", "zero or more")
        criterion = self.heads in CRITERIA
        accepted = f"one of {', '.join(CRITERIA)}, or a heads.json of another run"
        require(criterion or self.heads.endswith(".json"), "dex.heads", self.heads, accepted)
        refuse(
            self.k is not None and (self.heads == "all" or not criterion),
            f"dex.k={self.k}",
            "dex.heads gives the number of heads; leave dex.k out",
            f"dex.heads={self.heads}",
        )
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


@dataclass(kw_only=True, slots=True)
class AdaptJob:
    """``diffx adapt-dex``.

    Attributes:
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
