"""diffx: train, adapt, evaluate and quantize models with differential attention."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


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
