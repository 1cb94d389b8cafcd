"""The doors: one command each. Nothing heavy is imported before a command runs."""

import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from diffx.config.errors import RunError, Stopped, UserError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _diffx() -> None:
    """Train models."""


def _train(job: Any, words: list[str]) -> None:
    from diffx.train.run import train

    train(job, words)


@app.command()
def train(
    words: Annotated[list[str] | None, typer.Argument()] = None,
    multirun: Annotated[bool, typer.Option("--multirun", "-m")] = False,
    cfg: Annotated[str | None, typer.Option("--cfg")] = None,
) -> None:
    """Train."""
    from diffx.config.launch import launch
    from diffx.config.train import TrainJob

    raise typer.Exit(launch("train", TrainJob, _train, words or [], multirun=multirun, show=["--cfg", cfg] if cfg else None))


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code, and turns bad input into one line."""
    try:
        return app(argv, standalone_mode=False) or 0
    except UserError as error:
        code, line = 2, str(error)
    except RunError as error:
        code, line = 1, str(error)
    except TyperException as error:
        code, line = 2, error.format_message()
    except Stopped:
        return 0
    except KeyboardInterrupt:
        return 130
    print(f"error: {line}", file=sys.stderr)
    return code
