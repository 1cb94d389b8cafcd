"""``diffx experiment``: list, run and report the claims of the papers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diffx.cli.bench import SETTINGS

experiment = typer.Typer(help="Test the papers' claims.", **SETTINGS)
_Name = Annotated[str, typer.Argument(metavar="NAME", help="The experiment.")]
_Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="scale= seeds= dir= base= device= wandb.mode="),
]


@experiment.command("list")
def list_experiments(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table of Markdown.")] = False,
    dir: Annotated[str, typer.Option(help="The folder of the runs.")] = "runs/experiments",
) -> None:
    """List every claim with its state and its cost at scale=laptop."""
    from diffx.experiment.listing import show_list

    show_list(dir, markdown)


@experiment.command("run")
def run(
    name: _Name,
    words: _Words = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every job and the cost; run nothing.")
    ] = False,
) -> None:
    """Train and measure the runs of a claim, and rule on it.

    Runs are shared by all experiments; what is finished is not done again, and what was killed goes
    on. Hydra's launchers run several jobs at once.

    \b
    Keys: scale=laptop|gpu|paper seeds=5 seeds=[0,1,2] dir= base= device= wandb.mode=
    Examples:
      diffx experiment run recall
      diffx experiment run lm_loss scale=gpu seeds=8 --dry-run
      diffx experiment run ablations hydra/launcher=joblib hydra.launcher.n_jobs=2
      diffx experiment run dex_controls base=models/smollm2
    """
    from diffx.config.checks import refuse
    from diffx.config.launch import compose, launch
    from diffx.experiment.plan import make_trials
    from diffx.experiment.report import keep_rule, results_folder, write_report
    from diffx.experiment.run import prepare, run_trial, show_plan

    keys = [f"name={name}", *(words or [])]
    numbered = [word for word in keys if word.startswith("job=")]
    refuse(bool(numbered), " ".join(numbered), "the command runs all jobs of the experiment")
    job = compose("claim", [word for word in keys if not word.startswith("hydra")])
    trials = make_trials(job)
    if dry_run:
        show_plan(job, trials)
        return
    keep_rule(job)
    prepare(job)
    numbers = ",".join(str(number) for number in range(len(trials)))
    sweep = f"hydra.sweep.dir={results_folder(job)}"
    code = launch("claim", run_trial, [*keys, f"job={numbers}", sweep], multirun=True)
    if code == 0:
        write_report(job, trials)
    raise typer.Exit(code)


@experiment.command("report")
def report(
    name: _Name,
    words: _Words = None,
    rows: Annotated[
        Path | None, typer.Option(help="A rows.parquet that a report wrote, in place of the runs.")
    ] = None,
) -> None:
    """Rule on the runs that are there, and write table, figure and verdict.

    \b
    Examples:
      diffx experiment report recall
      diffx experiment report recall --rows experiments/results/recall/laptop/rows.parquet
    """
    from diffx.config.launch import compose
    from diffx.experiment.plan import make_trials
    from diffx.experiment.report import analyse, load_rows, show, write_report

    job: Any = compose("claim", [f"name={name}", *(words or [])])
    if rows is None:
        write_report(job, make_trials(job))
    else:
        show(analyse(name, job.scale, load_rows(rows)))
