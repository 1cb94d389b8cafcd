"""One run for ``diffx train`` and ``diffx adapt-dex``: from a job to a finished run folder.

``Scratch`` (scratch.py) and ``Adaptation`` (adapt.py) hold what differs, in these methods:

    __init__       checks the job before the corpus is read, and sets ``tokenizer``
    build          sets ``model`` (on its device, with weights), ``blocks`` (its decoder blocks, a
                   list inside it), ``parameters`` (counts by name) and ``flops_per_token``
    write_start    writes the files of this kind of run, in the main process
    describe       prints what is trained, and returns constants for the tracker
    on_step        takes the steps done, at the start and after each step
    probe          returns figures for the log; its argument runs the model on one sequence
    on_validation  takes the steps done and the tracker, after each validation
    finish         returns the entries of summary.json of this kind of run
    report         prints those entries
"""

import dataclasses
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import torch
import yaml

from diffx.config import RunError
from diffx.config.checks import refuse
from diffx.config.train import TrainJob
from diffx.console import Reporter, duration, make_table
from diffx.data import open_data
from diffx.files import write_json
from diffx.tracking import NullTracker, Tracker
from diffx.train.checkpoint import newest_intact
from diffx.train.folder import (
    AnyJob,
    finished,
    hold_folder,
    new_folder,
    run_name,
    settle,
    shown_as,
    variant,
    write_start,
)
from diffx.train.loop import fit
from diffx.train.parallel import World, fused_kernels, join_world
from diffx.train.scratch import Scratch, show_read

if TYPE_CHECKING:
    from diffx.train.adapt import Adaptation

Subject = Union[Scratch, "Adaptation"]


def run_job(job: AnyJob, overrides: list[str]) -> Path:
    """Train or adapt a model, or resume a run, and return the run folder.

    The saved job of a resumed run is changed by the overrides on the command line.

    Raises:
        UserError: the job cannot be run; nothing was written.
        RunError: the loss is not finite, or the disk or the device's memory is full.
        Stopped: SIGINT or SIGTERM was received; a checkpoint was saved first.
    """
    with join_world(job.device) as world, ExitStack() as stack:
        fused_kernels(job.train, world.device)  # refused before the corpus is read
        torch.manual_seed(job.seed)
        try:
            return _run(job, overrides, world, Reporter(quiet=not world.main), stack)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the memory of {world.device} is full ({str(error).splitlines()[0][:120]}); lower "
                "train.micro_batch_size or train.seq_len, or give train.activation_checkpointing="
                "true; a run that has a checkpoint goes on with train.resume"
            ) from error


def _run(
    job: AnyJob, overrides: list[str], world: World, reporter: Reporter, stack: ExitStack
) -> Path:
    job, resumed = settle(job, overrides)
    if resumed and world.main:
        stack.enter_context(hold_folder(resumed, new=False))
    if resumed and finished(job, resumed, reporter):
        return resumed
    # Everything that can be refused is checked before anything is written.
    subject: Subject
    if isinstance(job, TrainJob):
        subject = Scratch(job, overrides, resumed, world, reporter)
    else:
        from diffx.train.adapt import Adaptation  # imports matplotlib, which training does not need

        subject = Adaptation(job, resumed, world, reporter)
    if world.main:  # it fills the caches, and the other processes read them afterwards
        with reporter.progress("corpus", None, unit="MB") as bar:
            corpus = open_data(job.data, subject.tokenizer, progress=partial(show_read, bar))
    world.barrier()
    if not world.main:
        corpus = open_data(job.data, subject.tokenizer)
    steps, tokens, seq_len = job.train.num_steps, int(job.train.batch_tokens), job.train.seq_len
    batches = corpus.batches(seq_len, tokens // seq_len, job.seed, world.rank, world.size)
    checkpoint = newest_intact(resumed, reporter.warn) if resumed else None
    if checkpoint:
        batches.load_state_dict(checkpoint[1]["data"])
        reached = checkpoint[1]["progress"]["step"]
        why = f"the run in {resumed} has done {reached} steps; give more"
        refuse(reached > steps, f"train.steps={steps}", why)
    subject.build(corpus, initial=checkpoint is None)
    folder = resumed or Path(world.share(str(new_folder(job))))
    if world.main:
        if resumed is None:
            stack.enter_context(hold_folder(folder, new=True))
        write_start(folder, job, overrides, corpus.tokenizer, corpus.info)
        subject.write_start(folder)
        reporter.open_log(folder / "train.log")
        stack.callback(reporter.close_log)
    world.barrier()
    reporter.line(f"run folder {folder}")
    constants = subject.describe()
    reporter.line(
        f"{steps} steps of {tokens} tokens, T={seq_len}, on {world.size} x {world.device}"
    )
    track: Tracker = NullTracker()
    if world.main:
        # A run that was killed before its first checkpoint starts again in the same folder.
        done = checkpoint[1]["progress"] if checkpoint else {"step": -1, "seconds": 0.0}
        step, seconds = int(done["step"]) if resumed else None, float(done["seconds"])
        name, tags = shown_as(job, yaml.safe_load((folder / "overrides.yaml").read_text("utf-8")))
        config = dataclasses.asdict(job)
        track = Tracker(folder, job.wandb, name, config, reporter.warn, step, seconds, tags)
    with track:
        track.constants = constants
        args = (job.train, world, folder, track, reporter, checkpoint)
        summary = {"name": run_name(job), "kind": variant(job), "seed": job.seed}
        summary |= fit(subject, corpus, batches, *args) | {"parameters": subject.parameters}
        summary |= subject.finish(folder, summary) | {"finished": True}
        if world.main:
            write_json(folder / "summary.json", summary)
            track.summary({key: v for key, v in summary.items() if isinstance(v, int | float)})
            subject.report(summary)
            _report(summary, folder, reporter)
    return folder


def _report(summary: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    counts = (f"{count:,} {name}" for name, count in summary["parameters"].items() if count)
    rows = [
        ["steps", f"{summary['step']:,}"],
        ["training tokens", f"{summary['tokens']:,}"],
        ["perplexity", f"{summary['val/perplexity']:.2f}"],
        ["best loss", f"{summary['best/val/loss']:.4f} at step {summary['best/step']}"],
        ["parameters", ", ".join(counts)],
        ["time", duration(summary["seconds"])],
        ["tokens a second", f"{summary['tokens_per_second']:,.0f}"],
        ["checkpoint", summary["checkpoint"]],
    ]
    reporter.table(make_table("Run", ["", ""], rows))
    reporter.line(f"run folder: {folder}")
