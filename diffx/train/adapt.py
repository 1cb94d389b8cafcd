"""``diffx adapt-dex``: from a pretrained model to a finished run folder, by the same ``fit`` as training.

Besides what a training run has, the folder holds base.json, heads.json, plots/heads.png and, at the end, adapter/. Its checkpoints hold
what is trained, and nothing of what is frozen.
"""

import dataclasses
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffx.config import RunError, UserError
from diffx.config.dex import CRITERIA, AdaptJob
from diffx.config.train import Precision
from diffx.console import Reporter, duration, make_table
from diffx.data import Batches, Corpus
from diffx.dex.adapters import BRANCH, DESCRIPTION, TUNED, file_of
from diffx.dex.attach import Adapted, attach, parameter_counts
from diffx.dex.heads import Plan, choose_heads, draw_heads, load_plan
from diffx.dex.layer import projection_weight
from diffx.dex.layout import Layer, find_layers
from diffx.dex.pretrained import Pretrained, free_memory, load_pretrained
from diffx.dex.watch import Watch
from diffx.files import read_json, read_json_lines, replacing_folder, write_json
from diffx.hub.card import CARD, adapter_usage, training_card
from diffx.models.tensors import read_tensors
from diffx.train.checkpoint import WEIGHTS
from diffx.train.folder import hold_folder, new_folder, run_name, settle, write_start
from diffx.train.loop import Fit, fit
from diffx.train.parallel import World, autocast, join_world, precision_of
from diffx.train.run import open_corpus, open_tracker, take_up

ADAPTER = "adapter"


class ForTraining(nn.Module):
    """A pretrained model as ``fit`` calls one: tokens in, logits out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Map (B, T) to logits (B, T, V)."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def adapt(job: AdaptJob, words: list[str]) -> Path:
    """Adapt a pretrained model, or go on with a run, and return its folder.

    Args:
        job: the composed job.
        words: the overrides given on the command line; a resumed run refuses those that conflict with it.

    Raises:
        UserError: the job cannot be run as it is; nothing was made.
        RunError: the loss is not finite, or the disk or the device's memory is full.
        Stopped: SIGINT or SIGTERM came; a checkpoint was saved first.
    """
    with join_world(job.device) as world, ExitStack() as stack:
        torch.manual_seed(job.seed)
        try:
            return _adapt(job, words, world, Reporter(quiet=not world.main), stack)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"the memory of {world.device} is full ({str(error).splitlines()[0][:120]}); lower train.micro_batch_size or "
                "train.seq_len, or give train.activation_checkpointing=true; a run that has a checkpoint goes on with train.resume"
            ) from error


def _adapt(job: AdaptJob, words: list[str], world: World, reporter: Reporter, stack: ExitStack) -> Path:
    job, resumed = settle(job, words)
    if resumed and world.main:
        stack.enter_context(hold_folder(resumed, new=False))
    base = load_pretrained("base", job.base, _base_dtype(job, world), world.device, job.revision, job.trust_remote_code)
    _same_base(base, resumed)
    layers = find_layers(base.model, {"input_ids": torch.tensor([[0, 1]], device=world.device)})
    _enough_context(job, base)
    corpus = open_corpus(job.data, base.tokenizer, world, reporter)
    if corpus.tokenizer.fingerprint != base.tokenizer.fingerprint:
        raise UserError(
            f"data={job.data.kind} cannot be used with base={job.base}: its tokens come from another tokenizer; prepare it with "
            f"tokenizer=hf tokenizer.name={job.base}, or give text"
        )
    batches, found = take_up(job, corpus, world, resumed, reporter)
    plan = _plan(job, base, layers, corpus, resumed, reporter)
    plan = Plan(**json.loads(world.share(json.dumps(dataclasses.asdict(plan)))))  # where rounding differs, the main process decides
    adapted = attach(base.model, layers, job.dex, plan.heads, int(job.dex.anneal_steps or 0), job.seed)
    _enough_memory(job, adapted, world)
    folder = resumed or Path(world.share(str(new_folder(job))))
    if world.main:
        if resumed is None:
            stack.enter_context(hold_folder(folder, new=True))
        write_start(folder, job, words, corpus.tokenizer, corpus.info)
        write_json(folder / "base.json", {"name": base.name, "revision": job.revision, "fingerprint": base.fingerprint})
        plan.save(folder / "heads.json")
        (folder / "plots").mkdir(exist_ok=True)
        if job.dex.variant.branches:
            draw_heads(plan, folder / "plots" / "heads.png")
        reporter.open_log(folder / "train.log")
        stack.callback(reporter.close_log)
    world.barrier()
    return _run(job, base, adapted, corpus, batches, folder, world, reporter, resumed is not None, found)


def _run(
    job: AdaptJob,
    base: Pretrained,
    adapted: Adapted,
    corpus: Corpus,
    batches: Batches,
    folder: Path,
    world: World,
    reporter: Reporter,
    resumed: bool,
    found: tuple[Path, dict[str, Any]] | None,
) -> Path:
    counts = parameter_counts(adapted)
    reporter.line(f"run folder {folder}")
    rows = [[name, f"{number:,}"] for name, number in counts.items()]
    reporter.table(make_table(f"Parameters: {job.dex.variant.value} on {base.name}", ["", ""], rows))
    reporter.line(
        f"{job.train.num_steps} steps of {job.train.batch_tokens} tokens, T={job.train.seq_len}, on {world.size} x {world.device}"
    )
    model, watch = ForTraining(adapted.model), Watch(adapted)
    with open_tracker(job, folder, world, reporter, resumed, found) as track:
        result = fit(
            model,
            _blocks(adapted),
            corpus,
            batches,
            job.train,
            flops_per_token=4.0 * counts["rest"] + 2.0 * counts["trained"],
            world=world,
            run_dir=folder,
            track=track,
            reporter=reporter,
            resume=found,
            probe=watch,
            on_step=watch.set_step,
        )
        adapted.set_step(result.progress.step)
        held_out = next(iter(corpus.val_batches(job.train.seq_len, world.size, world.rank, world.size))).inputs.to(world.device)
        with autocast(world.device, job.train.precision):
            watch(lambda: model(held_out))  # for the verdict
        if world.main:
            summary = _summary(job, base, folder, result, counts, watch)
            _save_adapter(job, folder, result.checkpoint, summary)
            write_json(folder / "summary.json", summary)
            track.summary({key: value for key, value in summary.items() if isinstance(value, int | float)})
            _report(summary, folder, reporter)
    return folder


def restore(
    run_dir: Path, checkpoint: Path, job: AdaptJob, device: torch.device, dtype: torch.dtype | str, trust_remote_code: bool = False
) -> tuple[Pretrained, Adapted]:
    """Load the base of an adapted run, and put a checkpoint of the run into it; all in the base's type, save for W_D and lambda.

    Args:
        run_dir: the run folder.
        checkpoint: a folder of its ``checkpoints``.
        job: its saved config. ``trust_remote_code`` in it is ignored: somebody else may have written it.
        device: where the model goes.
        dtype: of the base.
        trust_remote_code: run Python code that comes with the base.

    Raises:
        UserError: the base is not there any more, or it is not what it was, or it needs code that may not be run.
    """
    base = load_pretrained("base", job.base, dtype, device, job.revision, trust_remote_code)
    _same_base(base, run_dir)
    layers = find_layers(base.model, {"input_ids": torch.tensor([[0, 1]], device=device)})
    plan = load_plan(run_dir / "heads.json", base.fingerprint, layers)
    adapted = attach(base.model, layers, job.dex, plan.heads, int(job.dex.anneal_steps or 0), job.seed)
    prefix = "model."  # of ForTraining
    shapes = {prefix + name: parameter.shape for name, parameter in adapted.trained().items()}
    weights = read_tensors(checkpoint / WEIGHTS, shapes)
    step = int(checkpoint.name.removeprefix("step_"))
    adapted.load({name.removeprefix(prefix): weights[name] for name in shapes}, step, base.dtype)
    return base, adapted


def _base_dtype(job: AdaptJob, world: World) -> torch.dtype | str:
    """Frozen weights keep their own type under bf16 autocast; without it everything is computed in fp32."""
    return "auto" if precision_of(world.device, job.train.precision) is Precision.bf16 else torch.float32


def _same_base(base: Pretrained, run_dir: Path | None) -> None:
    path = run_dir / "base.json" if run_dir else None
    if path and path.exists():  # a run that was killed before it wrote it starts again
        known = read_json(path, {"fingerprint": str})
        if known["fingerprint"] != base.fingerprint:
            raise UserError(f"base={base.name} cannot be used: {run_dir} was adapted from other weights ({known['fingerprint'][:12]})")


def _enough_context(job: AdaptJob, base: Pretrained) -> None:
    if base.limit is not None and job.train.seq_len > base.limit:
        raise UserError(f"train.seq_len={job.train.seq_len} cannot be used: {base.name} reads {base.limit} tokens at most")


def _enough_memory(job: AdaptJob, adapted: Adapted, world: World) -> None:
    """Refuse what cannot fit: gradients and AdamW's moments of what is trained, and the logits of one micro-batch, beside the weights."""
    trained = sum(parameter.numel() for parameter in adapted.trained().values())
    entries = projection_weight(adapted.model.get_input_embeddings()).shape[0]
    rows = job.train.micro_batch_size or int(job.train.batch_tokens) // job.train.seq_len // world.size
    logits = 3 * 4 * rows * job.train.seq_len * entries  # with their logarithms and their gradient, in fp32
    needed, free = 12 * trained // world.size + logits, free_memory(world.device)
    if needed > free:
        raise UserError(
            f"dex.variant={job.dex.variant.value} cannot be trained here: besides the weights it needs {needed / 2**30:.1f} GiB and more "
            f"({logits / 2**30:.1f} for the logits of {rows} sequences, the rest for gradients and moments) and {free / 2**30:.1f} GiB are "
            "free; lower train.micro_batch_size or train.seq_len, or train less (dex.variant=adapter_only)"
        )


def _plan(job: AdaptJob, base: Pretrained, layers: list[Layer], corpus: Corpus, resumed: Path | None, reporter: Reporter) -> Plan:
    """The heads of a resumed run, those of the heads.json that was named, or those that the calibration text chooses."""
    if resumed and (resumed / "heads.json").exists():
        return load_plan(resumed / "heads.json", base.fingerprint, layers)
    if not job.dex.variant.branches:
        return Plan(base.fingerprint, "none", {}, [layer.num_heads for layer in layers], [], [[] for _ in layers])
    if job.dex.heads not in CRITERIA:
        plan = load_plan(Path(job.dex.heads), base.fingerprint, layers)
        if not any(plan.heads):
            raise UserError(f"dex.heads={job.dex.heads} cannot be used: it chooses no heads; give that of a run with a branch")
        return plan
    reporter.line(f"choosing heads by {job.dex.heads}")
    length = min(job.train.seq_len, base.limit or job.train.seq_len)
    rows = min(-(-int(job.dex.calibration_tokens) // length), len(corpus.train) // length)
    if rows < 1:
        raise UserError(f"train.seq_len={length} cannot be used: the training text has {len(corpus.train)} tokens")
    tokens = torch.from_numpy(corpus.train.read(0, rows * length)[0].astype("int64")).view(rows, length).to(base.model.device)
    return choose_heads(base.model, layers, job.dex, tokens.split(1), base.fingerprint, job.seed, corpus.info["sha256"])


def _blocks(adapted: Adapted) -> nn.ModuleList:
    layers = adapted.model.config.get_text_config().num_hidden_layers
    return next(module for module in adapted.model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)


def _save_adapter(job: AdaptJob, folder: Path, checkpoint: Path, summary: dict[str, Any]) -> None:
    """Write adapter/: ``branch.safetensors``, ``tuned.safetensors`` (what else was trained), ``adapter.json`` and a model card."""
    weights = load_file(checkpoint / WEIGHTS)
    trained = {name.removeprefix("model."): value for name, value in weights.items()}
    settings = {key: getattr(value, "value", value) for key, value in dataclasses.asdict(job.dex).items()}
    described = {
        "dex": settings | {"heads": Path(job.dex.heads).name},  # without the folder of a heads.json
        "base": read_json(folder / "base.json"),
        "heads": read_json(folder / "heads.json", {"heads": list})["heads"],
        "step": int(checkpoint.name.removeprefix("step_")),
    }
    with replacing_folder(folder / ADAPTER) as temporary:
        for file in (BRANCH, TUNED):
            if part := {name: value for name, value in trained.items() if file_of(name) == file}:
                save_file(part, temporary / file)
        write_json(temporary / DESCRIPTION, described)
        base, name = summary["base"], summary["name"]
        usage = adapter_usage(base)
        card = training_card(job, name, summary["step"], summary, usage, base=base)
        card.save(temporary / CARD)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)  # of a run that was finished before and went on


def _summary(job: AdaptJob, base: Pretrained, folder: Path, result: Fit, counts: dict[str, int], watch: Watch) -> dict[str, Any]:
    now = result.progress
    first = read_json_lines(folder / "metrics.jsonl")[0]
    return {
        "name": run_name(job),
        "kind": job.dex.variant.value,
        "base": base.name,
        "seed": job.seed,
        "step": now.step,
        "tokens": now.tokens,
        "base/val/loss": first["val/loss"],
        **result.validation,
        "best/val/loss": now.best_loss,
        "best/step": now.best_step,
        "branch": watch.verdict() if job.dex.variant.branches else None,
        "parameters": counts,
        "seconds": round(now.seconds, 1),
        "tokens_per_second": result.tokens_per_second,
        "checkpoint": str(result.checkpoint),
        "adapter": str(folder / ADAPTER),
        "finished": True,
    }


def _report(summary: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    before, after = summary["base/val/loss"], summary["val/loss"]
    rows = [
        ["held-out loss of the base, nats a token", f"{before:.4f}"],
        ["held-out loss at the end", f"{after:.4f} ({after - before:+.4f})"],
        ["best", f"{summary['best/val/loss']:.4f} at step {summary['best/step']}"],
        ["trained parameters", f"{summary['parameters']['trained']:,} of {summary['parameters']['total']:,}"],
        ["training tokens", f"{summary['tokens']:,}"],
        ["time", duration(summary["seconds"])],
        ["tokens a second", f"{summary['tokens_per_second']:,.0f}"],
        ["adapter", summary["adapter"]],
    ]
    reporter.table(make_table(f"{summary['kind']} on {summary['base']}", ["", ""], rows))
    if summary["branch"]:
        reporter.line(summary["branch"])
    reporter.line(f"run folder: {folder}")
