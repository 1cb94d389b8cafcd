"""``diffx quantize``: a suite on one checkpoint at several widths, each an evaluation of its own that resumes like any other."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffx.config.eval import EvalJob
from diffx.config.quantize import EXACT, Activations, AttentionLogits, LogitScope, QuantizeJob, StateScope
from diffx.evaluation.model import LanguageModel
from diffx.evaluation.run import Change, measure
from diffx.hub.attention import decoder_blocks, quantizing_logits
from diffx.loading import load
from diffx.ops import QuantizedLogits, absmax_quantize


def quantize(job: QuantizeJob) -> dict[int, Path]:
    """Measure the model at each width, the widest first, and return the folder of results of each.

    Raises:
        UserError: the checkpoint, the method or the suite cannot be used as they are.
        RunError: something outside failed; the same command goes on.
    """
    loaded = load(job.checkpoint, job.device, job.dtype, job.revision, job.trust_remote_code)
    keys = {key.name: getattr(job, key.name) for key in fields(EvalJob)} | {"kind": "eval"}
    found = {}
    for bits in sorted({EXACT, *job.bits}, reverse=True):
        change = None if bits == EXACT else change_of(job, bits)
        caches = change is None or change.caches
        lm = LanguageModel(loaded, caches)
        found[bits] = measure(EvalJob(**keys | ({} if caches else {"batch": 1})), lm, change, table=False)
    return found


def change_of(job: QuantizeJob, bits: int) -> Change:
    """What the job's method does to a model at ``bits`` bits."""
    method: Any = job.method
    settings = {"bits": bits, **{key: getattr(value, "value", value) for key, value in asdict(method).items()}}
    name = f"{method.kind}-{bits}bit"
    if isinstance(method, AttentionLogits):
        logits = QuantizedLogits(bits, method.scope.value)
        return Change(name, settings, lambda model: quantizing_logits(model, logits), caches=method.scope is LogitScope.row)
    assert isinstance(method, Activations)
    return Change(name, settings, lambda model: quantizing_states(model, bits, method.scope), caches=method.scope is StateScope.token)


@contextmanager
def quantizing_states(model: nn.Module, bits: int, scope: StateScope) -> Iterator[None]:
    """Let a model quantize the hidden states (B, T, D) that leave each of its blocks, for as long as the context lasts."""
    shared = (1, 2) if scope is StateScope.tensor else (2,)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states: Tensor = output[0] if isinstance(output, tuple) else output
        few = absmax_quantize(states.float(), bits, states.float().abs().amax(shared, keepdim=True)).to(states.dtype)
        return (few, *output[1:]) if isinstance(output, tuple) else few

    with ExitStack() as stack:
        for block in decoder_blocks(model):
            stack.enter_context(block.register_forward_hook(hook))
        yield
