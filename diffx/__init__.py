"""diffx: train, adapt, evaluate and quantize models with differential attention."""

from __future__ import annotations

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


def load(checkpoint: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None) -> LanguageModel:
    """Load a run (``runs/x``, ``runs/x@best``, ``runs/x@1000``) or a causal model of ``transformers``, by hub name or folder.

    Args:
        checkpoint: which.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        revision: the hub's revision.

    Raises:
        UserError: there is no such run, checkpoint or model, or it cannot be used.
    """
    from diffx.config.eval import Dtype
    from diffx.config.train import Device
    from diffx.evaluation.model import LanguageModel
    from diffx.loading import load as load_checkpoint

    return LanguageModel(load_checkpoint(checkpoint, Device(device), Dtype(dtype), revision))


def train_run(*words: str) -> Path:
    """Train as ``diffx train WORDS`` does: ``train_run("model=diff_v2", "train.steps=100")``; ``diffx.train`` is the package.

    Args:
        words: ``key=value``, for one run.

    Returns:
        The run folder.

    Raises:
        UserError: the words cannot be used.
        RunError: the run failed.
    """
    from diffx.config.launch import compose
    from diffx.train.run import run_job

    return run_job(compose("train", list(words)), list(words))


class _Registration(MetaPathFinder):
    """Registers our models with ``transformers`` when that is loaded, and loads nothing before: ``diffx --help`` is instant."""

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

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # the loader is this module's own
        return spec


def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know our models."""
    import diffx.hub.configs  # noqa: F401  # registers as it is imported


if "transformers.models.auto.modeling_auto" in sys.modules:
    register()
else:
    sys.meta_path.insert(0, _Registration())
