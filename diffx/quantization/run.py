"""``diffx quantize``: a suite on one checkpoint at several widths, each an evaluation of its own that resumes like any other."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffx.config.eval import EvalJob
from diffx.config.quantize import EXACT, AttentionLogits, LogitScope, QuantizeJob, StateScope, Weights, change_settings
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.run import Change, measure
from diffx.hub.attention import decoder_blocks, quantizing_logits
from diffx.loading import Loaded, load
from diffx.ops import QuantizedLogits, absmax_quantize
from diffx.quantization.weights import check_weights, quantize_weights


def quantize(job: QuantizeJob) -> dict[int, Path]:
    """Measure the model at each width, the widest first, and return the folder of results of each.

    Raises:
        UserError: the checkpoint, the method or the suite cannot be used as they are.
        RunError: something outside failed; the same command goes on.
    """
    loaded = load(job.checkpoint, job.device, job.dtype, job.revision, job.trust_remote_code)
    keys = {key.name: getattr(job, key.name) for key in fields(EvalJob)} | {"kind": "eval"}
    left = check_weights(job, loaded) if isinstance(job.method, Weights) else []
    found = {}
    for bits in sorted({EXACT, *job.bits}, reverse=True):
        few, change = (loaded, None) if bits == EXACT else _quantized(job, loaded, bits, left)
        caches = change is None or change.caches
        own = {} if caches else {"batch": 1}
        if few is not loaded:
            own["checkpoint"] = few.model.name_or_path
        found[bits] = measure(EvalJob(**keys | own), LanguageModel(few, caches), change, table=False)
    return found


def _quantized(job: QuantizeJob, loaded: Loaded, bits: int, left: list[str]) -> tuple[Loaded, Change]:
    """The model to measure at ``bits`` bits, and what the job's method does to it; of its layers ``left`` stay as they are."""
    method: Any = job.method
    if isinstance(method, Weights):
        return quantize_weights(job, loaded, bits, left)
    settings = change_settings(method, bits)
    name = f"{method.kind}-{bits}bit"
    if isinstance(method, AttentionLogits):
        logits = QuantizedLogits(bits, method.scope.value)
        return loaded, Change(name, settings, lambda model: quantizing_logits(model, logits), caches=method.scope is LogitScope.row)
    return loaded, Change(
        name, settings, lambda model: quantizing_states(model, bits, method.scope), caches=method.scope is StateScope.token
    )


@contextmanager
def quantizing_states(model: nn.Module, bits: int, scope: StateScope) -> Iterator[None]:
    """Let a model quantize the hidden states (B, T, D) that leave each of its blocks, for as long as the context lasts."""
    shared = (1, 2) if scope is StateScope.tensor else (2,)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        exact = states.to(torch.float32, copy=True)  # what others may look at stays as it is
        few = absmax_quantize(exact, bits, exact.abs().amax(shared, keepdim=True)).to(states.dtype)
        return (few, *output[1:]) if isinstance(output, tuple) else few

    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.enter_context(block.register_forward_hook(hook))
        yield
