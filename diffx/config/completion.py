"""Shell completion: config groups, their options, keys and the values of a choice."""

import re
from pathlib import Path

from diffx.config.bridge import JOBS
from diffx.config.composition import COMPOSITION_ERRORS, compose_config, composer, config_groups
from diffx.config.meanings import describe_keys
from diffx.config.messages import names_of


def complete(
    name: str, before: list[str], incomplete: str, config_dir: Path | None = None
) -> list[str]:
    """The words that begin with ``incomplete``.

    ``before`` are the words before it, which decide which keys exist; Bash splits them at ``=``.
    ``name`` is the primary config, ``config_dir`` a folder of configs that come first.
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
            options = config_groups(app, name)
            for key, value, _, hint in describe_keys(cfg, JOBS[name]):
                choices = ["true", "false"] if hint is bool else names_of(hint)
                options.setdefault(key, choices or list(dict.fromkeys(["", value])))
    except COMPOSITION_ERRORS:  # the user's folder does not compose
        return []
    return [word[len(split) :] for word in _candidates(options, split + incomplete)]


def _candidates(options: dict[str, list[str]], word: str) -> list[str]:
    key, equals, value = word.partition("=")
    names = [name for name in options if name.startswith(key)]
    if not equals and len(names) != 1:
        return [f"{name}=" for name in names]
    # For a single key its values are given too, so that the shell puts no space after "key=".
    key = key if equals else names[0]
    several = value.rpartition(",")[0]  # -m model=diff_v1,…
    prefix = f"{key}={several}," if several else f"{key}="
    candidates = [f"{prefix}{option}" for option in options.get(key, [])]
    return [option for option in candidates if option.startswith(word)] if equals else candidates
