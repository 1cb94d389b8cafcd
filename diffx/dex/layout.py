"""Where a pretrained model's attention keeps its projections, found by watching one forward pass: no family has a rule of its own.

``transformers`` hands every attention's queries, keys and values to one function. Which output features of which linear maps they are made
of, the gradient tells; and the linear map that reads what the function returns is the output projection. So fused projections, GPT-2's
Conv1D, biases, grouped keys, norms of queries and heads of any width are all found alike.

Notation: B batch, T tokens, H query heads, d_v width of a value.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from diffx.config import UserError
from diffx.dex.layer import projection_weight
from diffx.errors import reason
from diffx.hub.attention import attending_with


@dataclass(frozen=True)
class Projection:
    """What a linear map gives to queries, keys or values.

    Attributes:
        name: the map, as the model names it.
        rows: its output features that count; all of them, unless it is fused with another projection.
    """

    name: str
    rows: list[int]


@dataclass(frozen=True)
class Layer:
    """The attention of one layer.

    Attributes:
        output: the output projection, as the model names it; it reads H·d_v features, head after head.
        num_heads: H.
        width: d_v.
        queries: what makes the queries.
        keys: what makes the keys.
        values: what makes the values.
    """

    output: str
    num_heads: int
    width: int
    queries: list[Projection]
    keys: list[Projection]
    values: list[Projection]


def find_layers(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Layer]:
    """Find the attention layers of a model, in the order in which they run.

    Args:
        model: one of ``transformers``.
        inputs: what its forward pass takes; two tokens are enough.

    Raises:
        UserError: names the module that cannot be understood.
    """
    try:
        with quiet_transformers():
            return _watched(model, inputs)
    except _UnclearError as error:
        raise UserError(
            f"base={model.name_or_path or type(model).__name__} cannot be used: {error}; DEX needs a model of transformers with ordinary "
            "attention that follows its AttentionInterface, such as Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-NeoX or OPT"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back the warnings of ``transformers``, which go on at length about what is said here in one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _UnclearError(Exception):
    """Why a model is not understood."""


def _watched(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Layer]:
    names = {module: name for name, module in model.named_modules()}
    layers: list[Layer] = []
    before: list[tuple[nn.Module, Tensor]] = []  # linear maps that ran since the last attention, and what they gave
    waiting: list[tuple[nn.Module, Tensor, tuple[list[Projection], ...]]] = []  # the attention whose output projection is to come

    random = torch.Generator().manual_seed(0)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        if waiting:
            raise _UnclearError(f"no linear map reads the output of {names[waiting[0][0]]} as it is")
        # Any context would do, so that no peculiarity of a family's attention matters here; random figures are known again.
        context = torch.randn(query.shape[0], query.shape[2], query.shape[1], value.shape[3], generator=random).to(query)  # (B, T, H, d_v)
        parts = tuple(_sources(tensor, before, names) for tensor in (query, key, value))
        if not all(parts):
            raise _UnclearError(f"the queries, keys or values of {names[module]} come from no linear map")
        waiting.append((module, context, parts))
        before.clear()
        return context, None

    def linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(output, Tensor):  # such as a router of experts, which gives several tensors
            return output
        if waiting and args[0].numel() == waiting[0][1].numel() and torch.equal(args[0].flatten(), waiting[0][1].flatten()):
            _, context, (queries, keys, values) = waiting.pop()
            layers.append(Layer(names[module], context.shape[2], context.shape[3], queries, keys, values))
        leaf = output.detach().requires_grad_()  # so that no gradient goes past it to the maps that ran earlier
        before.append((module, leaf))
        return leaf.clone()  # which the model may change in place

    maps = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [module.register_forward_hook(linear) for module in maps]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), attending_with(model, attend):
            model(**inputs)
    except UserError as error:
        raise _UnclearError(f"{type(model).__name__} does not let another attention take the place of its own") from error
    except _UnclearError:
        raise
    except Exception as error:  # the code of a family may fail in any way on what it gets here
        raise _UnclearError(f"{type(model).__name__} fails while it is watched: {reason(error)}") from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if waiting:
        raise _UnclearError(f"no linear map reads the output of {names[waiting[0][0]]} as it is")
    if not layers:
        raise _UnclearError(f"no attention was seen in {type(model).__name__}")
    _check_sharing(model, layers)
    return layers


def _check_sharing(model: PreTrainedModel, layers: list[Layer]) -> None:
    """Refuse layers that share a projection, by its module or by its weight alone: what one of them learns would change the others."""
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    seen: set[str] = set()
    for layer in layers:
        names = {layer.output, *(projection.name for projection in [*layer.queries, *layer.keys, *layer.values])}
        for name in sorted(names):
            if name in seen or uses[id(projection_weight(model.get_submodule(name)))] > 1:
                raise _UnclearError(f"{name} is shared by several layers")
        seen |= names


def _sources(tensor: Tensor, before: list[tuple[nn.Module, Tensor]], names: dict[nn.Module, str]) -> list[Projection]:
    """The linear maps, and of each the output features, that a tensor is made of."""
    if not before or not tensor.requires_grad:
        return []
    weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor) + 0.5  # a plain sum could cancel in a norm
    gradients = torch.autograd.grad((tensor * weights).sum(), [output for _, output in before], retain_graph=True, allow_unused=True)
    found = []
    for (module, _), gradient in zip(before, gradients, strict=True):
        if gradient is not None:
            rows = gradient.flatten(0, -2).abs().sum(0).nonzero().flatten().tolist()
            if rows:
                found.append(Projection(names[module], rows))
    return found
