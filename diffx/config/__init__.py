"""Typed, torch-free configuration: one dataclass a part, a docstring and a unit a field."""

from diffx.config.checks import count, require
from diffx.errors import RunError, UserError

__all__ = ["RunError", "UserError", "count", "require"]
