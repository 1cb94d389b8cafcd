"""The files of experiments, ``experiments/claims/NAME.yaml``, and their committed results."""

from diffx.config import UserError
from diffx.config.bridge import from_plain, read_yaml
from diffx.config.checks import refuse, require
from diffx.config.composition import CONFIGS
from diffx.config.experiment import Experiment, Scale

CLAIMS = CONFIGS / "experiment" / "claims"
RESULTS = CONFIGS / "experiment" / "results"  # <name>/<scale>/


def experiment_names() -> list[str]:
    """The names of all experiments, sorted."""
    return sorted(path.stem for path in CLAIMS.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """Read an experiment.

    Raises:
        UserError: there is no such experiment, or its file is damaged.
    """
    names = experiment_names()
    require(name in names, "experiment", name, f"one of {', '.join(names)}")
    path = CLAIMS / f"{name}.yaml"
    try:
        return from_plain(Experiment, read_yaml(path))
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def scale_of(name: str, experiment: Experiment, scale: str) -> Scale:
    """The scale of an experiment.

    Raises:
        UserError: the experiment is not made for this scale.
    """
    scales = experiment.scales
    refuse(
        scale not in scales,
        f"scale={scale}",
        f"experiment {name} has {', '.join(scales)}",
    )
    return scales[scale]
