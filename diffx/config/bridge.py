"""Schemas of the dataclasses, and the ``config.yaml`` of a run folder.

A saved config has no interpolation, which could read the environment; texts are escaped.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffx.config.checks import plain, refuse
from diffx.config.data import DATA_CONFIGS, TOKENIZER_CONFIGS
from diffx.config.dex import AdaptJob
from diffx.config.eval import JUDGE_CONFIGS, EvalJob, ExportJob
from diffx.config.experiment import ExperimentJob
from diffx.config.messages import explain, unknown
from diffx.config.model import MODEL_CONFIGS
from diffx.config.quantize import METHOD_CONFIGS, QuantizeJob
from diffx.config.suite import SUITE_CONFIGS
from diffx.config.train import GenerateJob, PrepareJob, TrainJob
from diffx.errors import UserError
from diffx.files import write_text

JOBS: dict[str, type] = {
    "train": TrainJob,
    "adapt": AdaptJob,
    "prepare": PrepareJob,
    "generate": GenerateJob,
    "eval": EvalJob,
    "export": ExportJob,
    "quantize": QuantizeJob,
    "claim": ExperimentJob,
}
GROUPS: dict[str, Mapping[str, type]] = {
    "model": MODEL_CONFIGS,
    "data": DATA_CONFIGS,
    "tokenizer": TOKENIZER_CONFIGS,
    "suite": SUITE_CONFIGS,
    "judge": JUDGE_CONFIGS,
    "method": METHOD_CONFIGS,
}

_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # behind an odd number of backslashes: text

Job = TypeVar("Job")


@cache
def register_schemas() -> None:
    """Store each job's dataclass as ``schema/<job>``, the others as options of their groups."""
    store = ConfigStore.instance()
    for name, job in JOBS.items():
        store.store(group="schema", name=name, node=job)
    for group, kinds in GROUPS.items():
        for kind, config in kinds.items():
            node = OmegaConf.structured(config)
            if group == "suite":
                node.name = kind  # conf/suite has more suites of these kinds, with other names
            store.store(group=group, name=kind, node=node)
    # A user's file may change an option: it is checked against the dataclass, as Hydra warns.
    message = r"\s*'\S+' is validated against ConfigStore schema with the same name"
    warnings.filterwarnings("ignore", message)


def to_typed(cfg: DictConfig, cls: type[Job]) -> Job:
    """Turn a composed config into its job, which runs every check.

    Raises:
        UserError: a key is unknown, or a value is missing or cannot be used.
    """
    try:
        _check(cfg)
        job = OmegaConf.to_object(cfg)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UserError(explain(error)) from error
    assert isinstance(job, cls)
    return job


def _check(cfg: DictConfig, prefix: str = "") -> None:
    """Refuse unknown keys, unusable values, and a ``kind`` that is not the dataclass's."""
    cls: Any = OmegaConf.get_type(cfg)
    free = cls is dict  # its keys are another library's
    known = [] if free else list(get_type_hints(cls))
    for key in map(str, cfg):
        name = prefix + key
        if not free and key not in known:
            raise UserError(unknown(name, [prefix + other for other in known]))
        value = None if OmegaConf.is_missing(cfg, key) else cfg[key]
        if isinstance(value, DictConfig):
            _check(value, f"{name}.")
            continue
        if isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=True)
        plain(name, value)
        fixed = key == "kind" and not free and value is not None
        if fixed and value != cls.__dataclass_fields__["kind"].default:
            group = prefix[:-1]
            choice = f"give {group}={value} in its place, one of {', '.join(GROUPS.get(group, ()))}"
            choice = choice if group else "the command sets it"
            raise UserError(f"{name}={value} cannot be set by hand: {choice}")


class _Loader(yaml.SafeLoader):
    """Plain values without aliases, by which a small file can stand for a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def literal(text: str) -> str:
    """Escape each ``${`` of a text, so that OmegaConf gives the text back as it is."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def to_plain(value: Any) -> Any:
    """Turn a config into values for YAML, JSON and ``from_plain``: enums by name, texts escaped."""
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    return literal(value) if isinstance(value, str) else value


def from_plain(schema: Any, saved: Any) -> Any:
    """Build the config of a dataclass or structured config from what ``to_plain`` gave.

    Raises:
        UserError: a value cannot be used, or is an interpolation.
    """
    try:
        _no_interpolations(saved)
        config = OmegaConf.merge(OmegaConf.structured(schema), saved)
        _check(cast(DictConfig, config))
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    except RecursionError as error:
        raise UserError("it is nested too deeply") from error


def _no_interpolations(value: Any, key: str = "") -> None:
    if isinstance(value, str) and _INTERPOLATION.search(value):
        reason = "which a saved config must not have; a text has \\${ in its place"
        raise UserError(f"{key}={value} has an interpolation, {reason}")
    if isinstance(value, Mapping):
        for name, item in value.items():
            _no_interpolations(name, f"a key of {key}")
            _no_interpolations(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _no_interpolations(item, key)


def save_config(job: Any, path: Path) -> None:
    """Write a job as YAML that ``load_config`` reads back to an equal job."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_plain(job))))


def load_config(path: Path) -> Any:
    """Read a job that ``save_config`` wrote; a key that the file does not have takes its default.

    Raises:
        UserError: the file is missing or damaged, holds an interpolation or an unknown key, or
            lacks a key without a default.
    """
    saved = read_yaml(path)
    schema = _schema(saved, path)
    try:
        return from_plain(schema, saved)
    except UserError as error:
        raise UserError(f"{path} cannot be used by this version of diffx: {error}") from error


def read_yaml(path: Path) -> Any:
    """Read plain values of a YAML file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a saved config: {reason}") from error


def _schema(saved: Any, path: Path) -> DictConfig:
    """The structured config of the ``kind`` of a saved config and of each of its groups."""

    def structured(kinds: Mapping[str, type], node: Any, key: str) -> Any:
        kind = str(node.get("kind") if isinstance(node, dict) else None)
        refuse(kind not in kinds, f"{path}", f"{key}={kind} must be one of {', '.join(kinds)}")
        return OmegaConf.structured(kinds[kind])

    schema = structured(JOBS, saved, "kind")
    for group in GROUPS.keys() & schema.keys():
        schema[group] = structured(GROUPS[group], saved.get(group), f"{group}.kind")
    for key in saved.keys() & schema.keys():
        wrong = isinstance(schema._get_node(key), DictConfig) and not isinstance(saved[key], dict)
        refuse(wrong, f"{path}", f"{key} must be a group of keys")
    return schema
