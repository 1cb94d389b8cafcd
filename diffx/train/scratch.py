"""What only a run of ``diffx train`` does: a decoder from initial weights; see run.py."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffx.config.checks import refuse
from diffx.config.train import TrainJob, WandbMode
from diffx.console import Bar, Reporter, figure, make_table
from diffx.data import Corpus, load_tokenizer
from diffx.data.ngram import baselines
from diffx.dex.layout import evaluating
from diffx.dex.pretrained import free_memory
from diffx.models import build_model, generate, init_weights
from diffx.models.attention import attention_modules
from diffx.models.tensors import read_tensors
from diffx.tracking import Tracker
from diffx.train.checkpoint import WEIGHTS, find_checkpoint, trained_shapes
from diffx.train.parallel import World
from diffx.train.params import check_memory, counts_table


class Scratch:
    """A decoder with random weights, or those of ``train.init_from``; run.py says what calls it."""

    def __init__(
        self,
        job: TrainJob,
        overrides: list[str],
        resumed: Path | None,
        world: World,
        reporter: Reporter,
    ) -> None:
        check_memory(job, world.size, free_memory(world.device))
        self._job, self._world, self._reporter = job, world, reporter
        self._tokenizer_given = any(word.startswith("tokenizer") for word in overrides)
        # A resumed run keeps its tokenizer: a newly trained one could differ.
        saved = resumed / "tokenizer" if resumed else None
        self.tokenizer = load_tokenizer(saved) if saved and saved.is_dir() else job.tokenizer

    def build(self, corpus: Corpus, initial: bool) -> None:
        """Build the model on its device; load ``train.init_from`` if ``initial``.

        Raises:
            UserError: the vocabulary, the tokenizer or the weights cannot be used.
        """
        job, tokenizer = self._job, corpus.tokenizer
        has_tokenizer = job.data.kind in ("shards", "recall")
        other = has_tokenizer and tokenizer.kind != job.tokenizer.kind
        why = f"these hold {tokenizer.kind} tokens; leave it out"
        given = f"tokenizer={job.tokenizer.kind}"
        refuse(other and self._tokenizer_given, given, why, f"data={job.data.kind}")
        size = job.model.vocab_size or tokenizer.vocab_size
        why = f"the tokenizer has {tokenizer.vocab_size} entries; leave it null, or give more"
        refuse(size < tokenizer.vocab_size, f"model.vocab_size={size}", why)
        self.model = build_model(dataclasses.replace(job.model, vocab_size=size))
        init_weights(self.model, job.seed)
        if initial and job.train.init_from is not None:
            source, folder = find_checkpoint(job.train.init_from, "train.init_from")
            other = load_tokenizer(source / "tokenizer").fingerprint != tokenizer.fingerprint
            why, start = "its tokens come from another tokenizer", job.train.init_from
            refuse(other, f"data={job.data.kind}", why, f"train.init_from={start}")
            shapes = trained_shapes(self.model)
            self.model.load_state_dict(read_tensors(folder / WEIGHTS, shapes))
        self._corpus, self.blocks = corpus, self.model.layers
        self.model.to(self._world.device)
        self.parameters = self.model.num_parameters()
        self.flops_per_token = self.model.flops_per_token(job.train.seq_len)

    def write_start(self, folder: Path) -> None:
        """Write nothing."""

    def describe(self) -> dict[str, float]:
        """Print parameter counts and the n-gram baselines, which the main process measures."""
        self._reporter.table(counts_table(self.model.config))
        self._baselines: dict[str, dict[str, float]] = {}
        if self._world.main:
            with self._reporter.progress("n-gram baselines", None, unit="MB") as bar:
                self._baselines = baselines(self._corpus, progress=partial(show_read, bar))
        constants: dict[str, float] = {}
        for name, losses in self._baselines.items():
            values = ", ".join(f"{value:.4f} {unit}" for unit, value in losses.items())
            self._reporter.line(f"{name}: {values}")
            constants |= {f"baselines/{name}/{unit}": value for unit, value in losses.items()}
        return constants

    def on_step(self, step: int) -> None:
        """Do nothing."""

    @torch.no_grad()
    def probe(self, forward: Callable[[], object]) -> dict[str, float]:
        """Return statistics of each layer's attention.

        ``diff/lambda/<layer>`` is the mean lambda over heads (and tokens), absent for a layer
        without; ``attention/context_rms/<layer>`` is the root mean square of the weighted values,
        after the subtraction and before any norm.
        """
        values: dict[str, torch.Tensor] = {}

        def read_lambda(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            lam = module.lambda_value(args[0])  # sharded parameters are whole in the forward pass
            if lam is not None:
                values[f"diff/lambda/{module.layer:02d}"] = lam.float().mean()

        def read_context(layer: int, module: Any, args: tuple[torch.Tensor, ...]) -> None:
            values[f"attention/context_rms/{layer:02d}"] = args[0].float().pow(2).mean().sqrt()

        with ExitStack() as stack:
            for attention in attention_modules(self.model):
                context = attention.get_submodule(attention.context_module)
                read = partial(read_context, attention.layer)
                stack.callback(attention.register_forward_pre_hook(read_lambda).remove)
                stack.callback(context.register_forward_pre_hook(read).remove)
            stack.enter_context(evaluating(self.model))
            # Hooks would break compiled blocks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            forward()
        names = sorted(values)
        # Device sync: one for all layers.
        means = torch.stack([values[name] for name in names]).tolist()
        return dict(zip(names, means, strict=True))

    def on_validation(self, step: int, track: Tracker) -> None:
        """Send a sample to the tracker."""
        if self._job.wandb.mode is not WandbMode.disabled:
            with torch.compiler.set_stance("force_eager"):
                sample = self._sample()
            track.samples(step, [(self._job.train.sample_prompt, sample)] if sample else [])

    def finish(self, folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
        """Return the baselines and a sample."""
        return {"baselines": self._baselines, "sample": self._sample()}

    def report(self, summary: dict[str, Any]) -> None:
        """Print the sample, and the held-out loss beside the baselines."""
        if summary["sample"]:
            self._reporter.line("\nsampled continuation:\n" + summary["sample"] + "\n")
        losses = {summary["kind"]: {"nats": summary["val/loss"], "bpb": summary["val/bpb"]}}
        rows = [
            [name, f"{loss['nats']:.4f}" if "nats" in loss else "-", f"{loss['bpb']:.4f}"]
            for name, loss in (losses | summary["baselines"]).items()
        ]
        columns = ["model", "nats a token", "bits per byte"]
        self._reporter.table(make_table("Held-out loss", columns, rows))

    def _sample(self) -> str:
        """Sample a continuation of ``train.sample_prompt``, in all processes if sharded."""
        job, tokenizer = self._job, self._corpus.tokenizer
        if not job.train.sample_tokens:
            return ""
        prompt = [tokenizer.eot_id, *tokenizer.encode(job.train.sample_prompt)]
        sampled = generate(
            self.model,
            torch.tensor([prompt], device=self._world.device),
            max_tokens=job.train.sample_tokens,
            temperature=0.8,
            top_p=0.95,
            seed=job.seed,
            eot_id=tokenizer.eot_id,
        )
        return tokenizer.decode(list(sampled))


def show_read(bar: Bar, stage: str, done: int, total: int | None) -> None:
    """Show the bytes of a corpus that were read in a progress bar of megabytes."""
    bar.at(done // 10**6, stage + (f" of {figure(total)} bytes" if total else ""))
