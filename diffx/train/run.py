"""``diffx train``: from a job to a finished run folder."""

import dataclasses
import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffx.config import UserError
from diffx.config.data import DataConfig, TokenizerConfig
from diffx.config.dex import AdaptJob
from diffx.config.train import TrainJob
from diffx.console import Bar, Reporter, duration, figure, make_table
from diffx.data import Batches, Corpus, open_data
from diffx.data.ngram import baselines
from diffx.data.tokenizers import Tokenizer, load_tokenizer
from diffx.dex.pretrained import free_memory
from diffx.files import write_json
from diffx.models import Decoder, build_model, generate, init_weights
from diffx.tracking import NullTracker, Tracker
from diffx.train.checkpoint import WEIGHTS, find_checkpoint, newest_intact, read_tensors, trained_shapes
from diffx.train.folder import hold_folder, new_folder, run_name, settle, write_start
from diffx.train.loop import Fit, fit
from diffx.train.parallel import World, fused_attention, join_world
from diffx.train.params import check_memory, counts_table
from diffx.train.probes import attention_statistics


def train(job: TrainJob, words: list[str]) -> Path:
    """Train a model from scratch, or go on with a run, and return its folder.

    Args:
        job: the composed job.
        words: the overrides given on the command line; a resumed run refuses those that conflict with it.

    Raises:
        UserError: the job cannot be run as it is; nothing was made.
        RunError: the loss is not finite or the disk is full.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    with join_world(job.device) as world, fused_attention(job.train.fused_attention, world.device), ExitStack() as stack:
        torch.manual_seed(job.seed)
        return _train(job, words, world, Reporter(quiet=not world.main), stack)


def _train(job: TrainJob, words: list[str], world: World, reporter: Reporter, stack: ExitStack) -> Path:
    job, resumed = settle(job, words)
    if resumed and world.main:
        stack.enter_context(hold_folder(resumed, new=False))
    # Everything that can be refused is tried before anything is written.
    check_memory(job, world.size, free_memory(world.device))
    # A resumed run keeps the tokenizer in its folder: one trained anew could differ, and what made it may be gone.
    kept = resumed is not None and (resumed / "tokenizer").is_dir()
    corpus = open_corpus(job.data, load_tokenizer(resumed / "tokenizer") if resumed and kept else job.tokenizer, world, reporter)
    if job.data.kind == "shards" and corpus.tokenizer.kind != job.tokenizer.kind and any(word.startswith("tokenizer") for word in words):
        raise UserError(
            f"tokenizer={job.tokenizer.kind} cannot be used with data=shards: these hold {corpus.tokenizer.kind} tokens; leave it out"
        )
    batches, found = take_up(job, corpus, world, resumed, reporter)
    model = _build(job, corpus, world, initial=found is None)
    folder = resumed or Path(world.share(str(new_folder(job))))
    if world.main:
        if resumed is None:
            stack.enter_context(hold_folder(folder, new=True))
        write_start(folder, job, words, corpus.tokenizer, corpus.info)
        reporter.open_log(folder / "train.log")
        stack.callback(reporter.close_log)
    world.barrier()
    return _run(job, corpus, batches, model, folder, world, reporter, resumed is not None, found)


def open_corpus(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, world: World, reporter: Reporter) -> Corpus:
    """Open a corpus: the main process fills the caches, the others find them."""
    if world.main:
        with reporter.progress("corpus", None, unit="MB") as bar:
            corpus = open_data(data, tokenizer, progress=partial(_say_read, bar))
    world.barrier()
    return corpus if world.main else open_data(data, tokenizer)


def take_up(
    job: TrainJob | AdaptJob, corpus: Corpus, world: World, resumed: Path | None, reporter: Reporter
) -> tuple[Batches, tuple[Path, dict[str, Any]] | None]:
    """Give this process's batches, at the step of the newest intact checkpoint of a resumed run, and that checkpoint.

    Raises:
        UserError: the batches cannot be cut like that, or the run has done more steps than the job asks for.
    """
    sequences = int(job.train.batch_tokens) // job.train.seq_len
    batches = corpus.batches(job.train.seq_len, sequences, job.seed, world.rank, world.size)
    found = newest_intact(resumed, reporter.warn) if resumed else None
    if found:
        batches.load_state_dict(found[1]["data"])
        done = found[1]["progress"]["step"]
        if done > job.train.num_steps:
            raise UserError(
                f"train.steps={job.train.num_steps} cannot be used: the run in {resumed} has done {done} steps already; give more"
            )
    return batches, found


def _run(
    job: TrainJob,
    corpus: Corpus,
    batches: Batches,
    model: Decoder,
    folder: Path,
    world: World,
    reporter: Reporter,
    resumed: bool,
    found: tuple[Path, dict[str, Any]] | None,
) -> Path:
    reporter.line(f"run folder {folder}")
    reporter.table(counts_table(model.config))
    rivals: dict[str, dict[str, float]] = {}
    if world.main:
        with reporter.progress("n-gram baselines", None, unit="MB") as bar:
            rivals = baselines(corpus, progress=partial(_say_read, bar))
    for name, values in rivals.items():
        reporter.line(f"{name}: " + ", ".join(f"{value:.4f} {unit}" for unit, value in values.items()))
    reporter.line(
        f"{job.train.num_steps} steps of {job.train.batch_tokens} tokens, T={job.train.seq_len}, on {world.size} x {world.device}"
    )
    parameters = model.num_parameters()
    with open_tracker(job, folder, world, reporter, resumed, found) as track:
        result = fit(
            model,
            model.layers,
            corpus,
            batches,
            job.train,
            flops_per_token=model.flops_per_token(job.train.seq_len),
            world=world,
            run_dir=folder,
            track=track,
            reporter=reporter,
            resume=found,
            probe=partial(attention_statistics, model, model.layers),
        )
        sample = _sample(model, corpus, job, world)
        if world.main:
            summary = _summary(job, folder, result, parameters, rivals, sample)
            write_json(folder / "summary.json", summary)
            track.samples(result.progress.step, [(job.train.sample_prompt, sample)] if sample else [])
            track.summary({key: value for key, value in summary.items() if isinstance(value, int | float)})
            _report(summary, folder, reporter)
    return folder


def open_tracker(
    job: TrainJob | AdaptJob, folder: Path, world: World, reporter: Reporter, resumed: bool, found: tuple[Path, dict[str, Any]] | None
) -> Tracker:
    """Open the run's tracker, cut back to the checkpoint that it resumes from; the other processes get one that keeps nothing."""
    if not world.main:
        return NullTracker()
    # A run that was killed before its first checkpoint starts again, in the same folder, from step 0.
    spent = found[1]["progress"] if found else {"step": -1, "seconds": 0.0}
    step = int(spent["step"]) if resumed else None
    return Tracker(folder, job.wandb, run_name(job), dataclasses.asdict(job), reporter.warn, step, float(spent["seconds"]))


def _say_read(bar: Bar, stage: str, done: int, total: int | None) -> None:
    bar.at(done // 10**6, stage + (f" of {figure(total)} bytes" if total else ""))


def _build(job: TrainJob, corpus: Corpus, world: World, initial: bool) -> Decoder:
    """Build the model on its device, with initial weights or those of ``train.init_from``; not ``initial``: a checkpoint follows."""
    entries = corpus.tokenizer.vocab_size
    size = job.model.vocab_size or entries
    if size < entries:
        raise UserError(f"model.vocab_size={size} cannot be used: the tokenizer has {entries} entries; leave it null, or give more")
    config = dataclasses.replace(job.model, vocab_size=size)
    model = build_model(config)
    init_weights(model, job.seed)
    if initial and job.train.init_from is not None:
        source, folder = find_checkpoint(job.train.init_from, "train.init_from")
        if load_tokenizer(source / "tokenizer").fingerprint != corpus.tokenizer.fingerprint:
            raise UserError(
                f"data={job.data.kind} cannot be used with train.init_from={job.train.init_from}: its tokens come from another tokenizer"
            )
        model.load_state_dict(read_tensors(folder / WEIGHTS, trained_shapes(model)))
    return model.to(world.device)


def _sample(model: Decoder, corpus: Corpus, job: TrainJob, world: World) -> str:
    """Draw one continuation of ``train.sample_prompt``; every process takes part, since the weights may be sharded."""
    if job.train.sample_tokens == 0:
        return ""
    tokenizer = corpus.tokenizer
    prompt = [tokenizer.eot_id, *tokenizer.encode(job.train.sample_prompt)]
    inputs = torch.tensor([prompt], device=world.device)
    drawn = generate(model, inputs, max_tokens=job.train.sample_tokens, temperature=0.8, top_p=0.95, seed=job.seed, eot_id=tokenizer.eot_id)
    return tokenizer.decode(list(drawn))


def _summary(
    job: TrainJob, folder: Path, result: Fit, parameters: dict[str, int], rivals: dict[str, dict[str, float]], sample: str
) -> dict[str, Any]:
    now = result.progress
    return {
        "name": run_name(job),
        "kind": job.model.kind,
        "seed": job.seed,
        "step": now.step,
        "tokens": now.tokens,
        **result.validation,
        "best/val/loss": now.best_loss,
        "best/step": now.best_step,
        "baselines": rivals,
        "parameters": parameters,
        "seconds": round(now.seconds, 1),
        "tokens_per_second": result.tokens_per_second,
        "checkpoint": str(result.checkpoint),
        "sample": sample,
        "finished": True,
    }


def _report(summary: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    rows = [[summary["kind"], f"{summary['val/loss']:.4f}", f"{summary['val/bpb']:.4f}"]]
    rows += [[name, f"{r['nats']:.4f}" if "nats" in r else "-", f"{r['bpb']:.4f}"] for name, r in summary["baselines"].items()]
    if summary["sample"]:
        reporter.line("\nsampled continuation:\n" + summary["sample"] + "\n")
    reporter.table(make_table("Held-out loss", ["model", "nats a token", "bits per byte"], rows))
    counts = summary["parameters"]
    reporter.table(
        make_table(
            "Run",
            ["", ""],
            [
                ["steps", f"{summary['step']:,}"],
                ["training tokens", f"{summary['tokens']:,}"],
                ["perplexity", f"{math.exp(min(summary['val/loss'], 700.0)):.2f}"],
                ["best loss", f"{summary['best/val/loss']:.4f} at step {summary['best/step']}"],
                ["parameters", f"{counts['total']:,} ({counts['embedding']:,} embedding, {counts['rest']:,} rest)"],
                ["time", duration(summary["seconds"])],
                ["tokens a second", f"{summary['tokens_per_second']:,.0f}"],
                ["checkpoint", summary["checkpoint"]],
            ],
        )
    )
    reporter.line(f"run folder: {folder}")
