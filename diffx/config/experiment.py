"""An experiment: a claim, the runs that test it, and the rule that judges them.

Each is a file ``experiments/claims/NAME.yaml``, which holds nothing but the fields of
``Experiment``; the job of ``diffx experiment run`` is ``ExperimentJob``.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from diffx.config.checks import check_seed, new_path, require
from diffx.config.train import Device, WandbConfig

SCALES = ("laptop", "gpu", "paper")
MEASURES = ("difference", "ratio", "tokens", "parameters", "onset")


@dataclass(kw_only=True, slots=True)
class Effect:
    """A difference of two cells of the table of results, and what is claimed of it.

    Attributes:
        candidate: an arm; with ``measure: parameters`` the arms of rising size.
        baseline: the arm, or arms, that it is held against.
        select: the columns of the cell, such as ``source: train`` and ``metric: val/loss``; of
            several steps the last counts.
        less: columns that replace some of ``select`` in a second cell of the same arm, which is
            subtracted first, such as ``bits: 16``.
        measure: ``difference`` of the two cells; ``ratio`` of them; ``tokens``, the ratio of the
            tokens that the two need for the higher of their final losses; ``parameters``, the ratio
            of parameters at equal loss, by two parallel lines of the loss over the logarithm of the
            parameters; ``onset``, the ratio of the tokens until a curve first reaches ``threshold``
            (a run that never does counts with its length).
        direction: where the candidate is claimed to be: ``lower``, ``higher``, or ``equal``
            (nearer to the baseline than ``smallest``).
        smallest: the smallest effect of interest: a difference above 0, or a ratio that is not 1.
        threshold: of ``onset``.
        published: what the paper reports for this effect, in the same unit; null if it prints none.
        unit: of the effect.
    """

    candidate: list[str] = field(default_factory=list)
    baseline: list[str] = field(default_factory=list)
    select: dict[str, Any] = field(default_factory=dict)
    less: dict[str, Any] = field(default_factory=dict)
    measure: str = "difference"
    direction: str = "lower"
    smallest: float = MISSING
    threshold: float | None = None
    published: float | None = None
    unit: str = ""

    @property
    def ratio(self) -> bool:
        """Whether the effect is a ratio, which is ruled on by its logarithm."""
        return self.measure != "difference"

    def __post_init__(self) -> None:
        require(self.measure in MEASURES, "measure", self.measure, f"one of {', '.join(MEASURES)}")
        directions = ("lower", "higher", "equal")
        require(self.direction in directions, "direction", self.direction, ", ".join(directions))
        known = self.smallest != MISSING
        good = not known or (self.smallest > 0 and not (self.ratio and self.smallest == 1))
        require(good, "smallest", self.smallest, "above 0, and as a ratio not 1")
        require(
            (self.threshold is not None) == (self.measure == "onset"),
            "threshold",
            self.threshold,
            "given with measure=onset, and only there",
        )


@dataclass(kw_only=True, slots=True)
class Scale:
    """How an experiment is run on one kind of machine.

    Attributes:
        words: of ``diffx train`` or ``diffx adapt-dex``, after those of the experiment.
        seeds: how many, by default; what the pilot's spread asks for.
        arms: words of the arms that replace those of the experiment.
        measure: commands that replace those of the experiment.
    """

    words: list[str] = field(default_factory=list)
    seeds: int = 5
    arms: dict[str, list[str]] = field(default_factory=dict)
    measure: list[str] | None = None

    def __post_init__(self) -> None:
        require(self.seeds >= 2, "seeds", self.seeds, "2 or more")


@dataclass(kw_only=True, slots=True)
class Experiment:
    """One claim and how it is tested.

    Attributes:
        claim: what is claimed, in a sentence.
        source: paper, section or table.
        published: the published figures, in a sentence.
        note: what a reader must know of the design.
        command: ``train`` or ``adapt``, the command of the runs.
        bases: words of ``diffx train`` for models that ``adapt`` starts from, by the name that
            ``base=`` gives in the words of an arm.
        words: words that all arms share.
        arms: of each arm, by name, its words.
        measure: commands for each finished run: ``eval`` or ``quantize`` and words.
        effects: by name; the first one is the claim's.
        scales: by name.
    """

    claim: str = MISSING
    source: str = MISSING
    published: str = MISSING
    note: str = ""
    command: str = "train"
    bases: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    arms: dict[str, list[str]] = field(default_factory=dict)
    measure: list[str] = field(default_factory=list)
    effects: dict[str, Effect] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.command in ("train", "adapt"), "command", self.command, "train or adapt")
        for name, effect in self.effects.items():
            for arm in (*effect.candidate, *effect.baseline):
                require(arm in self.arms, f"effects.{name}", arm, f"one of {', '.join(self.arms)}")


@dataclass(kw_only=True, slots=True)
class ExperimentJob:
    """``diffx experiment run``.

    Attributes:
        name: the experiment.
        scale: ``laptop``, ``gpu`` or ``paper``.
        seeds: how many, or a list of them; ``null`` is the number that the experiment gives.
        dir: the folder of all experiments' runs, which they share.
        base: the model that the experiments of DEX adapt, in place of the experiment's small
            one: a name or folder of the Hugging Face hub.
        device: where to compute.
        wandb: the tracker of the runs.
        job: the number of one job; a sweep sets it.
    """

    kind: str = "claim"
    name: str = MISSING
    scale: str = "laptop"
    seeds: Any = None
    dir: str = "runs/experiments"
    base: str | None = None
    device: Device = Device.auto
    wandb: WandbConfig = field(default_factory=WandbConfig)
    job: int | None = None

    def __post_init__(self) -> None:
        require(self.scale in SCALES, "scale", self.scale, f"one of {', '.join(SCALES)}")
        given = self.seeds
        if given is not None:
            listed = list(range(given)) if isinstance(given, int) and given < 10**4 else given
            good = isinstance(listed, list) and all(type(seed) is int for seed in listed)
            accepted = "2 or more, or a list of two or more different seeds"
            require(good and len(set(listed)) == len(listed) >= 2, "seeds", given, accepted)
            for seed in listed:
                check_seed("seeds", seed)
            self.seeds = listed
        new_path("dir", self.dir)
