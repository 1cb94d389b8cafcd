"""Composition of a command's config from ``conf/``, the schemas and the user's words."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from diffx.config.bridge import register_schemas
from diffx.config.checks import refuse

_PACKAGE = Path(__file__).resolve().parent.parent
_INSTALLED = _PACKAGE / "conf"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "conf"  # of a checkout
_LIBRARIES = (HydraException, OmegaConfBaseException, yaml.YAMLError)
COMPOSITION_ERRORS = (*_LIBRARIES, ValueError, TypeError, RecursionError)


class UserConfigsFirst(SearchPathPlugin):
    """Puts ``--config-dir`` before all other folders; Hydra's own flag would put it last."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Prepend the user's folder."""
        if self.folder is not None:
            search_path.prepend("user", f"file://{self.folder.resolve()}")


@contextmanager
def composer(config_dir: Path | None = None) -> Iterator[Any]:
    """Initialize Hydra on the configs of diffx and of the user; gives the Hydra object.

    Raises:
        UserError: the path is not a folder.
    """
    missing = config_dir is not None and not config_dir.is_dir()
    refuse(missing, f"--config-dir={config_dir}", "it must be a folder of configs")
    UserConfigsFirst.folder = config_dir
    Plugins.instance().register(UserConfigsFirst)
    register_schemas()
    GlobalHydra.instance().clear()  # a job of a sweep may compose other jobs
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield GlobalHydra.instance().hydra


# Only configs of diffx are kept: those of --config-dir may change while a process runs.
_compositions: dict[tuple[Any, ...], DictConfig] = {}
_groups: dict[str, dict[str, list[str]]] = {}


def compose_config(app: Any, name: str, words: list[str], *, several: bool = False) -> DictConfig:
    """Compose a command's config, with the node ``hydra``.

    Hydra takes 0.15 s to compose the config groups, so they are composed once in a process.

    Args:
        app: what ``composer`` gave.
        name: the primary config.
        words: in Hydra's grammar.
        several: the words may give a key several values and leave out a required group.

    Raises:
        COMPOSITION_ERRORS: the words do not compose to a config.
    """
    mode = RunMode.MULTIRUN if several else RunMode.RUN
    overrides = OverridesParser.create().parse_overrides(words)
    is_group = app.config_loader.repository.group_exists
    groups = [override for override in overrides if is_group(override.key_or_group)]
    if (
        UserConfigsFirst.folder is not None
        or any("hydra" in word for word in words)
        or any(override.is_sweep_override() for override in overrides)
        or any(isinstance(override.value(), dict) for override in groups)
    ):
        return app.compose_config(name, words, mode, validate_sweep_overrides=not several)
    choices = [str(override.input_line) for override in groups]
    source = (name, mode, *choices)
    if source not in _compositions:
        _compositions[source] = app.compose_config(name, choices, mode)
    cfg = copy.deepcopy(_compositions[source])
    cfg.hydra.overrides.task = words
    keys = [override for override in overrides if override not in groups]
    ConfigLoaderImpl._apply_overrides_to_config(keys, cfg)  # Hydra has no public function for it
    return cfg


def config_groups(app: Any, name: str) -> dict[str, list[str]]:
    """The groups of a primary config and their options, such as ``ablation/diff_v1_no_norm``."""
    if UserConfigsFirst.folder is None and name in _groups:
        return _groups[name].copy()
    names = app.config_loader.repository.get_group_options  # the loader's method copies all configs

    def options(group: str) -> list[str]:
        below = set(names(group, ObjectType.GROUP)) - {"claims", "results"}  # no configs of Hydra
        nested = [
            f"{sub}/{option}" for sub in sorted(below) for option in options(f"{group}/{sub}")
        ]
        return [*names(group, ObjectType.CONFIG), *nested]

    # The mode for several jobs accepts a group without a default.
    defaults = app.config_loader.compute_defaults_list(name, [], RunMode.MULTIRUN)
    choices = defaults.overrides.known_choices
    groups = {group: options(group) for group in choices if not group.startswith("hydra/")}
    if UserConfigsFirst.folder is None:
        _groups[name] = groups.copy()
    return groups
