"""Run the job of a command, or its sweep through Hydra, whose failed jobs are listed."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from diffx.config.bridge import JOBS, literal, to_typed
from diffx.config.checks import new_path, refuse
from diffx.config.composition import (
    COMPOSITION_ERRORS,
    CONFIGS,
    UserConfigsFirst,
    compose_config,
    composer,
    config_groups,
)
from diffx.config.meanings import commented, explained
from diffx.config.messages import explain, keys, unknown
from diffx.config.sweep import BEST, job_label, show_sweep
from diffx.console import SWEEP_JOB
from diffx.errors import UserError, describe_any, one_line
from diffx.files import append_lines, read_json_lines

_RUN_DIR = (
    "each job's folder in a multirun is <hydra.sweep.dir>/<job number>; set hydra.sweep.dir instead"
)
_FAILED, _DONE = "failed.jsonl", "jobs.jsonl"
_HYDRA_RUN: dict[str, Any] = {
    "run.dir": ".",
    "output_subdir": None,
    "job.chdir": False,
    "job.env_set": {},
    "callbacks": {},
}
_COMMANDS = {"train": "train", "adapt": "adapt-dex", "eval": "eval", "quantize": "quantize"}
_PACKAGES = {"experiment": "_global_", "size": "model"}  # what the files of these groups belong to
_TEXT_KEYS = ("prompt", "train.sample_prompt", "suite.system_instruction")


@dataclass
class SweepJob:
    """The function that Hydra calls for each job of a sweep, in this process or in a launcher's.

    The line of an exception goes to standard error at once, and to the sweep's folder.

    Attributes:
        job_class: the dataclass that the config becomes.
        work: does the job.
        given: the words of the command line, with several values for a key.
        argv: the command line.
        unwritten: failed jobs that could not be written to the sweep's folder.
        process: the id of the process that made this object.
    """

    job_class: type
    work: Callable[[Any, list[str]], Any]
    given: list[str]
    argv: list[str]
    unwritten: list[dict[str, Any]] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)

    def __call__(self, cfg: DictConfig) -> Any:
        """Check the config and do the job; returns what ``work`` returns, for a sweeper."""
        sys.argv = self.argv
        settings = HydraConfig.get()
        words = cast(list[str], OmegaConf.to_container(settings.overrides.task, resolve=False))
        sweep = Path(settings.sweep.dir)
        label = job_label(settings.job.num, words, self.given)
        token = SWEEP_JOB.set(label)
        try:
            if "run" in cfg:
                refuse(cfg.run.dir is not None, f"run.dir={cfg.run.dir}", _RUN_DIR)
                cfg.run.dir = str(sweep / str(settings.job.num))
                cfg.wandb.group = cfg.wandb.group or sweep.name
            result = self.work(to_typed(cfg, self.job_class), words)
            entry = {"job": settings.job.num, "overrides": words, "result": result}
            _append(sweep / _DONE, entry)
            return result
        except Exception as error:
            entry = _failure(settings.job.num, words, error)
            print(f"error: job {label}: {one_line(entry['error'])}", file=sys.stderr, flush=True)
            try:
                _append(sweep / _FAILED, entry)
            except OSError:
                if os.getpid() != self.process:  # only the launcher's error can report it
                    raise
                self.unwritten.append(entry)
            return None
        finally:
            SWEEP_JOB.reset(token)


def _append(path: Path, entry: dict[str, Any]) -> None:
    with append_lines(path) as file:  # one write, so that the lines of parallel jobs do not mix
        file.write(json.dumps(entry) + "\n")


def _failure(number: int, words: list[str], error: Exception) -> dict[str, Any]:
    """The entry of a failed job in the sweep's ``failed.jsonl``."""
    code, line = describe_any(error)
    return {"job": number, "overrides": words, "error": line, "exit_code": code}


def compose(name: str, words: list[str], config_dir: Path | None = None) -> Any:
    """Compose the job that ``diffx <name>`` would run for these words, and run nothing.

    Raises:
        UserError: the words do not compose to a valid config.
    """
    with _composer(name, words, config_dir) as (app, words):
        cfg = compose_config(app, name, words)
        with open_dict(cfg):
            del cfg["hydra"]
    return to_typed(cfg, JOBS[name])


def show_config(
    name: str,
    words: list[str],
    config_dir: Path | None = None,
    cfg: str | None = None,
    resolve: bool = False,
    package: str | None = None,
    doc: str | None = None,
    info: str | None = None,
) -> None:
    """Print what the words compose to, and run nothing; the arguments are the command's options.

    Raises:
        UserError: the words do not compose to a valid config, or a key does not exist.
    """
    with _composer(name, words, config_dir) as (app, words):
        config = _composition(app, name, words, several=True)
        if package and OmegaConf.select(config, package) is None:
            raise UserError(unknown(package, list(keys(config))))  # Hydra would end the process
        if doc:
            print(explained(config, JOBS[name], doc))
        elif info:
            app.show_info(info, name, words)
        elif cfg == "job":
            print(commented(config, JOBS[name], package, resolve))
        else:
            app.show_cfg(name, words, cfg, package, resolve)


def _suites(name: str, words: list[str]) -> list[list[str]]:
    """For ``diffx eval`` with ``suite=[a,b]``, the words of each suite; else none."""
    lists = [word for word in words if name == "eval" and re.fullmatch(r"suite=\[.*\]", word)]
    if not lists:
        return []
    suites = [suite.strip() for suite in lists[-1][7:-1].split(",")]
    accepted = "it must be a suite, or a list such as [retrieval,outliers]"
    refuse(not all(suites), lists[-1], accepted)
    others = [word for word in words if not word.startswith("suite=")]
    return [[f"suite={suite}", *others] for suite in suites]


def launch(
    name: str,
    work: Callable[[Any, list[str]], Any],
    words: list[str],
    *,
    multirun: bool = False,
    config_dir: Path | None = None,
    after: Callable[[list[Any], Path | None], None] | None = None,
) -> int:
    """Run one command's job, or its sweep through Hydra.

    Args:
        name: the primary config.
        work: gets the job and the words that set it; importable by name, since launchers pickle it.
            With ``suite=[a,b]`` it gets a list of the jobs, and returns the exit code.
        words: in Hydra's grammar: ``key=value``, ``~key``, ``+key=value``.
        multirun: run every combination of values.
        config_dir: a folder of configs that come before those of diffx.
        after: called with what ``work`` returned for each job that did not fail (JSON objects), and
            with the sweep's folder or ``None``.

    Returns:
        0, or a sweep's exit code: 2 if all of its failed jobs were user errors, else 1.

    Raises:
        UserError: the words do not compose to a valid config.
    """
    suites = _suites(name, words)
    if suites and not multirun:
        jobs = []
        for suite in suites:
            try:
                jobs.append(compose(name, suite, config_dir))
            except UserError as error:
                raise UserError(f"{error} ({suite[0]} of the list)") from error
        return cast(int, work(jobs, words))
    if suites:
        choices = ",".join(suite[0].removeprefix("suite=") for suite in suites)
        words = [*suites[0][1:], f"suite={choices}"]
    with _composer(name, words, config_dir) as (app, words):
        cfg = _composition(app, name, words, several=multirun)
        single = not (multirun or cfg.hydra.mode is RunMode.MULTIRUN)
        if single:
            _check_single(cfg.hydra)
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in a value
            with open_dict(cfg):
                del cfg["hydra"]
    if single:
        result = work(to_typed(cfg, JOBS[name]), words)
        if after:
            after([result], None)
        return 0

    if "run" in cfg:
        refuse(cfg.run.dir is not None, f"run.dir={cfg.run.dir}", _RUN_DIR)
    sweep = new_path("hydra.sweep.dir", cfg.hydra.sweep.dir)
    refuse(sweep.is_file(), f"hydra.sweep.dir={sweep}", "it is no folder; choose another")
    made = [folder for folder in (sweep, *sweep.parents) if not folder.exists()]
    for stale in (_FAILED, _DONE, BEST):
        (sweep / stale).unlink(missing_ok=True)
    # The folder's name holds the time; it must be the same for every job, process and machine.
    words = [*words, "hydra.sweep.dir='" + str(sweep).replace("'", "\\'") + "'"]
    sweep_job = SweepJob(JOBS[name], work, words, sys.argv)
    try:
        with _one_line(app, name, words):
            _hydra_main(sweep_job, name, words)
    except KeyboardInterrupt:
        if "run" in cfg:
            resume = f"hydra.sweep.dir={sweep} train.resume=auto"
            print(f"go on with the sweep: its words and {resume}", file=sys.stderr)
        raise
    finally:
        done, failed = _report_sweep(sweep, sweep_job)
        # Hydra refused the sweep before its first job.
        if [path.name for path in sweep.glob("*")] == ["multirun.yaml"]:
            (sweep / "multirun.yaml").unlink()
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
    if after and done:
        after([entry["result"] for entry in done], sweep)
    return min((entry["exit_code"] for entry in failed), default=0)


def _report_sweep(sweep: Path, sweep_job: SweepJob) -> tuple[list[Any], list[Any]]:
    """Print what became of a sweep's jobs; returns the entries of those done and those failed."""
    number = itemgetter("job")
    lines = read_json_lines(sweep / _DONE, skip_damaged=True)
    done = sorted({entry["job"]: entry for entry in lines}.values(), key=number)
    lines = read_json_lines(sweep / _FAILED, skip_damaged=True)
    failed = sorted([*lines, *sweep_job.unwritten], key=number)
    if failed:
        labels = [job_label(entry["job"], entry["overrides"], sweep_job.given) for entry in failed]
        jobs = f"{len(failed)} job{'s' if len(failed) > 1 else ''} of the sweep failed"
        reasons = f"the reasons are in {sweep / _FAILED}"
        print(f"error: {jobs}: {', '.join(labels)}; {reasons}", file=sys.stderr)
    entries = sorted([*done, *failed], key=number)
    if entries and os.environ.get("RANK", "0") == "0":
        show_sweep(sweep, entries, sweep_job.given)
    return done, failed


def _composition(app: Any, name: str, words: list[str], several: bool) -> DictConfig:
    """Compose the only job's config, or with ``several`` what all jobs' configs share."""
    if several:
        return compose_config(app, name, words, several=True)
    try:
        return compose_config(app, name, words)
    except HydraException:  # an experiment may be a sweep without -m
        cfg = compose_config(app, name, words, several=True)
        if cfg.hydra.mode is not RunMode.MULTIRUN:
            raise
        return cfg


def _plain_text(word: str) -> str:
    """Quote the value of a key of free text, unless it is quoted already or null."""
    key, _, value = word.partition("=")
    if key not in _TEXT_KEYS or value[:1] in ("'", '"') or value == "null":
        return word
    value = re.sub(r"(\\*)'", r"\1\1\\'", literal(value))
    return f"{key}='" + re.sub(r"(\\+)$", r"\1\1", value) + "'"


def _check_single(settings: DictConfig) -> None:
    """Refuse the settings of Hydra that only its own runs of a job would follow."""
    for key, default in _HYDRA_RUN.items():
        value = OmegaConf.select(settings, key)
        reason = "Hydra runs sweeps (-m) only; give run.dir=, or set the environment"
        refuse(value != default, f"hydra.{key}={value}", reason)


def _hydra_main(sweep_job: SweepJob, name: str, words: list[str]) -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come out as they are
    sys.argv = [sys.argv[0], "--multirun", "--", *words]
    try:
        hydra.main(config_path=str(CONFIGS), config_name=name, version_base="1.3")(sweep_job)()
    finally:
        sys.argv = sweep_job.argv


@contextmanager
def _composer(name: str, words: list[str], config_dir: Path | None) -> Iterator[Any]:
    """Give the Hydra object and the quoted words; what Hydra raises becomes a ``UserError``."""
    words = [_plain_text(word) for word in words]
    with composer(config_dir) as app, _one_line(app, name, words):
        yield app, words


@contextmanager
def _one_line(app: Any, name: str, words: list[str]) -> Iterator[None]:
    """Turn what Hydra raises while it composes into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except COMPOSITION_ERRORS as error:
        # Hydra raises TypeError for a group that is given a list.
        if isinstance(error, TypeError) and not any("[" in word for word in words):
            raise
        if misplaced := _misplaced(app, name, words):
            raise UserError(misplaced) from error
        groups = {}
        with suppress(HydraException):  # the user's configs may break the primary one
            groups = config_groups(app, name)
        raise UserError(explain(error, words, groups)) from error


def _misplaced(app: Any, name: str, words: list[str]) -> str | None:
    """Describe a user's file without a package line, or an experiment of another command."""
    options = [word.partition("=")[::2] for word in words]
    choices = [(group, choice) for group, value in options for choice in value.split(",")]
    for group, choice in choices:
        if group not in _PACKAGES:
            continue
        file = (UserConfigsFirst.folder or CONFIGS) / group / f"{choice}.yaml"
        if file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            if not re.search(r"^#\s*@package\b", text, re.M):
                line = f"# @package {_PACKAGES[group]}"
                return f"{file} cannot be used: its first line must be `{line}`"
        if group == "experiment":
            fitting = [
                command
                for config, command in _COMMANDS.items()
                if _composes(app, config, f"{group}={choice}")
            ]
            if fitting and _COMMANDS.get(name) not in fitting:
                commands = " or ".join(fitting)
                return f"experiment={choice} cannot be used here: it is for `diffx {commands}`"
    return None


def _composes(app: Any, name: str, word: str) -> bool:
    """Whether a command's config takes a word and, of an experiment, the keys of its sweep."""
    try:
        cfg = compose_config(app, name, [word], several=True)
        swept = cfg.hydra.sweeper.get("params") or {}
        first = [f"{key}={str(values).partition(',')[0]}" for key, values in swept.items()]
        compose_config(app, name, [word, *first], several=True)
    except COMPOSITION_ERRORS:
        return False
    return True
