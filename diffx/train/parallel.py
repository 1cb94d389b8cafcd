"""Devices and distribution, which no other file handles."""

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from diffx.config.checks import refuse, refusing
from diffx.config.train import Device, Precision, TrainConfig
from diffx.errors import Stopped, describe, one_line
from diffx.models.attention import attention_modules


@dataclass(frozen=True)
class World:
    """The device and the number of this process, of ``size`` processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        return bool(self.total(torch.tensor(float(flag), device=self.device)))  # device sync

    def share(self, value: str) -> str:
        """Return the text of the main process in every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()


def pick_device(device: Device) -> torch.device:
    """Return the device that ``device=`` names; ``UserError`` if this machine has none."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    present = [Device.cuda] * cuda + [Device.mps] * mps + [Device.cpu]
    if device is Device.auto:
        device = present[0]
    why = f"torch can see none on this machine; it has {', '.join(kind.value for kind in present)}"
    refuse(device not in present, f"device={device.value}", why)
    if device is Device.cpu:
        keep_freed_memory()
    return torch.device(device.value)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later tensors; other C libraries are not changed.

    By default each large block is mapped again, and its pages fault one by one: a step of the
    default run took five times as long on a virtual machine with two cores.
    """
    mallopt = getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as <malloc.h> numbers them
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def join_world(device: Device) -> Iterator[World]:
    """Join the process group if ``torchrun`` started this process, and leave it at the end.

    The first process that fails prints its error; each exits with the code of its error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(pick_device(device))
        return
    store, rank, size = next(rendezvous("env://"))
    try:
        chosen = pick_device(device)
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(chosen)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        yield World(chosen, rank, size)
    except (Exception, Stopped) as error:
        described = describe(error)
        if described is None:
            raise
        code, line = described
        if store.add("diffx/reported", 1) == 1:
            print(one_line(f"error: {line}" if code else line), file=sys.stderr, flush=True)
        raise SystemExit(code) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parallelize(model: nn.Module, blocks: nn.ModuleList, config: TrainConfig, world: World) -> None:
    """Prepare a model on its device, with its list of decoder blocks, for training, in place."""
    kernels = fused_kernels(config, world.device)
    for module in attention_modules(model):
        # Maps that share keys (DIFF V2) are one ordinary call, which the kernels do not outdo.
        module.implementation = kernels if module.keys[0] > module.values[0] else None
    if config.activation_checkpointing:
        contexts = partial(create_selective_checkpoint_contexts, _keep_attention)
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_wrapper(block, context_fn=contexts)
    if config.compile:
        for block in blocks:
            block.compile()
    if world.size > 1:
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        # Sampling enters here, and needs the weights whole as forward does.
        if hasattr(model, "forward_hidden"):
            register_fsdp_forward_method(model, "forward_hidden")


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of attention kernels, small but expensive; recompute the rest."""
    name = op.name() if isinstance(op, torch._ops.OpOverload) else ""
    attention = "scaled_dot_product" in name or name.startswith("diffx::")
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE


def accumulate(model: nn.Module, last: bool) -> None:
    """Reduce gradients over the processes only in the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def clip_gradients(parameters: Iterable[nn.Parameter], bound: float) -> torch.Tensor:
    """Clip the global gradient norm to ``bound`` (0: do not clip); return the norm before."""
    norm = nn.utils.clip_grad_norm_(parameters, bound or float("inf"))
    full = getattr(norm, "full_tensor", None)
    return full() if full is not None else norm


def fused_kernels(config: TrainConfig, device: torch.device) -> ModuleType | None:
    """The fused kernels, if the config asks for them; ``UserError`` without GPU or Triton."""
    if not config.fused_attention:
        return None
    setting, why = "train.fused_attention=true", "the kernels are for a GPU (device=cuda)"
    refuse(device.type != "cuda", setting, why, f"device={device}")
    install = "run pip install 'diffx[triton]'"
    with refusing(setting, ImportError, "it needs Triton: ", install):
        return import_module("diffx.ops.triton_attention")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Return the context of forward passes: bf16 autocast over fp32 weights, or none."""
    if precision_of(device, precision) is Precision.fp32:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def precision_of(device: torch.device, precision: Precision) -> Precision:
    """Resolve ``auto``: bf16 on a GPU that supports it, else fp32."""
    if precision is not Precision.auto:
        return precision
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return Precision.bf16 if bf16 else Precision.fp32
