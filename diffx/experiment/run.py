"""``diffx experiment run``: train what is missing, measure it, and rule on it."""

from collections.abc import Sequence
from pathlib import Path

from diffx.config import UserError
from diffx.config.experiment import ExperimentJob
from diffx.config.launch import compose
from diffx.console import Reporter, duration, figure, make_table
from diffx.experiment.plan import Trial, cost_of, exported, make_bases, make_trials
from diffx.export import export
from diffx.files import read_json, write_json


def run_trial(job: ExperimentJob, words: list[str]) -> str:
    """Train and measure the run of number ``job.job``; what is finished is not done again.

    Returns:
        The run's folder.

    Raises:
        UserError: the run is in use, or cannot be resumed.
        RunError: the run cannot go on.
    """
    trials = make_trials(job)
    if job.job is None or not 0 <= job.job < len(trials):
        raise UserError(f"job={job.job} cannot be used: it must be from 0 to {len(trials) - 1}")
    trial = trials[job.job]
    _train(trial)
    for command in trial.measure:
        if not trial.evaluations(command):
            shared = [f"checkpoint={trial.folder}", f"device={job.device.value}"]
            folders = measure(command[0], [*command[1:], *shared])
            known = read_json(trial.measured) if trial.measured.exists() else {}
            names = [str(folder.relative_to(trial.folder)) for folder in folders]
            write_json(trial.measured, known | {" ".join(command): names})
    return str(trial.folder)


def prepare(job: ExperimentJob) -> None:
    """Train and export the models that an experiment of DEX adapts, unless that was done."""
    for trial in make_bases(job).values():
        if not exported(trial).exists():
            _train(trial)
            words = [f"checkpoint={trial.folder}", f"out={exported(trial)}"]
            export(compose("export", words))


def measure(command: str, words: list[str]) -> list[Path]:
    """Run ``diffx eval`` or ``diffx quantize``, and return the folders of results."""
    job = compose(command, [*words, "wandb.mode=disabled"])
    if command == "quantize":
        from diffx.quantization.run import quantize

        return [*quantize(job).values()]
    from diffx.evaluation.run import evaluate

    return [evaluate(job, words)]


def _train(trial: Trial) -> None:
    from diffx.train.run import run_job

    words = [*trial.words, "train.resume=auto"]
    run_job(compose("adapt" if hasattr(trial.job, "dex") else "train", words), words)


def show_plan(job: ExperimentJob, trials: Sequence[Trial]) -> None:
    """Print every job, whether it is done, and the cost; nothing runs."""
    reporter = Reporter()
    bases = {trial.folder: trial for trial in make_bases(job).values()}
    jobs = [*bases.values(), *trials]
    rows = [
        [
            number if number >= 0 else "",
            trial.arm,
            trial.seed,
            "done" if trial.finished else "begun" if trial.folder.is_dir() else "",
            " ".join(trial.words),
        ]
        for number, trial in enumerate(jobs, -len(bases))
    ]
    table = make_table(
        f"{job.name}, scale={job.scale}", ["job", "arm", "seed", "state", "words"], rows
    )
    table.columns[1].justify = table.columns[4].justify = "left"
    reporter.table(table)
    for command in trials[0].measure:
        reporter.line(f"then: diffx {' '.join(command)} checkpoint=…")
    cost = cost_of(jobs, job.device)
    line = f"{cost.runs} runs, {cost.done} of them done; {figure(cost.tokens)} training tokens"
    if cost.flops is not None and cost.hours is not None:
        hours = duration(cost.hours * 3600)
        line += f", {cost.flops:.2g} FLOPs; about {hours} here for the rest, one after the other"
    reporter.line(line)
