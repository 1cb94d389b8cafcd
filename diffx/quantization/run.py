"""``diffx quantize``: a suite on one checkpoint at several widths in bits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffx.config import quantize as config
from diffx.config.eval import EvalJob
from diffx.config.quantize import EXACT, LogitScope, QuantizeJob, StateScope
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.run import Change, measure
from diffx.hub.attention import decoder_blocks, quantizing_logits
from diffx.loading import load
from diffx.ops import QuantizedLogits, absmax_quantize
from diffx.quantization.weights import check_weights, quantize_weights


def quantize(job: QuantizeJob) -> dict[int, Path]:
    """Evaluate the model at each width, the widest first; return the folder of results by width.

    Raises:
        UserError: the checkpoint, the method or the suite cannot be used.
        RunError: a file or a service failed; the same command resumes.
    """
    loaded = load(job.checkpoint, job.device, job.dtype, job.revision, job.trust_remote_code)
    keys = {key.name: getattr(job, key.name) for key in fields(EvalJob)} | {"kind": "eval"}
    skipped = check_weights(job, loaded) if isinstance(job.method, config.Weights) else []
    folders = {}
    for bits in sorted({EXACT, *job.bits}, reverse=True):
        model, change, changed = loaded, None, {}
        if bits != EXACT and isinstance(job.method, config.Weights):
            model, change = quantize_weights(job, loaded, bits, skipped)
            changed["checkpoint"] = model.model.name_or_path
        elif bits != EXACT:
            change = _simulated(job.method, bits)
        caches = change is None or change.caches
        if not caches:
            changed["batch"] = 1
        evaluation = EvalJob(**keys | changed)
        folders[bits] = measure(evaluation, LanguageModel(model, caches), change, table=False)
    return folders


def _simulated(method: Any, bits: int) -> Change:
    apply: Any = partial(quantizing_states, bits=bits, scope=method.scope)
    if isinstance(method, config.AttentionLogits):
        apply = partial(quantizing_logits, quantized=QuantizedLogits(bits, method.scope.value))
    caches = method.scope in (LogitScope.row, StateScope.token)
    name = f"{method.kind}-{bits}bit"
    return Change(name, config.change_settings(method, bits), apply, caches=caches)


@contextmanager
def quantizing_states(model: nn.Module, bits: int, scope: StateScope) -> Iterator[None]:
    """Quantize the outputs (B, T, D) of the blocks of a model, within the context."""
    shared = (1, 2) if scope is StateScope.tensor else (2,)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        exact = states.to(torch.float32, copy=True)  # other hooks read `states`
        peak = exact.abs().amax(shared, keepdim=True)
        rounded = absmax_quantize(exact, bits, peak).to(states.dtype)
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded

    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.enter_context(block.register_forward_hook(hook))
        yield
