"""What the papers report, read from ``published.yaml``."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from diffx.results.declare import Reference

_PAIRS = (  # the papers' baseline, and the method whose gain over it they report
    ("Transformer-3B (paper)", "DIFF-3B (paper)"),
    ("Transformer-3B, 350B tokens (paper)", "DIFF-3B, 350B tokens (paper)"),
)
_GAIN = "DIFF - Transformer (paper)"


@cache
def _read() -> dict[str, Any]:
    text = Path(__file__).with_name("published.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def published(suite: str) -> list[Reference]:
    """The published figures of a suite, and how much higher the method is than its baseline."""
    entry = _read().get(suite, {})
    references = []
    for group in entry.get("sets", ()):
        for row in group["rows"]:
            place = {"metric": row["metric"], "by": row.get("by", {})}
            place["average"] = row.get("average", False)
            values = dict(zip(group["models"], row["values"], strict=True))
            references += [Reference(label=k, value=v, **place) for k, v in values.items()]
            references += [
                Reference(label=_GAIN, value=round(values[b] - values[a], 4), gain=True, **place)
                for a, b in _PAIRS
                if a in values and b in values
            ]
    return references + [Reference(gain=True, **row) for row in entry.get("gains", ())]


def source(suite: str) -> str:
    """The paper, section and settings of a suite's published figures; empty without any."""
    return _read().get(suite, {}).get("source", "")
