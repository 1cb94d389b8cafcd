"""The training loop of training and adaptation, in the order in which things happen."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffx.config import RunError
from diffx.config.train import TrainConfig
from diffx.console import Reporter, figure
from diffx.data import Batch, Batches, Corpus, cu_seqlens
from diffx.errors import Stopped
from diffx.models import Decoder
from diffx.tracking import Tracker
from diffx.train.checkpoint import load_training_state, newest_intact, prune, save_checkpoint
from diffx.train.optimizer import build_optimizer, learning_rate
from diffx.train.parallel import World, accumulate, autocast, clip_gradients, parallelize
from diffx.train.signals import stop_signals
from diffx.train.throughput import matmul_ceiling, peak_memory, synchronize

if TYPE_CHECKING:
    from diffx.train.run import Subject


@dataclass
class Progress:
    """The state that the loop carries from step to step and that a checkpoint keeps.

    Attributes:
        step: optimizer steps done.
        tokens: training tokens seen.
        seconds: since the run started, including those before a resume.
        train_seconds: those in steps, without evaluation and saving.
        pending: losses since the last logged line.
        val_loss: the validation loss at this step, if measured.
        best_loss: the lowest validation loss so far, of step ``best_step``.
        unmeasured: the figures of this step, if a signal came before its validation was done.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0
    pending: list[float] = field(default_factory=list)
    val_loss: float | None = None
    best_loss: float = math.inf
    best_step: int = 0
    unmeasured: dict[str, float] | None = None


def token_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, boundaries: Tensor | None
) -> Tensor:
    """Return the sum of the cross-entropies in nats of the targets that are not -100.

    The model returns logits or is a ``Decoder``. ``inputs`` and ``targets`` are (B, T), and
    ``boundaries`` (n + 1,) those of documents, as of ``cu_seqlens``; ``None``: no masks.
    """
    if isinstance(model, Decoder):
        return model(inputs, cu_seqlens=boundaries, targets=targets)
    logits = model(inputs, cu_seqlens=boundaries).flatten(0, 1).float()  # (B T, V)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    corpus: Corpus,
    config: TrainConfig,
    world: World,
    on_batch: Callable[[int], None],
) -> dict[str, float]:
    """Return ``val/loss`` in nats a token, ``val/perplexity``, and ``val/bpb`` in bits per byte.

    ``on_batch`` is called before each batch with the tokens that all processes have read; what it
    raises ends the evaluation. The model is left in training mode.
    """
    model.eval()
    total, eot = torch.zeros(2, dtype=torch.float64), corpus.tokenizer.eot_id
    rows = int(config.batch_tokens) // config.seq_len // world.size
    rows = config.micro_batch_size or max(1, rows)
    batches = corpus.val_batches(config.seq_len, rows * world.size, world.rank, world.size)
    for number, batch in enumerate(batches):
        on_batch(number * rows * world.size * config.seq_len)
        nats = _nats(model, batch, config, eot, world)
        # Device sync: once a batch, not in training.
        total += torch.tensor([float(nats), float((batch.targets >= 0).sum())], dtype=total.dtype)
    model.train()
    if world.size > 1:
        total = world.total(total.to(world.device))
    nats_total, tokens = total.tolist()
    loss = nats_total / tokens
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(min(loss, 700.0)),
        "val/bpb": nats_total / corpus.val.n_bytes / math.log(2),
    }


def fit(
    subject: "Subject",
    corpus: Corpus,
    batches: Batches,
    config: TrainConfig,
    world: World,
    run_dir: Path,
    track: Tracker,
    reporter: Reporter,
    resume: tuple[Path, dict[str, Any]] | None,
) -> dict[str, Any]:
    """Train ``subject``, which run.py describes, to ``config.num_steps`` optimizer steps.

    ``batches`` are those of this process, at the step to start from. ``resume`` is the folder and
    the state of the checkpoint to start from, as of ``newest_intact``.

    Returns:
        The last figures and checkpoint, for summary.json.

    Raises:
        RunError: the loss is not finite, or the disk is full.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    model = subject.model
    ceiling = matmul_ceiling(world.device, config.precision) * world.size
    parallelize(model, subject.blocks, config, world)
    optimizer = build_optimizer(model, config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    now, validation, checkpoint = Progress(), dict[str, float](), run_dir
    if resume is not None:
        checkpoint, state = resume
        load_training_state(checkpoint, model, optimizer)
        now, validation = Progress(**state["progress"]), state["validation"]
        reporter.line(f"resumed from step {now.step} ({checkpoint})")
        if world.main:  # a killed process may not have done it
            prune(run_dir, config.keep_last, now.step)

    subject.on_step(now.step)
    eot = corpus.tokenizer.eot_id
    last, batch_tokens = config.num_steps, int(config.batch_tokens)

    def measure(row: dict[str, float]) -> None:
        nonlocal validation
        now.unmeasured = row

        def on_batch(tokens: int) -> None:
            val_bar.at(min(tokens, corpus.val.n_tokens))
            if world.any(stop.name is not None):
                if now.step:
                    save()
                raise stopped()

        with reporter.progress("val", corpus.val.n_tokens) as val_bar:
            validation = evaluate(model, corpus, config, world, on_batch)
        now.unmeasured = None
        now.val_loss = validation["val/loss"]
        check_finite("validation loss", now.val_loss, now.step, "all held-out text")
        if now.val_loss < now.best_loss:
            now.best_loss, now.best_step = now.val_loss, now.step
        bar.at(now.step, note(), always=True)
        track.log(now.step, now.tokens, row | validation)
        subject.on_validation(now.step, track)

    def check_finite(name: str, value: float, step: int, place: str) -> None:
        if not math.isfinite(value):
            good = newest_intact(run_dir, reporter.warn)
            last = f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint"
            raise RunError(f"the {name} is {value} at step {step} ({place}); {last}")

    def note() -> str:
        figures = [f"loss {train_loss:.4f}"] if train_loss is not None else []
        figures += [f"val {validation['val/loss']:.4f}"] if validation else []
        figures += [f"{figure(speed)} tok/s"] if speed else []
        return "  ".join(figures)

    def stopped() -> Stopped:
        by, step = stop.name or "another process", now.step
        return Stopped(f"stopped by {by} after step {step}; go on with train.resume={run_dir}")

    def save() -> Path:
        now.seconds = track.seconds
        state = {
            "progress": vars(now),
            "val_loss": now.val_loss,
            "validation": validation,
            "data": batches.state_dict(),
        }
        folder = save_checkpoint(run_dir, now.step, model, optimizer, state, world.main)
        world.barrier()
        if world.main:
            prune(run_dir, config.keep_last, now.step)
        return folder

    train_loss: float | None = None
    speed = 0.0
    # (step, loss on the device, the batch's position)
    unread: list[tuple[int, Tensor, str]] = []
    if resume is None:
        now.unmeasured = {}  # step 0
    with stop_signals() as stop, reporter.progress("step", last, now.step) as bar:
        if now.unmeasured is not None:
            measure(now.unmeasured)
            if now.step:
                checkpoint = save()
        mark_step, mark_time = now.step, time.perf_counter()
        while now.step < last:
            # Data
            batch = next(batches)
            rate = learning_rate(now.step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate

            # Forward and backward
            loss = _accumulate_gradients(model, batch, config, eot, world)

            # Clip, step
            norm = clip_gradients(parameters, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            now.step += 1
            subject.on_step(now.step)
            now.tokens += batch_tokens
            now.val_loss = None
            unread.append((now.step, loss, batch.position))

            stopping = world.any(stop.name is not None)
            logs, evals, saves = (
                now.step == last or now.step % every == 0
                for every in (config.log_every, config.eval_steps, config.save_every)
            )
            if not (logs or evals or saves or stopping):
                continue
            # Device sync: what is timed, logged or saved is finished work.
            synchronize(world.device)
            elapsed = time.perf_counter() - mark_time
            now.train_seconds += elapsed
            # Device sync: once for the losses of all these steps.
            losses = torch.stack([loss for _, loss, _ in unread]).tolist()
            for (step, _, position), value in zip(unread, losses, strict=True):
                check_finite("loss", value, step, f"batch at {position}")
            now.pending += losses
            unread = []
            check_finite("gradient norm", float(norm), now.step, batch.position)
            row: dict[str, float] = {}

            # Log
            if logs:
                speed = (now.step - mark_step) * batch_tokens / elapsed
                train_loss = sum(now.pending) / len(now.pending)
                now.pending = []
                row = {
                    "train/loss": train_loss,
                    "train/perplexity": math.exp(min(train_loss, 700.0)),
                    "train/lr": rate,
                    "train/grad_norm": float(norm),
                    "train/tokens_per_second": speed,
                    "train/mfu": speed * subject.flops_per_token / ceiling,
                    "train/peak_memory_bytes": peak_memory(world.device),
                }
                row |= subject.probe(partial(_look, model, batch, config, eot, world))
                bar.at(now.step, note())

            # Evaluate
            if evals:
                measure(row)
            elif row:
                track.log(now.step, now.tokens, row)

            # Save
            if saves or stopping or (evals and now.best_step == now.step):
                checkpoint = save()
            if stopping and now.step < last:
                raise stopped()
            mark_step, mark_time = now.step, time.perf_counter()

        if now.val_loss is None:  # resumed at its last step
            measure({})
            checkpoint = save()
    return {
        "step": now.step,
        "tokens": now.tokens,
        **validation,
        "best/val/loss": now.best_loss,
        "best/step": now.best_step,
        "seconds": round(now.seconds, 1),
        "tokens_per_second": now.tokens / max(now.train_seconds, 1e-9),
        "checkpoint": str(checkpoint),
    }


def _accumulate_gradients(
    model: nn.Module, batch: Batch, config: TrainConfig, eot: int, world: World
) -> Tensor:
    """Accumulate gradients over micro-batches; return the mean loss over all processes."""
    length = len(batch.inputs)
    size = config.micro_batch_size or length
    scored = world.total((batch.targets >= 0).sum().float().to(world.device)).clamp(min=1)
    total = torch.zeros((), device=world.device)
    for start in range(0, length, size):
        accumulate(model, last=start + size >= length)
        inputs, targets = (rows[start : start + size] for rows in (batch.inputs, batch.targets))
        nats = _nats(model, Batch(inputs, targets, batch.position), config, eot, world)
        # Sharded gradients are averaged over the processes.
        (nats * (world.size / scored)).backward()
        total += nats.detach()
    return world.total(total) / scored


def _nats(model: nn.Module, batch: Batch, config: TrainConfig, eot: int, world: World) -> Tensor:
    """Return ``token_losses`` of a micro-batch in the training precision."""
    inputs = batch.inputs.to(world.device, non_blocking=True)
    targets = batch.targets.to(world.device, non_blocking=True)
    boundaries = cu_seqlens(inputs, eot) if config.mask_documents else None
    with autocast(world.device, config.precision):
        return token_losses(model, inputs, targets, boundaries)


def _look(model: nn.Module, batch: Batch, config: TrainConfig, eot: int, world: World) -> None:
    """Run the model on a batch's first sequence, for the probe."""
    inputs = batch.inputs[:1].to(world.device)
    boundaries = cu_seqlens(inputs, eot) if config.mask_documents else None
    with autocast(world.device, config.precision):
        model(inputs, cu_seqlens=boundaries)
