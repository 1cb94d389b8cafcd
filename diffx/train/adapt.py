"""What only a run of ``diffx adapt-dex`` does: a DEX variant in a pretrained model; see run.py.

The folder also holds base.json, heads.json, plots/heads.png and, at the end, adapter/.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffx.config.checks import refuse
from diffx.config.dex import CRITERIA, AdaptJob
from diffx.config.train import Precision
from diffx.console import Reporter, make_table
from diffx.data import Corpus
from diffx.dex.adapters import BRANCH, DESCRIPTION, TUNED, file_of
from diffx.dex.attach import Adapted, attach, parameter_counts
from diffx.dex.heads import Plan, choose_heads, draw_heads, load_plan
from diffx.dex.layer import projection_weight
from diffx.dex.layout import Layer, find_layers
from diffx.dex.pretrained import Pretrained, free_memory, load_pretrained
from diffx.dex.watch import Watch
from diffx.files import read_json, read_json_lines, replacing, replacing_folder, write_json
from diffx.hub.card import CARD, adapter_usage, training_card
from diffx.models.tensors import read_tensors
from diffx.tracking import Tracker
from diffx.train.checkpoint import WEIGHTS
from diffx.train.parallel import World, autocast, precision_of

ADAPTER = "adapter"
_PREFIX = "model."  # of ForTraining's parameters


class ForTraining(nn.Module):
    """A pretrained model that takes tokens and returns logits, as ``fit`` calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Map (B, T) to logits (B, T, V)."""
        return self.model(input_ids=input_ids, use_cache=False).logits


class Adaptation:
    """A DEX variant in a pretrained model; run.py says what calls it."""

    def __init__(
        self, job: AdaptJob, resumed: Path | None, world: World, reporter: Reporter
    ) -> None:
        self._job, self._resumed, self._world, self._reporter = job, resumed, world, reporter
        # Under bf16 autocast frozen weights keep their type; otherwise everything is fp32.
        bf16 = precision_of(world.device, job.train.precision) is Precision.bf16
        dtype = "auto" if bf16 else torch.float32
        trusted = job.trust_remote_code
        self._base, self._layers = _load_base(job, resumed, world.device, dtype, trusted)
        length = job.train.seq_len
        limit = self._base.limit or length
        why = f"{self._base.name} reads {limit} tokens at most"
        refuse(length > limit, f"train.seq_len={length}", why)
        self.tokenizer = self._base.tokenizer

    def build(self, corpus: Corpus, initial: bool) -> None:
        """Choose heads and attach the variant; ``initial`` changes nothing.

        Raises:
            UserError: the text has another tokenizer, the heads cannot be used, or the memory of
                the device is too small.
        """
        job, base = self._job, self._base
        other = corpus.tokenizer.fingerprint != base.tokenizer.fingerprint
        remedy = f"prepare it with tokenizer=hf tokenizer.name={job.base}, or give text"
        why = f"its tokens come from another tokenizer; {remedy}"
        refuse(other, f"data={job.data.kind}", why, f"base={job.base}")
        # Rounding can differ between processes, so the main process decides.
        plan = json.dumps(dataclasses.asdict(self._choose_heads(corpus)))
        self._plan = Plan(**json.loads(self._world.share(plan)))
        adapted = _attach(base, self._layers, job, self._plan)
        self._check_memory(adapted)
        self._corpus, self._adapted, self._watch = corpus, adapted, Watch(adapted)
        self.model = ForTraining(adapted.model)
        num_layers = adapted.model.config.get_text_config().num_hidden_layers
        lists = [module for module in adapted.model.modules() if isinstance(module, nn.ModuleList)]
        self.blocks = next(blocks for blocks in lists if len(blocks) == num_layers)
        self.parameters = parameter_counts(adapted)
        # Forward and gradients of activations for all weights; gradients of trained weights.
        self.flops_per_token = 4.0 * self.parameters["rest"] + 2.0 * self.parameters["trained"]
        self.probe, self.on_step = self._watch, self._watch.set_step

    def write_start(self, folder: Path) -> None:
        """Write base.json, heads.json and plots/heads.png."""
        job, base = self._job, self._base
        origin = {"name": base.name, "revision": job.revision, "fingerprint": base.fingerprint}
        write_json(folder / "base.json", origin)
        self._plan.save(folder / "heads.json")
        (folder / "plots").mkdir(exist_ok=True)
        if job.dex.variant.branches:
            with replacing(folder / "plots" / "heads.png", ".png") as temporary:
                draw_heads(self._plan, temporary)

    def describe(self) -> dict[str, float]:
        """Print the parameter counts."""
        rows = [[name, f"{number:,}"] for name, number in self.parameters.items()]
        title = f"Parameters: {self._job.dex.variant.value} on {self._base.name}"
        self._reporter.table(make_table(title, ["", ""], rows))
        return {}

    def on_validation(self, step: int, track: Tracker) -> None:
        """Do nothing."""

    def finish(self, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
        """Measure the branch on held-out text; the main process writes adapter/."""
        job, world = self._job, self._world
        self._adapted.set_step(summary["step"])
        batches = self._corpus.val_batches(job.train.seq_len, world.size, world.rank, world.size)
        held_out = next(iter(batches)).inputs.to(world.device)
        with autocast(world.device, job.train.precision):
            self._watch(lambda: self.model(held_out))  # for the verdict
        if not world.main:
            return {}
        entries = {
            "base": self._base.name,
            "base/val/loss": read_json_lines(folder / "metrics.jsonl")[0]["val/loss"],
            "branch": self._watch.verdict() if job.dex.variant.branches else None,
            "adapter": str(folder / ADAPTER),
        }
        self._save_adapter(folder, summary | entries)
        return entries

    def report(self, summary: dict[str, Any]) -> None:
        """Print the held-out loss before and after, and the verdict on the branch."""
        before, after = summary["base/val/loss"], summary["val/loss"]
        rows = [
            ["held-out loss of the base, nats a token", f"{before:.4f}"],
            ["held-out loss at the end", f"{after:.4f} ({after - before:+.4f})"],
            ["adapter", summary["adapter"]],
        ]
        title = f"{summary['kind']} on {summary['base']}"
        self._reporter.table(make_table(title, ["", ""], rows))
        if summary["branch"]:
            self._reporter.line(summary["branch"])

    def _check_memory(self, adapted: Adapted) -> None:
        """Refuse what cannot fit: gradients, AdamW's moments, and the logits of a micro-batch."""
        job, world, gib = self._job, self._world, 2**30
        trained = sum(parameter.numel() for parameter in adapted.trained().values())
        entries = projection_weight(adapted.model.get_input_embeddings()).shape[0]
        rows = int(job.train.batch_tokens) // job.train.seq_len // world.size
        rows = job.train.micro_batch_size or rows
        logits = 3 * 4 * rows * job.train.seq_len * entries  # logits, logarithms, gradient: fp32
        needed, free = 12 * trained // world.size + logits, free_memory(world.device)
        why = (
            f"besides the weights it needs {needed / gib:.1f} GiB and more ({logits / gib:.1f} for "
            f"the logits of {rows} sequences, the rest for gradients and moments) and "
            f"{free / gib:.1f} GiB are free; lower train.micro_batch_size or train.seq_len, or "
            "train less (dex.variant=adapter_only)"
        )
        refuse(needed > free, f"dex.variant={job.dex.variant.value}", why)

    def _choose_heads(self, corpus: Corpus) -> Plan:
        """Read the heads of the resumed run or of ``dex.heads``, or choose them on the text."""
        job, base, layers = self._job, self._base, self._layers
        if self._resumed and (self._resumed / "heads.json").exists():
            return load_plan(self._resumed / "heads.json", base.fingerprint, layers)
        if not job.dex.variant.branches:
            num_heads = [layer.num_heads for layer in layers]
            return Plan(base.fingerprint, "none", {}, num_heads, [], [[] for _ in layers])
        if job.dex.heads not in CRITERIA:
            plan = load_plan(Path(job.dex.heads), base.fingerprint, layers)
            why = "it chooses no heads; give that of a run with a branch"
            refuse(not any(plan.heads), f"dex.heads={job.dex.heads}", why)
            return plan
        length, available = job.train.seq_len, len(corpus.train)
        rows = min(-(-int(job.dex.calibration_tokens) // length), available // length)
        why = f"the training text has {available} tokens"
        refuse(rows < 1, f"train.seq_len={length}", why)
        text = torch.from_numpy(corpus.train.read(0, rows * length)[0].astype("int64"))
        batches = text.view(rows, length).to(base.model.device).split(1)  # (1, T) each
        name = f"choosing heads by {job.dex.heads}"
        with self._reporter.progress(name, rows, unit="texts") as bar:
            args = (base.fingerprint, job.seed, corpus.info["sha256"], bar.at)
            return choose_heads(base.model, layers, job.dex, batches, *args)

    def _save_adapter(self, folder: Path, summary: dict[str, Any]) -> None:
        """Write adapter/: the weights in one or two files, adapter.json and a model card."""
        weights = load_file(Path(summary["checkpoint"]) / WEIGHTS)
        trained = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
        dex = dataclasses.asdict(self._job.dex)
        settings = {key: getattr(value, "value", value) for key, value in dex.items()}
        described = {
            # Without the folder of a heads.json.
            "dex": settings | {"heads": Path(self._job.dex.heads).name},
            "base": read_json(folder / "base.json"),
            "heads": self._plan.heads,
            "step": summary["step"],
        }
        base, name, step = self._base.name, summary["name"], summary["step"]
        card = training_card(self._job, name, step, summary, adapter_usage(base), base=base)
        with replacing_folder(folder / ADAPTER) as temporary:
            for file in (BRANCH, TUNED):
                if part := {key: value for key, value in trained.items() if file_of(key) == file}:
                    save_file(part, temporary / file)
            write_json(temporary / DESCRIPTION, described)
            card.save(temporary / CARD)
            # A finished run that was resumed has one already.
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)


def restore(
    run_dir: Path,
    checkpoint: Path,
    job: AdaptJob,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
) -> tuple[Pretrained, Adapted]:
    """Load the base of an adapted run, and put a checkpoint of the run into it.

    All weights have the base's type, except W_D and lambda. The saved job cannot allow code of the
    base, since another person may have written it.

    Raises:
        UserError: the base is missing, has changed, or needs code that may not be run.
    """
    base, layers = _load_base(job, run_dir, device, dtype, trust_remote_code)
    plan = load_plan(run_dir / "heads.json", base.fingerprint, layers)
    adapted = _attach(base, layers, job, plan)
    shapes = {_PREFIX + name: parameter.shape for name, parameter in adapted.trained().items()}
    weights = read_tensors(checkpoint / WEIGHTS, shapes)
    step = int(checkpoint.name.removeprefix("step_"))
    adapted.load({name.removeprefix(_PREFIX): weights[name] for name in shapes}, step, base.dtype)
    return base, adapted


def _load_base(
    job: AdaptJob,
    run_dir: Path | None,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> tuple[Pretrained, list[Layer]]:
    """Load the base of a job, which must be that of the run if there is one."""
    base = load_pretrained("base", job.base, dtype, device, job.revision, trust_remote_code)
    path = run_dir / "base.json" if run_dir else None
    if path and path.exists():  # a run that was killed before it wrote it starts again
        fingerprint = read_json(path, {"fingerprint": str})["fingerprint"]
        why = f"{run_dir} was adapted from other weights ({fingerprint[:12]})"
        refuse(fingerprint != base.fingerprint, f"base={base.name}", why)
    tokens = torch.tensor([[0, 1]], device=device)
    return base, find_layers(base.model, {"input_ids": tokens})


def _attach(base: Pretrained, layers: list[Layer], job: AdaptJob, plan: Plan) -> Adapted:
    steps = int(job.dex.anneal_steps or 0)
    return attach(base.model, layers, job.dex, plan.heads, steps, job.seed)
