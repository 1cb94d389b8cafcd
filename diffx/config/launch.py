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
from diffx.config.messages import explain, keys
from diffx.config.sweep import BEST, job_label, show_sweep
from diffx.console import SWEEP_JOB
from diffx.errors import UserError, describe_any, one_line
from diffx.files import append_lines, read_json_lines

_FAILED, _DONE = "failed.jsonl", "jobs.jsonl"
_RESUME = {"train": ["train.resume=auto"], "adapt": ["train.resume=auto"]}
_HYDRA_RUN: dict[str, Any] = {  # what only Hydra's runs of a single job would follow
    "run.dir": ".",
    "output_subdir": None,
    "job.chdir": False,
    "job.env_set": {},
    "callbacks": {},
}
_COMMANDS = {"train": "train", "adapt": "adapt-dex", "eval": "eval", "quantize": "quantize"}
_PACKAGES = {"experiment": "_global_", "size": "model"}  # what the files of these groups belong to
_TEXT_KEYS = ("prompt", "train.sample_prompt", "suite.system_instruction")
Work = Callable[[Any, list[str]], Any]  # gets a job and its words
After = Callable[[list[Any], Path | None], None]


@dataclass
class SweepJob:
    """The function that Hydra calls for each job of a sweep, in this process or in a launcher's.

    ``given`` are the words of the command line, with several values for a key.
    """

    job_class: type
    work: Work
    given: list[str]
    argv: list[str] = field(default_factory=lambda: sys.argv)  # a launcher's process has another
    process: int = field(default_factory=os.getpid)
    unwritten: list[dict[str, Any]] = field(default_factory=list)  # failures on a full disk

    def __call__(self, cfg: DictConfig) -> Any:
        """Check the config and do the job; returns what ``work`` returns, for a sweeper.

        The line of an exception goes to standard error at once, and to the sweep's folder.
        """
        sys.argv = self.argv
        settings = HydraConfig.get()
        number, sweep = settings.job.num, Path(settings.sweep.dir)
        words = cast(list[str], OmegaConf.to_container(settings.overrides.task, resolve=False))
        entry: dict[str, Any] = {"job": number, "overrides": words}
        label = job_label(number, words, self.given)
        token = SWEEP_JOB.set(label)
        try:
            if "run" in cfg:
                _refuse_run_dir(cfg)
                cfg.run.dir = str(sweep / str(number))
                cfg.wandb.group = cfg.wandb.group or sweep.name
            result = self.work(to_typed(cfg, self.job_class), words)
            _append(sweep / _DONE, entry | {"result": result})
            return result
        except Exception as error:
            code, line = describe_any(error)
            print(f"error: job {label}: {one_line(line)}", file=sys.stderr, flush=True)
            entry |= {"error": line, "exit_code": code}
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


def _refuse_run_dir(cfg: DictConfig) -> None:
    place = "each job's folder in a multirun is <hydra.sweep.dir>/<job number>"
    given = cfg.run.dir is not None
    refuse(given, f"run.dir={cfg.run.dir}", f"{place}; set hydra.sweep.dir instead")


def compose(name: str, words: list[str], config_dir: Path | None = None) -> Any:
    """Compose the job that ``diffx <name>`` would run for these words, and run nothing.

    Raises:
        UserError: the words do not compose to a valid config.
    """
    with _composer(name, words, config_dir) as (app, words):
        return _job(compose_config(app, name, words), name)


def _job(cfg: DictConfig, name: str) -> Any:
    with open_dict(cfg):
        del cfg["hydra"]
    return to_typed(cfg, JOBS[name])


def show_config(
    name: str, words: list[str], config_dir: Path | None = None, key: str | None = None
) -> None:
    """Print what the words compose to, or the meaning of a key, and run nothing.

    Raises:
        UserError: the words do not compose to a valid config, or the key does not exist.
    """
    with _composer(name, words, config_dir) as (app, words):
        cfg = compose_config(app, name, words, several=True)
        print(explained(cfg, JOBS[name], key) if key else commented(cfg, JOBS[name]))


def launch(
    name: str,
    work: Work,
    words: list[str],
    *,
    multirun: bool = False,
    config_dir: Path | None = None,
    after: After | None = None,
) -> int:
    """Run one command's job, or its sweep through Hydra.

    Args:
        name: the primary config.
        work: does a job; importable by name, since launchers pickle it. With ``suite=[a,b]`` it
            gets a list of jobs, and returns the exit code.
        words: in Hydra's grammar: ``key=value``, ``~key``, ``+key=value``.
        multirun: run every combination of values; ``sweep.resume=FOLDER`` goes on with a sweep.
        config_dir: a folder of configs that come before those of diffx.
        after: gets what ``work`` returned for each job that did not fail (JSON objects), and the
            sweep's folder or ``None``.

    Returns:
        0, or a sweep's exit code: 2 if all of its failed jobs were user errors, else 1.

    Raises:
        UserError: the words do not compose to a valid config.
    """
    words = _resumed(name, words, multirun)
    lists = [word for word in words if name == "eval" and re.fullmatch(r"suite=\[.*\]", word)]
    if lists:
        suites = [suite.strip() for suite in lists[-1][7:-1].split(",")]
        accepted = "it must be a suite, or a list such as [retrieval,outliers]"
        refuse(not all(suites), lists[-1], accepted)
        others = [word for word in words if not word.startswith("suite=")]
        if not multirun:
            jobs = [_suite_job(name, suite, others, config_dir) for suite in suites]
            return cast(int, work(jobs, words))
        words = [*others, f"suite={','.join(suites)}"]
    with _composer(name, words, config_dir) as (app, words):
        try:
            cfg = compose_config(app, name, words, several=multirun)
        except HydraException:  # an experiment may be a sweep without -m
            cfg = compose_config(app, name, words, several=True)
            if cfg.hydra.mode is not RunMode.MULTIRUN:
                raise
        sweep = multirun or cfg.hydra.mode is RunMode.MULTIRUN
        if not sweep:
            for key, default in _HYDRA_RUN.items():
                value = OmegaConf.select(cfg.hydra, key)
                reason = "Hydra runs sweeps (-m) only; give run.dir=, or set the environment"
                refuse(value != default, f"hydra.{key}={value}", reason)
            HydraConfig.instance().set_config(cfg)  # for ${hydra:...} in a value
            job = _job(cfg, name)
    if sweep:
        return _sweep(name, work, words, cfg, config_dir, after)
    result = work(job, words)
    if after:
        after([result], None)
    return 0


def _resumed(name: str, words: list[str], multirun: bool) -> list[str]:
    """Write ``sweep.resume=FOLDER`` as the words by which a sweep's jobs are found and go on."""
    given = [word for word in words if word.startswith("sweep.resume=")]
    if not given:
        return words
    folder = given[-1].partition("=")[2]
    refuse(not multirun, given[-1], "it goes on with a sweep; give -m and the sweep's words")
    refuse(not Path(folder).is_dir(), given[-1], "there is no such folder of a sweep")
    rest = [word for word in words if not word.startswith("sweep.resume=")]
    return [*rest, f"hydra.sweep.dir={folder}", *_RESUME.get(name, [])]


def _suite_job(name: str, suite: str, words: list[str], config_dir: Path | None) -> Any:
    try:
        return compose(name, [f"suite={suite}", *words], config_dir)
    except UserError as error:
        raise UserError(f"{error} (suite={suite} of the list)") from error


def _sweep(
    name: str,
    work: Work,
    words: list[str],
    cfg: DictConfig,
    config_dir: Path | None,
    after: After | None,
) -> int:
    """Run a sweep, whose jobs share what ``cfg`` has; returns the exit code."""
    if "run" in cfg:
        _refuse_run_dir(cfg)
    sweep = new_path("hydra.sweep.dir", cfg.hydra.sweep.dir)
    refuse(sweep.is_file(), f"hydra.sweep.dir={sweep}", "it is no folder; choose another")
    missing = [folder for folder in (sweep, *sweep.parents) if not folder.exists()]
    for stale in (_FAILED, _DONE, BEST):
        (sweep / stale).unlink(missing_ok=True)
    # The folder's name holds the time; it must be the same for every job, process and machine.
    words = [*words, "hydra.sweep.dir='" + str(sweep).replace("'", "\\'") + "'"]
    sweep_job = SweepJob(JOBS[name], work, words)
    try:
        with composer(config_dir) as app, _one_line(app, name, words):
            app.multirun(name, sweep_job, words)
    except KeyboardInterrupt:
        if "run" in cfg:
            resume = f"sweep.resume={sweep}"
            print(f"go on with the sweep: its words and {resume}", file=sys.stderr)
        raise
    finally:
        done = _entries(read_json_lines(sweep / _DONE, skip_damaged=True))
        written = read_json_lines(sweep / _FAILED, skip_damaged=True)
        failed = _entries([*written, *sweep_job.unwritten])
        if failed:
            labels = ", ".join(job_label(job["job"], job["overrides"], words) for job in failed)
            jobs = f"{len(failed)} job{'s' if len(failed) > 1 else ''} of the sweep failed"
            reasons = f"the reasons are in {sweep / _FAILED}"
            print(f"error: {jobs}: {labels}; {reasons}", file=sys.stderr)
        if (done or failed) and os.environ.get("RANK", "0") == "0":
            show_sweep(sweep, _entries([*done, *failed]), words)
        # Hydra refused the sweep before its first job.
        if [path.name for path in sweep.glob("*")] == ["multirun.yaml"]:
            (sweep / "multirun.yaml").unlink()
            with suppress(OSError):
                for folder in missing:
                    folder.rmdir()
    if after and done:
        after([job["result"] for job in done], sweep)
    return min((job["exit_code"] for job in failed), default=0)


def _entries(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by number; a job that a launcher repeated counts once."""
    return sorted({job["job"]: job for job in jobs}.values(), key=itemgetter("job"))


def _plain_text(word: str) -> str:
    """Quote the value of a key of free text, unless it is quoted already or null."""
    key, _, value = word.partition("=")
    if key not in _TEXT_KEYS or value[:1] in ("'", '"') or value == "null":
        return word
    value = re.sub(r"(\\*)'", r"\1\1\\'", literal(value))
    return f"{key}='" + re.sub(r"(\\+)$", r"\1\1", value) + "'"


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
        line, groups = _misplaced(app, name, words), {}
        with suppress(HydraException):  # the user's configs may break the primary one
            groups = config_groups(app, name)
        raise UserError(line or explain(error, words, groups)) from error


def _misplaced(app: Any, name: str, words: list[str]) -> str | None:
    """Describe a user's file without a package line, or an experiment of another command."""
    options = [word.partition("=")[::2] for word in words]
    choices = [(key, choice) for key, value in options for choice in value.split(",")]
    for group, choice in choices:
        if group not in _PACKAGES:
            continue
        file = (UserConfigsFirst.folder or CONFIGS) / group / f"{choice}.yaml"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
        if text is not None and not re.search(r"^#\s*@package\b", text, re.M):
            line = f"# @package {_PACKAGES[group]}"
            return f"{file} cannot be used: its first line must be `{line}`"
        if group == "experiment":
            word = f"experiment={choice}"
            fitting = [_COMMANDS[other] for other in _COMMANDS if _composes(app, other, word)]
            if fitting and _COMMANDS.get(name) not in fitting:
                return f"{word} cannot be used here: it is for `diffx {' or '.join(fitting)}`"
    return None


def _composes(app: Any, name: str, word: str) -> bool:
    """Whether a command's config takes a word and, of an experiment, the keys of its sweep."""
    try:
        cfg = compose_config(app, name, [word], several=True)
        swept = cfg.hydra.sweeper.get("params") or {}
        return swept.keys() <= {*keys(cfg), *config_groups(app, name)}
    except COMPOSITION_ERRORS:
        return False
