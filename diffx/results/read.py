"""All measurements of runs and models, as one frame of the table of results."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from diffx.config.train import TrainJob
from diffx.results.runs import Run, read_run, sweep_jobs
from diffx.results.table import ROWS, make_frame, read_frame

TRAIN = "train"  # the source of a run's curves
_UNITS = {  # of a line of metrics.jsonl: unit, better
    "train/loss": ("nats per token", "lower"),
    "train/tokens_per_second": ("tokens/s", "higher"),
    "train/grad_norm": ("norm", "none"),
    "val/loss": ("nats per token", "lower"),
    "val/bpb": ("bits per byte", "lower"),
}
_BY_LAYER = {"diff/lambda": "lambda", "attention/context_rms": "rms"}  # their names end in a layer


def read_results(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Read the curves of runs, the rows of finished evaluations and of benches into one frame.

    Args:
        paths: run folders, sweep folders, folders ``runs/hub/<name>@<revision>``, or ``.parquet``
            files, such as those of ``diffx bench``.

    Raises:
        UserError: a path is none of them, or one of its files is damaged.
    """
    frames = []
    for path in map(Path, paths):
        if path.suffix == ".parquet" and not path.is_dir():
            frames.append(read_frame(path))
            continue
        for folder in sweep_jobs(path) or [path]:
            if (folder / "config.yaml").is_file() or not (folder / "evals").is_dir():
                frames.append(make_frame(curve_rows(read_run(folder))))
            results = sorted(folder.glob("evals/*/*/*/results.json"))
            frames += [read_frame(result.with_name(ROWS)) for result in results]
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else make_frame([])


def curve_rows(run: Run) -> Iterator[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``: one a step and figure that the table knows."""
    job = run.job
    facts = {
        "checkpoint": str(run.path),
        "architecture": job.model.kind if isinstance(job, TrainJob) else job.dex.variant.value,
        "parameters": run.summary.get("parameters", {}).get("total"),
        "seed": job.seed,
        "source": TRAIN,
        "aggregate": "mean",
    }
    for line in run.metrics:
        place = facts | {"step": line["step"], "tokens": line["tokens"]}
        for name, value in line.items():
            family, _, layer = name.rpartition("/")
            if name in _UNITS:
                unit, better = _UNITS[name]
                yield place | {"metric": name, "unit": unit, "better": better, "value": value}
            elif family in _BY_LAYER:
                columns = {"unit": _BY_LAYER[family], "better": "none", "layer": int(layer)}
                yield place | columns | {"metric": family, "value": value}
