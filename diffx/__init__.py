"""diffx: train, adapt, evaluate and quantize models with differential attention."""

from __future__ import annotations

import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffx.evaluation.model import LanguageModel

__version__ = "0.1.0"


def load(
    checkpoint: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> LanguageModel:
    """Load a run (``runs/x``, ``runs/x@best``, ``runs/x@1000``) or a causal model of transformers.

    Args:
        checkpoint: a run, or the hub name or folder of a model.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        revision: the revision on the hub.

    Raises:
        UserError: there is no such run, checkpoint or model, or it cannot be used.
    """
    from diffx.config.eval import Dtype
    from diffx.config.train import Device
    from diffx.evaluation.model import LanguageModel
    from diffx.loading import load as load_checkpoint

    return LanguageModel(load_checkpoint(checkpoint, Device(device), Dtype(dtype), revision))


def train_run(*words: str) -> Path:
    """Train as ``diffx train`` does: ``train_run("model=diff_v2", "train.steps=100")``.

    Returns:
        The run folder.

    Raises:
        UserError: a word cannot be used.
        RunError: the run failed.
    """
    from diffx.config.launch import compose
    from diffx.train.run import run_job

    return run_job(compose("train", list(words)), list(words))


class _Registration(MetaPathFinder):
    """Registers the models of ``diffx`` with ``transformers`` when its auto classes are imported.

    Transformers has no entry point for plugins, and registering at once would import its auto
    classes: ``import diffx``, with which every command starts, would take 5 s instead of 0.04 s.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "transformers.models.auto.modeling_auto":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # its loader
        return spec


def register() -> None:
    """Register the models of ``diffx`` with ``AutoConfig`` and ``AutoModelForCausalLM``."""
    import diffx.hub.configs  # noqa: F401  # the import registers


# transformers imports torchao, which warns of each kernel that this machine cannot use.
for _name in ("torchao", "torch.utils._pytree"):
    if (_logger := logging.getLogger(_name)).level == logging.NOTSET:
        _logger.setLevel(logging.ERROR)

if "transformers.models.auto.modeling_auto" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _Registration())
