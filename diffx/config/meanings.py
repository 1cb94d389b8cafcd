"""What every key means, taken from the docstrings of the dataclasses."""

import re
from collections.abc import Iterator
from inspect import cleandoc
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from diffx.config.messages import names_of, unknown
from diffx.errors import UserError


def meanings(kind: type) -> dict[str, str]:
    """The lines of a class's and its bases' "Attributes:", by name."""
    meaning_by_name: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        attributes = cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")[2]
        for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", attributes, re.M):
            meaning_by_name[match[1]] = " ".join(match[2].split())
    return {name: meaning.replace("``", "`") for name, meaning in meaning_by_name.items()}


def explained(cfg: DictConfig, job: type, key: str) -> str:
    """Give the value, the meaning and the choices of a key, of the keys of a group, or of ``all``.

    Raises:
        UserError: there is no such key.
    """
    rows = list(describe_keys(cfg, job))
    chosen = [row for row in rows if key in ("all", row[0]) or row[0].startswith(f"{key}.")]
    if not chosen:
        raise UserError(unknown(key, [row[0] for row in rows]))
    lines = []
    for name, value, meaning, hint in chosen:
        lines += [f"{name}={value}", f"    {meaning}"]
        if choices := names_of(hint):
            lines.append(f"    one of: {', '.join(choices)}")
    return "\n".join(lines)


def commented(cfg: DictConfig, job: type) -> str:
    """The YAML of a job's config, with the meaning behind each key."""
    means = {name: meaning for name, _, meaning, _ in describe_keys(cfg, job)}
    names = [str(name) for name in cfg if name != "hydra"]
    lines: list[str] = []
    path: list[str] = []
    for line in OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, names)).splitlines():
        meaning = None
        if match := re.match(r"((?:  )*)([\w-]+):", line):
            path[len(match[1]) // 2 :] = [match[2]]
            meaning = means.get(".".join(path))
            if meaning and line.count("'") % 2:  # a text of several lines
                lines.append(f"{match[1]}# {meaning}")
                meaning = None
        lines.append(f"{line}  # {meaning}" if meaning else line)
    if swept := OmegaConf.select(cfg, "hydra.sweeper.params"):
        lines.append(f"# a sweep over {' '.join(f'{key}={value}' for key, value in swept.items())}")
    return "\n".join(lines)


def describe_keys(
    cfg: DictConfig, kind: type, prefix: str = ""
) -> Iterator[tuple[str, str, str, Any]]:
    """The name, the value as on the command line, the meaning and the type of each key."""
    means, hints = meanings(kind), get_type_hints(kind)
    for name in map(str, cfg):
        node: Any = "" if OmegaConf.is_missing(cfg, name) else cfg[name]
        inner: Any = OmegaConf.get_type(node) if isinstance(node, DictConfig) else dict
        if inner is not dict and name != "hydra":
            yield from describe_keys(node, inner, f"{prefix}{name}.")
        elif name in means and name != "kind":
            value = "null" if node is None else getattr(node, "value", node)
            text = str(value).lower() if isinstance(value, bool) else f"{value}"
            yield f"{prefix}{name}", text, means[name], hints.get(name)
