"""What the papers report, read from ``published.yaml``."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffx.results.declare import Reference

_PAIRS = {  # the papers' methods, with the baseline over which their gain is reported
    "DIFF-3B (paper)": "Transformer-3B (paper)",
    "DIFF-3B, 350B tokens (paper)": "Transformer-3B, 350B tokens (paper)",
}
_GAIN = "DIFF - Transformer (paper)"


@cache
def _read() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def published(suite: str) -> list[Reference]:
    """The published figures of a suite, and how much higher the method is than its baseline."""
    entry, references = _read().get(suite, {}), []
    for group in entry.get("sets", ()):
        for row in group["rows"]:
            place = {key: value for key, value in row.items() if key != "values"}
            figures = dict(zip(group["models"], row["values"], strict=True))
            references += [Reference(label=k, value=v, **place) for k, v in figures.items()]
            for method, base in _PAIRS.items():
                if method in figures and base in figures:
                    gain = round(figures[method] - figures[base], 4)
                    references.append(Reference(label=_GAIN, value=gain, gain=True, **place))
    return references + [Reference(gain=True, **row) for row in entry.get("gains", ())]


def source(suite: str) -> str:
    """The paper, section and settings of a suite's published figures; empty without any."""
    return _read().get(suite, {}).get("source", "")
