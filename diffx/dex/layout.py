"""Find the attention projections of a pretrained model of any family, in one forward pass.

``transformers`` passes queries, keys and values to one function; gradients show on which features
of which linear maps they depend. The linear map that reads the result is the output projection.
Notation: B batch, T tokens, H query heads, d_v width of a value.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.dex.layer import DexProjection, projection_weight
from diffx.errors import reason
from diffx.hub.attention import attending_with


@dataclass(frozen=True)
class Projection:
    """Output features ``rows`` of the linear map ``name``; all, unless several are fused."""

    name: str
    rows: list[int]


@dataclass(frozen=True)
class Layer:
    """The attention of one layer, with the projections of its queries, keys and values."""

    output: str  # name of the output projection, which reads H·d_v features, head after head
    num_heads: int  # H
    width: int  # d_v
    queries: list[Projection]
    keys: list[Projection]
    values: list[Projection]

    @property
    def names(self) -> set[str]:
        """The names of all its linear maps."""
        return {self.output, *(part.name for part in self.queries + self.keys + self.values)}


def find_layers(model: PreTrainedModel, inputs: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """Find the attention layers of a model, in the order of execution.

    ``inputs`` are the arguments of a forward pass; None is two tokens.

    Raises:
        UserError: the attention of a module, which is named, cannot be analysed, or has a branch.
    """
    setting = f"base={model.name_or_path or type(model).__name__}"
    adapted = any(isinstance(module, DexProjection) for module in model.modules())
    refuse(adapted, setting, "it has a DEX branch already; give the pretrained model")
    if inputs is None:
        inputs = {"input_ids": torch.tensor([[0, 1]], device=model.device)}
    try:
        with quiet():
            return _trace(model, inputs)
    except _UnclearError as error:
        raise UserError(
            f"{setting} cannot be used: {error}; DEX needs a model of transformers with ordinary "
            "attention by its AttentionInterface, such as Llama, Qwen, Gemma, Phi, GPT-2 or OPT"
        ) from error


def check_heads(setting: str, layers: Sequence[Layer], heads: Sequence[Sequence[int]]) -> None:
    """Raise ``UserError`` unless ``heads`` gives, for each layer, heads that the layer has."""
    pairs = zip(layers, heads, strict=False)
    exist = all({*chosen} <= {*range(layer.num_heads)} for layer, chosen in pairs)
    lacking = "it names layers or heads that the model does not have"
    refuse(not exist or len(heads) != len(layers), setting, lacking)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of ``transformers``."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode within the context."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _UnclearError(Exception):
    """Why a model cannot be analysed."""


def _trace(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> list[Layer]:
    names = {module: name for name, module in model.named_modules()}
    layers: list[Layer] = []
    before: list[
        tuple[nn.Module, Tensor]
    ] = []  # linear maps since the last attention, with outputs
    # attention before its output projection: its name, its output, its projections
    waiting: list[tuple[str, Tensor, tuple[list[Projection], ...]]] = []
    random = torch.Generator().manual_seed(0)

    def check_output_was_read() -> None:
        if waiting:
            raise _UnclearError(f"no linear map reads the output of {waiting[0][0]} as it is")

    def attend(module: nn.Module, *tensors: Any, **_: Any) -> Any:
        query, key, value, _mask = tensors
        check_output_was_read()
        # Random numbers in place of the output, by which the output projection is recognised.
        shape = query.transpose(1, 2).shape[:3]  # (B, T, H)
        output = torch.randn(*shape, value.shape[3], generator=random).to(query)
        parts = tuple(_sources(tensor, before, names) for tensor in (query, key, value))
        if not all(parts):
            raise _UnclearError(f"no linear map gives queries, keys or values of {names[module]}")
        waiting.append((names[module], output, parts))
        before.clear()
        return output, None

    def linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(output, Tensor):  # such as a router of experts
            return output
        if waiting and torch.equal(args[0].flatten(), waiting[0][1].flatten()):
            _, context, parts = waiting.pop()
            layers.append(Layer(names[module], *context.shape[2:], *parts))
        leaf = output.detach().requires_grad_()  # so that the gradient stops here
        before.append((module, leaf))
        return leaf.clone()  # the model may change it in place

    name = type(model).__name__
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                stack.callback(module.register_forward_hook(linear).remove)
        stack.enter_context(evaluating(model))
        try:
            with torch.enable_grad(), attending_with(model, attend):
                model(**inputs)
        except _UnclearError:
            raise
        except UserError as error:
            raise _UnclearError(f"{name} does not let another attention replace its own") from error
        except Exception as error:  # the code of a model may fail in any way here
            raise _UnclearError(f"{name} fails while it is watched: {reason(error)}") from error
    check_output_was_read()
    if not layers:
        raise _UnclearError(f"no attention was seen in {name}")
    # Training a projection or weight that layers share would change all of them.
    modules = list(model.modules())
    uses = Counter(id(tensor) for module in modules for tensor in module.parameters(recurse=False))
    layers_of = Counter(name for layer in layers for name in layer.names)
    for name, number in sorted(layers_of.items()):
        if number > 1 or uses[id(projection_weight(model.get_submodule(name)))] > 1:
            raise _UnclearError(f"{name} is shared by several layers")
    return layers


def _sources(
    tensor: Tensor, before: list[tuple[nn.Module, Tensor]], names: dict[nn.Module, str]
) -> list[Projection]:
    """The linear maps, and their output features, that a tensor depends on."""
    if not before or not tensor.requires_grad:
        return []
    # Random weights, since a plain sum could cancel in a norm.
    weights = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor) + 0.5
    modules, outputs = zip(*before, strict=True)
    total = (tensor * weights).sum()
    gradients = torch.autograd.grad(total, outputs, retain_graph=True, materialize_grads=True)
    features = [
        gradient.flatten(0, -2).any(0).nonzero().flatten().tolist() for gradient in gradients
    ]
    sources = zip(modules, features, strict=True)
    return [Projection(names[module], rows) for module, rows in sources if rows]
