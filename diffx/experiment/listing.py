"""``diffx experiment list``: every claim with its state, and what testing it costs."""

from typing import Any

from diffx.config.experiment import ExperimentJob
from diffx.console import Reporter, duration, figure, make_table
from diffx.experiment.claims import experiment_names, load_experiment
from diffx.experiment.plan import cost_of, make_bases, make_trials
from diffx.experiment.report import known_reports, rule_of

NEVER = "never run here"


def show_list(dir: str, markdown: bool) -> None:
    """Print a table of all experiments.

    Args:
        dir: the folder of the runs.
        markdown: print it for ``experiments/README.md``, without the costs, which are the
            machine's.
    """
    reporter = Reporter()
    if markdown:
        reporter.line("| experiment | claim | source | published | measured | verdict |")
        reporter.line("|---|---|---|---|---|---|")
        for name in experiment_names():
            reporter.line(f"| {' | '.join(_markdown(name, dir))} |")
        return
    rows = [[name, *_facts(name, dir)] for name in experiment_names()]
    columns = ["experiment", "claim", "source", "state", "tokens", "FLOPs", "hours here"]
    table = make_table("Experiments, at scale=laptop", columns, rows)
    for column in table.columns[1:4]:
        column.justify = "left"
    reporter.table(table)


def _facts(name: str, dir: str) -> list[str]:
    experiment = load_experiment(name)
    job = ExperimentJob(name=name, dir=dir)
    cost = cost_of([*make_bases(job).values(), *make_trials(job)], job.device)
    flops = "-" if cost.flops is None else f"{cost.flops:.1e}"
    hours = "-" if cost.hours is None else duration(cost.hours * 3600)
    state = state_of(name, dir)
    return [experiment.claim, experiment.source, state, figure(cost.tokens), flops, hours]


def state_of(name: str, dir: str) -> str:
    """The verdict on the claim's first effect at each scale that was run."""
    reports = known_reports(name, dir)
    return "; ".join(f"{scale}: {_verdict(report)}" for scale, report in reports.items()) or NEVER


def _verdict(report: dict[str, Any]) -> str:
    changed = report["rule_sha256"] != rule_of(report["name"], report["scale"])["sha256"]
    verdict = str(report["effects"][0]["ruling"]["verdict"])
    return f"{verdict} (the rule has changed since)" if changed else verdict


def _markdown(name: str, dir: str) -> list[str]:
    experiment, reports = load_experiment(name), known_reports(name, dir)
    figures, verdicts = [], []
    for scale, report in reports.items():
        effect = report["effects"][0]
        interval = f"{effect['low']:.3g} to {effect['high']:.3g}"
        figures.append(f"{effect['estimate']:.3g} {effect['unit']} ({interval})")
        verdicts.append(f"[{_verdict(report)}](results/{name}/{scale}/README.md)")
    return [
        f"`{name}`",
        experiment.claim,
        experiment.source,
        experiment.published,
        "; ".join(figures),
        "; ".join(verdicts) or NEVER,
    ]
