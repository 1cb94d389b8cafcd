"""Hydra's and OmegaConf's errors as one line with the word, the reason and the nearest names."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    list: "a list",
}
_HINTS = {
    "base": "NAME, a causal model of the Hugging Face hub, or without a network base=FOLDER with "
    "its config.json, model.safetensors and tokenizer.json; data=text data.path=FILES gives text"
}


def explain(
    error: Exception,
    words: Sequence[str] = (),
    groups: Mapping[str, list[str]] = MappingProxyType({}),
) -> str:
    """Describe in one line what is wrong with the words or the YAML behind a composition error.

    The nearest names are chosen from ``groups``, the config groups and their options.
    """
    text = str(error)
    direct = isinstance(error, OmegaConfBaseException)
    cause = error if direct else error.__cause__ or error.__context__
    key = str(getattr(cause, "full_key", ""))
    origin = re.match(r"In '(?!hydra/)\S+/\S+': ", text)  # a file of a group, not the words
    where = origin[0] if origin else ""
    if isinstance(error, RecursionError):
        return "the words or a config file cannot be read: they are nested too deeply or circular"
    # Hydra got a list, a number or null.
    if isinstance(error, TypeError) or text.startswith("Config group override"):
        return _no_option(words, groups)
    if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
        return f"a config file cannot be read: {' '.join(text.split())}"
    if isinstance(error, MissingConfigException):
        choice = _unknown_choice(error.missing_cfg_file or "", list(error.options or []), groups)
        return where + choice if choice else _first_line(error)
    if isinstance(error, OverrideParseException):
        accepted = "key=value, with quotes around values that hold spaces, brackets or '='"
        return f"{error.override!r} cannot be read: it must be {accepted}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        if key in groups:  # size={a:1}
            return _no_option(words, groups)
        return where + unknown(key, [*groups, *keys(cause.parent_node)])
    if isinstance(cause, MissingMandatoryValue):
        key = key.removesuffix(".kind")
        return f"{key} is missing: give it as {key}={_HINTS.get(key, '...')}"
    if isinstance(cause, ValidationError) and cause.object_type is not None:
        value = "null" if cause.value is None else cause.value
        if hint := get_type_hints(cause.object_type).get(str(cause.key)):
            return f"{where}{key}={value} cannot be used: it must be {_accepted(hint, value)}"
    if isinstance(cause, InterpolationResolutionError):
        return f"{key} cannot be used: {_first_line(cause)}"
    if missing := re.match(r"You must specify '(\w+)'", text):
        group, options = missing[1], ", ".join(groups.get(missing[1], []))
        return f"{group} is missing: give it as {group}=..., one of {options}"
    if "--multirun" in text:
        word = text.split("'")[1]
        return f"{word} has several values: add -m to run each, or write a list as key=[a,b]"
    nested = isinstance(cause, OmegaConfBaseException) and not direct
    return _first_line(error) + (f": {_first_line(cause)}" if nested and cause else "")


def _no_option(words: Sequence[str], groups: Mapping[str, list[str]]) -> str:
    """The line for a group that is given something else than the name of an option."""
    names = {word: word.partition("=")[0].lstrip("+~") for word in words}
    chosen = [word for word, key in names.items() if key in ("", *groups) or key[:6] == "hydra/"]
    odd = [word for word in chosen if word.partition("=")[2][:1] in ("[", "{")] or chosen
    accepted = "a group takes the name of one of its options, as model=diff_v1 does"
    return f"{' '.join(odd)} cannot be used: {accepted}"


def unknown(key: str, names: list[str]) -> str:
    """The line for an unknown key, with the nearest of ``names``."""
    return f"{key} is not a key{_nearest(key, names)}"


def _unknown_choice(file: str, options: list[str], groups: Mapping[str, list[str]]) -> str:
    """The line for ``model/ablation/foo``, or an empty text if the group is unknown."""
    known = [group for group in groups if file.startswith(f"{group}/")]
    group = known[0] if known else file.rpartition("/")[0]
    choice, options = file[len(group) + 1 :], groups.get(group, options)
    accepted = f"it must be one of {', '.join(options)}{_nearest(choice, options)}"
    return f"{group}={choice} cannot be used: {accepted}" if group and options else ""


def _nearest(name: str, names: list[str]) -> str:
    """``: did you mean a or b?``, or nothing; ``lr`` is near ``train.lr``."""
    ends = [full for full in names if full.endswith(f".{name}")]
    near = dict.fromkeys([*get_close_matches(name, dict.fromkeys(names), n=3), *ends])
    return f": did you mean {' or '.join(near)}?" if near else ""


def keys(node: Any) -> Iterator[str]:
    """Every dotted key with a value in the whole config of ``node``, except those of Hydra."""

    def below(part: DictConfig, prefix: str) -> Iterator[str]:
        for key in map(str, part):
            child, name = part._get_node(key), f"{prefix}{key}"
            if not isinstance(child, DictConfig) or child._is_none() or child._is_missing():
                yield name
            elif name != "hydra":
                yield from below(child, f"{name}.")

    return below(node._get_root(), "") if node is not None else iter(())


def _accepted(hint: Any, value: Any) -> str:
    """Describe a type as a user would."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_accepted(part, value) for part in get_args(hint))
    if names := names_of(hint):
        return f"one of {', '.join(names)}{_nearest(str(value), names)}"
    if get_origin(hint) is list:
        (part,) = get_args(hint)
        if type(value) is part:
            return f"a list such as [{value}]"
        return f"a list, each part of it {_accepted(part, value)}"
    return _TYPE_NAMES.get(hint, "a group of keys, set one by one")


def names_of(hint: Any) -> list[str]:
    """The names of an enum; none for any other type."""
    choice = isinstance(hint, type) and issubclass(hint, Enum)
    return list(hint.__members__) if choice else []


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].partition(". value:")[0].rstrip(":") if lines else type(error).__name__
