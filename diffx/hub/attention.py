"""Observe and replace attention: by hooks of a ``Decoder``, by the interface of ``transformers``.

Notation: B batch, T tokens, D model width, M query maps, G key maps.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

from diffx.config import UserError
from diffx.models import Decoder
from diffx.models.attention import Attention, attention_modules
from diffx.models.view import AttentionView
from diffx.ops import QuantizedLogits

_NAME = "diffx"  # of `_attend` among the attention functions of transformers
_ATTEND = "_diffx_attend"  # the attribute of a module that holds the function of `attending_with`
_ROWS = 256  # query rows of a map that are computed at once
# Keywords of attention functions without effect here, since queries and keys are rotated and the
# mask holds the window. Any other may change the attention, as sinks and biases do: an error.
_HARMLESS = {
    *("sliding_window", "position_ids", "cache", "past_key_values", "cache_position", "use_cache"),
    *("output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch"),
    *("logits_to_keep", "layer_idx", "scaling", "is_causal"),
}
_HARMLESS_IF_OFF = {"dropout", "output_attentions"}
# The name of the cache; renamed in transformers 5.24.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def cache_keyword(model: nn.Module) -> str:
    """The name by which a model of ``transformers`` takes and returns its cache."""
    names = inspect.signature(model.forward).parameters
    return "past_key_values" if CACHE not in names and "past_key_values" in names else CACHE


@contextmanager
def observing(
    model: nn.Module,
    attention: Callable[[int, AttentionView], None] | None = None,
    hidden: Callable[[int, Tensor], None] | None = None,
) -> Iterator[None]:
    """Call back in forward passes without a cache, within the context.

    ``attention`` is called with each layer, from 0, and its queries and keys, ``hidden`` with the
    layer and its output (B, T, D), the residual stream included.

    Raises:
        UserError: ``attention`` is given, and the attention of the model cannot be observed.
    """
    with ExitStack() as stack:
        for layer, block in enumerate(decoder_blocks(model) if hidden else ()):
            hook = partial(_give_hidden, hidden, layer)
            stack.enter_context(block.register_forward_hook(hook))
        if attention:
            modules = attention_modules(model)
            for module in modules:
                hook = partial(_give_view, attention)
                stack.enter_context(module.register_forward_pre_hook(hook))
            if not modules:
                stack.enter_context(attending_with(model, _observing(model, attention)))
        yield


def _give_hidden(callback: Any, layer: int, _: nn.Module, args: Any, output: Any) -> None:
    callback(layer, output[0] if isinstance(output, tuple) else output)


def _give_view(callback: Any, module: Attention, args: tuple[Any, ...]) -> None:
    callback(module.layer, module.view(*args[:3]))


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a decoder; in another model the outermost list as long as it has layers.

    Raises:
        UserError: the model has no such list.
    """
    decoder = getattr(model, "decoder", model)
    if isinstance(decoder, Decoder):
        return decoder.layers
    if isinstance(model, PreTrainedModel):
        layers = model.config.get_text_config().num_hidden_layers
        for module in model.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                return module
    raise _unsupported(model, "has no list of decoder blocks")


def _unsupported(model: nn.Module, why: str) -> UserError:
    name, kind = getattr(model, "name_or_path", ""), type(model).__name__
    accepted = "the suite needs a run, or a causal model with transformers' AttentionInterface"
    return UserError(f"checkpoint={name or kind} cannot be used: {kind} {why}; {accepted}")


def _observing(model: nn.Module, callback: Callable[..., None]) -> Callable[..., Any]:
    """An attention function that gives ``callback`` a view of each layer and computes by SDPA."""
    second_call = False  # DiffLlama attends twice with the same maps, to halves of the values

    def attend(module: Any, *tensors: Any, **options: Any) -> Any:
        nonlocal second_call
        q, k, v, causal = _read(model, module, tensors, options, "softcap")
        maps, scale = q.shape[2], options.get("scaling")
        order, lam = list(range(maps)), None
        if isinstance(module, DiffLlamaAttention):  # its head j pairs maps j and j + M/2
            order = [m // 2 + m % 2 * (maps // 2) for m in range(maps)]
            lam = _diffllama_lambda(module)
        view = AttentionView(
            q=q if lam is None else q[:, :, order],
            k=k,
            key_map=[m // (maps // k.shape[2]) for m in order],
            scale=q.shape[3] ** -0.5 if scale is None else scale,
            lam=lam,
            mask=tensors[3],
            softcap=options.get("softcap"),
            causal=causal,
        )
        if not second_call:
            callback(module.layer_idx, view)
        second_call = lam is not None and not second_call
        if view.softcap is not None:  # which SDPA does not have
            return _weigh(view, v), None
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **options)

    return attend


@contextmanager
def attending_with(model: nn.Module, attend: Callable[..., Any]) -> Iterator[None]:
    """Let one model attend by ``attend(module, query, key, value, mask, **options)``.

    Raises:
        UserError: the model does not use that interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise _unsupported(model, "is not a model of transformers")
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, _ATTEND, getattr(module, _ATTEND, None))
            setattr(module, _ATTEND, attend)
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise _unsupported(model, "does not follow transformers' AttentionInterface")
        yield


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Attend with the module's function; with SDPA in another model that shares the config."""
    attend = getattr(module, _ATTEND, None) or ALL_ATTENTION_FUNCTIONS["sdpa"]
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])


@contextmanager
def quantizing_logits(model: nn.Module, quantized: QuantizedLogits) -> Iterator[None]:
    """Quantize the attention logits of one model, a ``Decoder`` or one of ``transformers``.

    Raises:
        UserError: the model has another attention than queries, keys and a mask.
    """

    def attend(module: Any, *tensors: Any, **options: Any) -> Any:
        q, k, v, causal = _read(model, module, tensors, options)
        sets = 2 if isinstance(module, DiffLlamaAttention) else 1  # all A1 are before all A2
        scale = options.get("scaling")
        return quantized.attention(q, k, v, causal, scale, mask=tensors[3], sets=sets), None

    with ExitStack() as stack:
        modules = attention_modules(model)
        if not modules:
            stack.enter_context(attending_with(model, attend))
        for module in modules:
            stack.callback(setattr, module, "implementation", module.implementation)
            module.implementation = quantized
        yield


def _read(
    model: nn.Module, module: Any, tensors: tuple[Any, ...], options: dict[str, Any], *handled: str
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Queries, keys and values (B, T, M or G, width), and whether they are causal without a mask.

    Raises:
        UserError: the attention is more than these and a boolean mask.
    """
    *qkv, mask = tensors
    extra = [
        name
        for name, value in options.items()
        if value is not None and name not in {*_HARMLESS, *handled}
        if name not in _HARMLESS_IF_OFF or value
    ]
    if extra or (mask is not None and mask.dtype != torch.bool):
        raise _unsupported(model, f"adds {extra[0] if extra else 'a bias'} to its attention")
    causal = options.get("is_causal")
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return q, k, v, bool(getattr(module, "is_causal", True) if causal is None else causal)


def _diffllama_lambda(module: DiffLlamaAttention) -> Tensor:
    first, second = (
        (q * k).sum(-1, dtype=torch.float32).exp()
        for q, k in ((module.lambda_q1, module.lambda_k1), (module.lambda_q2, module.lambda_k2))
    )
    return first - second + module.lambda_init


def _weigh(view: AttentionView, values: Tensor) -> Tensor:
    """The output (B, T, M, width) of ordinary maps, given values (B, T, G, width)."""
    out = values.new_empty(*view.q.shape[:3], values.shape[3])
    for (m, key), start in product(enumerate(view.key_map), range(0, out.shape[1], _ROWS)):
        stop = min(start + _ROWS, out.shape[1])
        weights = view.head_map(m, start, stop).to(values.dtype)
        out[:, start:stop, m] = weights @ values[:, :, key]
    return out
