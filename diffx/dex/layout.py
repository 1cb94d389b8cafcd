"""Find the attention projections of a pretrained model of any family, in one forward pass.

``transformers`` passes the queries, keys and values of every attention to one function. The
gradient shows which output features of which linear maps they depend on. The linear map whose input
is the result of that function is the output projection. This covers fused projections, GPT-2's
Conv1D, biases, grouped keys, query norms and heads of any width.

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
    """The output features of a linear map that queries, keys or values consist of.

    Attributes:
        name: name of the map in the model.
        rows: the output features; all of them, unless the map is fused with another projection.
    """

    name: str
    rows: list[int]


@dataclass(frozen=True)
class Layer:
    """The attention of one layer.

    Attributes:
        output: name of the output projection in the model; its input is H·d_v features, head after
            head.
        num_heads: H.
        width: d_v.
        queries: projections of the queries.
        keys: projections of the keys.
        values: projections of the values.
    """

    output: str
    num_heads: int
    width: int
    queries: list[Projection]
    keys: list[Projection]
    values: list[Projection]


def find_layers(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Layer]:
    """Find the attention layers of a model, in the order of execution.

    Args:
        model: a model of ``transformers``.
        inputs: arguments of its forward pass; two tokens are enough.

    Raises:
        UserError: the attention of a module, which is named, cannot be analysed.
    """
    try:
        with quiet_transformers():
            return _trace(model, inputs)
    except _UnclearError as error:
        raise UserError(
            f"base={model.name_or_path or type(model).__name__} cannot be used: {error}; DEX "
            "needs a model of transformers with ordinary "
            "attention that follows its AttentionInterface, such as Llama, Qwen, Mistral, Gemma, "
            "Phi, GPT-2, GPT-NeoX or OPT"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings of ``transformers``; errors here have one line."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


class _UnclearError(Exception):
    """Why a model cannot be analysed."""


def _trace(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Layer]:
    names = {module: name for name, module in model.named_modules()}
    layers: list[Layer] = []
    # linear maps since the last attention, and their outputs
    before: list[tuple[nn.Module, Tensor]] = []
    # attention before its output projection
    waiting: list[tuple[nn.Module, Tensor, tuple[list[Projection], ...]]] = []

    random = torch.Generator().manual_seed(0)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> Any:
        if waiting:
            raise _UnclearError(
                f"no linear map reads the output of {names[waiting[0][0]]} as it is"
            )
        # Random numbers in place of the context: the output projection is recognised by them.
        # (B, T, H, d_v)
        context = torch.randn(
            query.shape[0], query.shape[2], query.shape[1], value.shape[3], generator=random
        ).to(query)
        parts = tuple(_sources(tensor, before, names) for tensor in (query, key, value))
        if not all(parts):
            raise _UnclearError(
                f"the queries, keys or values of {names[module]} come from no linear map"
            )
        waiting.append((module, context, parts))
        before.clear()
        return context, None

    def linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # a router of experts, for example, returns several tensors
        if not args or not isinstance(output, Tensor):
            return output
        if (
            waiting
            and args[0].numel() == waiting[0][1].numel()
            and torch.equal(args[0].flatten(), waiting[0][1].flatten())
        ):
            _, context, (queries, keys, values) = waiting.pop()
            layers.append(
                Layer(names[module], context.shape[2], context.shape[3], queries, keys, values)
            )
        leaf = output.detach().requires_grad_()  # so that the gradient stops here
        before.append((module, leaf))
        return leaf.clone()  # the model may change it in place

    maps = [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    handles = [module.register_forward_hook(linear) for module in maps]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), attending_with(model, attend):
            model(**inputs)
    except UserError as error:
        raise _UnclearError(
            f"{type(model).__name__} does not let another attention take the place of its own"
        ) from error
    except _UnclearError:
        raise
    except Exception as error:  # the code of a model may fail in any way here
        raise _UnclearError(
            f"{type(model).__name__} fails while it is watched: {reason(error)}"
        ) from error
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
    """Refuse layers that share a projection or its weight: training one would change both."""
    uses = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    seen: set[str] = set()
    for layer in layers:
        names = {
            layer.output,
            *(projection.name for projection in [*layer.queries, *layer.keys, *layer.values]),
        }
        for name in sorted(names):
            if name in seen or uses[id(projection_weight(model.get_submodule(name)))] > 1:
                raise _UnclearError(f"{name} is shared by several layers")
        seen |= names


def _sources(
    tensor: Tensor, before: list[tuple[nn.Module, Tensor]], names: dict[nn.Module, str]
) -> list[Projection]:
    """The linear maps, and their output features, that a tensor depends on."""
    if not before or not tensor.requires_grad:
        return []
    # a plain sum could cancel in a norm
    weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor) + 0.5
    gradients = torch.autograd.grad(
        (tensor * weights).sum(),
        [output for _, output in before],
        retain_graph=True,
        allow_unused=True,
    )
    projections = []
    for (module, _), gradient in zip(before, gradients, strict=True):
        if gradient is not None:
            rows = gradient.flatten(0, -2).abs().sum(0).nonzero().flatten().tolist()
            if rows:
                projections.append(Projection(names[module], rows))
    return projections
