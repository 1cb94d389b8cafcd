"""What a model attends to, layer by layer, for any decoder: ours by hooks, transformers' through its attention interface.

Notation: B batch, T tokens, D model width, M query maps, G key maps.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
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
_ROWS = 256  # query rows of a map that are formed at once
# Keywords of transformers' attention functions that change nothing here: queries and keys are rotated already, and the mask holds the
# window. Those of _HANDLED are followed. Any other keyword may change the attention, as sinks and biases do, and is refused.
_HARMLESS = {"sliding_window", "position_ids", "cache", "past_key_values", "cache_position", "use_cache", "layer_idx"}
_HARMLESS |= {"output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch", "logits_to_keep"}
_HARMLESS_IF_OFF = {"dropout", "output_attentions"}
_HANDLED = {"scaling", "is_causal"}
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"  # "cache" since 5.24


def cache_keyword(model: nn.Module) -> str:
    """The name by which a model of ``transformers`` takes and returns its cache."""
    names = inspect.signature(model.forward).parameters
    return "past_key_values" if CACHE not in names and "past_key_values" in names else CACHE


AttentionCallback = Callable[[int, AttentionView], None]
HiddenCallback = Callable[[int, Tensor], None]


@contextmanager
def observing(model: nn.Module, attention: AttentionCallback | None = None, hidden: HiddenCallback | None = None) -> Iterator[None]:
    """Watch a model's forward passes, without a key/value cache, for as long as the context lasts; then leave it as it was.

    Args:
        model: ours, or a causal model of transformers whose attention follows its attention interface.
        attention: told the layer from 0 and what it attends to, before the layer ends.
        hidden: told the layer from 0 and its output (B, T, D), the residual stream included.

    Raises:
        UserError: attention is asked for, and this model's cannot be seen.
    """
    ours = isinstance(model, Decoder)
    with ExitStack() as stack:
        if hidden is not None:
            for layer, block in enumerate(decoder_blocks(model)):
                stack.enter_context(block.register_forward_hook(_hidden_hook(layer, hidden)))
        if attention is not None and ours:
            for module in attention_modules(model):
                stack.enter_context(module.register_forward_pre_hook(_attention_hook(attention)))
        if attention is not None and not ours:
            stack.enter_context(_interface(model, attention))
        yield


def _hidden_hook(layer: int, tell: HiddenCallback) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tell(layer, output[0] if isinstance(output, tuple) else output)

    return hook


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a decoder: for ``transformers``, its outermost list of as many modules as its config says that it has layers.

    Raises:
        UserError: there is none.
    """
    if isinstance(model, Decoder):
        return model.layers
    if isinstance(model, PreTrainedModel):
        layers = model.config.get_text_config().num_hidden_layers
        for module in model.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == layers:
                return module
    raise _cannot_see(model, "has no list of decoder blocks")


def _cannot_see(model: nn.Module, why: str) -> UserError:
    name = getattr(model, "name_or_path", "") or type(model).__name__
    accepted = "a run, or a causal model of transformers with ordinary attention that follows its AttentionInterface"
    return UserError(f"checkpoint={name} cannot be used: {type(model).__name__} {why}; the suite needs {accepted}")


def _attention_hook(tell: AttentionCallback) -> Callable[..., None]:
    def hook(module: Attention, args: tuple[Any, ...]) -> None:
        tell(module.layer, module.view(*args[:3]))

    return hook


@contextmanager
def _interface(model: nn.Module, tell: AttentionCallback) -> Iterator[None]:
    second_call = False  # DiffLlama's attention is called twice a layer with the same maps, once for each half of the values

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        nonlocal second_call
        _refuse_extras(model, attention_mask, kwargs, _HANDLED | {"softcap"})
        q, k = query.transpose(1, 2), key.transpose(1, 2)  # (B, T, M, d), (B, T, G, d)
        maps, scale = q.shape[2], kwargs.get("scaling")
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
            mask=attention_mask,
            softcap=kwargs.get("softcap"),
            causal=_causal(module, kwargs),
        )
        if not second_call:
            tell(module.layer_idx, view)
        second_call = lam is not None and not second_call
        if view.softcap is None:
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        return _weigh(view, value.transpose(1, 2)), None  # which SDPA cannot do

    if not isinstance(model, PreTrainedModel):
        raise _cannot_see(model, "is no model of transformers")
    with attending_with(model, attend):
        yield


@contextmanager
def attending_with(model: PreTrainedModel, attend: Callable[..., Any]) -> Iterator[None]:
    """Let one model of ``transformers`` attend with another function for as long as the context lasts.

    Args:
        model: the model.
        attend: called as the functions of ``transformers``' attention interface are.

    Raises:
        UserError: the model's attention does not go through that interface.
    """
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, _ATTEND, getattr(module, _ATTEND, None))
            setattr(module, _ATTEND, attend)
        stack.callback(model.set_attn_implementation, model.config._attn_implementation)
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise _cannot_see(model, "does not follow transformers' AttentionInterface")
        yield


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Attend with the module's function; with SDPA in another model, which may share the config that names ``_attend``."""
    return (getattr(module, _ATTEND, None) or ALL_ATTENTION_FUNCTIONS["sdpa"])(module, *args, **kwargs)


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, AttentionMaskInterface()["sdpa"])


@contextmanager
def quantizing_logits(model: nn.Module, quantized: QuantizedLogits) -> Iterator[None]:
    """Let a model, ours or one of ``transformers``, quantize its attention logits for as long as the context lasts.

    Raises:
        UserError: the model's attention does not go through ``transformers``' interface, or is more than queries, keys and a mask.
    """

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        _refuse_extras(model, attention_mask, kwargs, _HANDLED)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, T, heads, width)
        sets = 2 if isinstance(module, DiffLlamaAttention) else 1  # the A1 of its heads stand before their A2
        return quantized.attention(q, k, v, _causal(module, kwargs), kwargs.get("scaling"), mask=attention_mask, sets=sets), None

    if modules := attention_modules(model):
        with ExitStack() as stack:
            for module in modules:
                stack.callback(setattr, module, "implementation", module.implementation)
                module.implementation = quantized
            yield
    elif isinstance(model, PreTrainedModel):
        with attending_with(model, attend):
            yield
    else:
        raise _cannot_see(model, "is no model of transformers")


def _refuse_extras(model: nn.Module, mask: Tensor | None, kwargs: dict[str, Any], handled: set[str]) -> None:
    """Raise ``UserError`` if the attention is more than queries, keys and a mask that says what is seen."""
    given = {name: value for name, value in kwargs.items() if value is not None and name not in _HARMLESS | handled}
    extra = [name for name, value in given.items() if name not in _HARMLESS_IF_OFF or value]
    if extra or (mask is not None and mask.dtype != torch.bool):
        raise _cannot_see(model, f"adds {extra[0] if extra else 'a bias'} to its attention")


def _causal(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``transformers`` means a decoder's attention where there is no mask."""
    return bool(getattr(module, "is_causal", True) if kwargs.get("is_causal") is None else kwargs["is_causal"])


def _diffllama_lambda(module: DiffLlamaAttention) -> Tensor:
    first = (module.lambda_q1 * module.lambda_k1).sum(-1, dtype=torch.float32).exp()
    second = (module.lambda_q2 * module.lambda_k2).sum(-1, dtype=torch.float32).exp()
    return first - second + module.lambda_init


def _weigh(view: AttentionView, values: Tensor) -> Tensor:
    """The output (B, T, M, width) of ordinary maps over values (B, T, G, width)."""
    out = values.new_empty(*view.q.shape[:3], values.shape[3])
    for m, key in enumerate(view.key_map):
        for start in range(0, out.shape[1], _ROWS):
            stop = min(start + _ROWS, out.shape[1])
            out[:, start:stop, m] = view.head_map(m, start, stop).to(values.dtype) @ values[:, :, key]
    return out
