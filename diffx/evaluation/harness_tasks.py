"""Tasks of lm-eval, of ``tasks/`` or of the user, with data of the hub or a folder."""

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from diffx.config import UserError
from diffx.config.checks import refuse
from diffx.data.hub import asking_hub
from diffx.errors import reason
from diffx.evaluation.task_rows import refusing

_TASKS = Path(__file__).with_name("tasks")
_SUFFIXES = {".jsonl": "json", ".parquet": "parquet"}


@dataclass
class Tasks:
    """What a suite's names stand for.

    Attributes:
        tasks: each task, by name.
        shots: a task's default number of demonstrations; None if it has none.
        groups: groups that have a score in lm-eval, by name.
        items: what an average is over, and the tasks of each: a task, or such a group.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    shots: dict[str, int | None] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    items: dict[str, list[str]] = field(default_factory=dict)


@lru_cache(maxsize=1)
def load_tasks(
    names: tuple[str, ...],
    include_path: str | None,
    data_dir: str | None,
    generation: str,
    seed: int,
) -> Tasks:
    """Build tasks, groups or tags of lm-eval, or of ``include_path``, and read their data.

    Args:
        names: of the tasks.
        include_path: a folder of more task YAMLs.
        data_dir: data of all tasks, ``<data_dir>/<task>/<split>.jsonl`` or ``.parquet``.
        generation: a JSON object of settings of generation, which replace each task's.
        seed: of what tasks draw as they are built.

    Raises:
        UserError: an unknown task, data that cannot be read, or a missing package.
    """
    for key, folder in (("include_path", include_path), ("data_dir", data_dir)):
        missing = folder is not None and not Path(folder).is_dir()
        refuse(missing, f"suite.{key}={folder}", "there is no such folder")
    paths: list[str | Path] = [_TASKS, *([include_path] if include_path else [])]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths)  # seconds: it reads thousands of files
    for name in names:
        close = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3))
        advice = "it must be a task, group or tag of lm-eval, or of suite.include_path"
        problem = f"there is no such task; {f'did you mean {close}?' if close else advice}"
        refuse(name not in manager.all_tasks, f"suite.tasks={name}", problem)
    loaded = Tasks()
    random.seed(seed)
    np.random.seed(seed)
    with _patched_download(data_dir):
        for name in names:
            _add(loaded, name, manager)
    for name, task in loaded.tasks.items():
        loaded.shots[name] = task.get_config("num_fewshot")
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", json.loads(generation), update=True)
        _name_failures(task)
    return loaded


def _name_failures(task: Any) -> None:
    """Make exceptions of a task's metrics ``UserError`` that name the task and the metric."""

    def named(name: str, function: Any) -> Any:
        if not callable(function) or getattr(function, "__module__", "").startswith("lm_eval.api"):
            return function

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if kwargs and isinstance(error, TypeError):  # lm-eval calls it again with a list
                    raise
                failed = f"its metric {name} failed with {type(error).__name__}: {reason(error)}"
                raise UserError(f"suite.tasks={task.task_name} cannot be used: {failed}") from error

        return called

    metrics = getattr(task, "_metric_fn_list", {})
    for functions in (metrics, getattr(task, "_aggregation_list", {})):
        functions.update({name: named(name, function) for name, function in functions.items()})
    scoring = task.get_config("process_results")
    if callable(scoring):
        names = ", ".join(metrics) or scoring.__name__
        task.set_config("process_results", named(f"{names} ({scoring.__name__})", scoring))


def _add(loaded: Tasks, name: str, manager: TaskManager) -> None:
    try:
        built = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # a task's YAML and code may fail in any way
        problem = f"building it failed with {type(error).__name__}: {reason(error)}"
        if "antlr4" in str(error):  # of MATH and its relatives, when they are imported
            problem = (
                "lm-eval's code for it needs antlr4-python3-runtime 4.11, and Hydra 4.9; "
                "diffx_math has the same problems"
            )
        elif "math_verify" in f"{error} {error.__cause__}":
            problem = "math_verify is not installed; run pip install 'diffx[math]'"
        raise UserError(f"suite.tasks={name} cannot be used: {problem}") from error
    tasks = built["tasks"]
    for task_name, task in tasks.items():
        unusable = getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False)
        problem = "it runs generated code or needs more than text; choose another task"
        refuse(unusable, f"suite.tasks={task_name}", problem)
    groups = {key: group for key, group in built["groups"].items() if group.has_aggregation}
    loaded.tasks |= tasks
    loaded.groups |= groups
    loaded.items |= {name: list(tasks)} if name in groups else {task: [task] for task in tasks}


@contextmanager
def _patched_download(data_dir: str | None) -> Iterator[None]:
    """Let lm-eval's tasks read ``data_dir``, and parquet conversions on the hub.

    A patch: lm-eval 0.4.13 calls a task's ``custom_dataset`` without its name, data set or splits,
    and an override through ``TaskManager.load`` is the same for all tasks of a group.
    """
    original = ConfigurableTask.download

    def download(task: ConfigurableTask, dataset_kwargs: Any = None, **kwargs: Any) -> None:
        name = task.config.task
        if data_dir is not None:
            task.dataset = _local(task, Path(data_dir) / name)
            return
        files = (dataset_kwargs or {}).get("data_files", {})
        files = files.values() if isinstance(files, dict) else [files]
        path = (task.DATASET_PATH, task.DATASET_NAME)
        source = ", ".join(map(str, files)) or "/".join(filter(None, path))
        copies = " and ".join(f"DIR/{name}/{split}.jsonl" for split in _splits(task))
        advice = f"suite.data_dir=DIR reads a local copy, {copies} (or .parquet)"
        with refusing(f"suite.tasks={name}", f"its data set {source} cannot be read", advice):
            _from_hub(task, partial(original, task, dataset_kwargs, **kwargs))

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _from_hub(task: ConfigurableTask, download: Callable[[], None]) -> None:
    try:
        with asking_hub(task.DATASET_PATH or ""):
            download()
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # the hub converts data sets with a script to parquet, a folder a configuration
        place = {"data_dir": task.DATASET_NAME, "revision": "refs/convert/parquet"}
        task.dataset = datasets.load_dataset(task.DATASET_PATH, **place)


def _splits(task: ConfigurableTask) -> list[str]:
    """The splits that a task reads: the measured one, and that of the demonstrations."""
    config, shown = task.config, task.fewshot_cfg
    splits = [config.test_split or config.validation_split]
    if shown.split is not None or not shown.samples:
        splits.append(shown.split or config.training_split or config.validation_split)
    return [split for split in dict.fromkeys(splits) if split]


def _local(task: ConfigurableTask, folder: Path) -> datasets.DatasetDict:
    setting = f"suite.data_dir={folder.parent}"
    files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES}
    for split in _splits(task):
        refuse(split not in files, setting, f"{folder} has no {split}.jsonl or .parquet")
    parts = datasets.DatasetDict()
    for split, path in files.items():
        with refusing(setting, f"a file in {folder} cannot be read"):
            kind, data = _SUFFIXES[path.suffix], {split: str(path)}
            parts[split] = datasets.load_dataset(kind, data_files=data, split=split)
    return parts


def digest(task: Task, with_demonstrations: bool) -> str:
    """SHA-256 of a task's config, documents and possible demonstrations."""
    ignored = ("metadata", "num_fewshot", "dataset_kwargs")
    config = {key: value for key, value in task.dump_config().items() if key not in ignored}
    shown = task.sampler.df if with_demonstrations and hasattr(task, "sampler") else []
    hasher = hashlib.sha256(
        json.dumps([config, task.VERSION], default=_name, sort_keys=True).encode()
    )
    for document in (*task.eval_docs, *shown):
        hasher.update(json.dumps(document, default=str, sort_keys=True).encode())
    return hasher.hexdigest()


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value)  # a function's repr has its address
