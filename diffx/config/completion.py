"""Shell completion: config groups, their options, keys and the values of a choice."""

import re
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from diffx.config.composition import COMPOSITION_ERRORS, compose_config, composer, config_groups
from diffx.config.messages import keys, names_of


def complete(
    name: str, before: list[str], incomplete: str, config_dir: Path | None = None
) -> list[str]:
    """The words that begin with ``incomplete``.

    Args:
        name: the primary config.
        before: the words before it, which decide which keys exist; Bash splits a word at ``=``.
        incomplete: the beginning of the word.
        config_dir: a folder of configs that come before those of diffx.
    """
    words = re.sub(r" ?= ?", "=", " ".join(before)).split()
    open_word = words and (words[-1].endswith("=") or "=" not in words[-1])
    split = f"{words.pop().rstrip('=')}=" if open_word else ""
    try:
        with composer(config_dir) as app:
            try:
                cfg = compose_config(app, name, words, several=True)
            except COMPOSITION_ERRORS:
                cfg = compose_config(app, name, [])
            candidates = _candidates(cfg, config_groups(app, name), split + incomplete)
    except COMPOSITION_ERRORS:  # the user's folder does not compose
        return []
    return [word[len(split) :] for word in candidates]


def _candidates(cfg: Any, groups: dict[str, list[str]], word: str) -> list[str]:
    key, equals, value = word.partition("=")
    names = [
        name
        for name in dict.fromkeys([*groups, *keys(cfg)])
        if name.startswith(key) and name.rpartition(".")[2] != "kind"
    ]
    if not equals and len(names) != 1:
        return [f"{name}=" for name in names]
    # For a single key its values are given too, so that the shell puts no space after "key=".
    key = key if equals else names[0]
    several = value.rpartition(",")[0]  # -m model=diff_v1,…
    prefix = f"{key}={several}," if several else f"{key}="
    options = groups[key] if key in groups else _values(cfg, key)
    candidates = [f"{prefix}{option}" for option in options]
    return [option for option in candidates if option.startswith(word)] if equals else candidates


def _values(cfg: Any, key: str) -> list[str]:
    """The values that a key may take if it is a choice, else its current value."""
    group, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, group) if group else cfg
    if not OmegaConf.is_dict(parent):
        return []
    hint = get_type_hints(OmegaConf.get_type(parent)).get(name)
    if hint is None:
        return []
    if OmegaConf.is_missing(parent, name):
        return [""]
    if hint is bool:
        return ["true", "false"]
    current = parent._get_node(name)._value()
    return names_of(hint) or ["", "null" if current is None else str(current)]
