"""The schema of the table of results, and its Parquet files.

A row is one figure of one model: of one example (``aggregate`` is ``example``), or of a whole
group of examples. The columns of ``BY`` say what the figure is of; those that do not apply are
null.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffx.errors import UserError
from diffx.files import replacing

MODEL = {
    "checkpoint": "string",  # as `checkpoint=` takes it
    "architecture": "string",
    "parameters": "Int64",
    "seed": "Int64",
    "step": "Int64",
    "tokens": "Int64",  # trained on
    "source": "string",  # train, a suite's name, an analysis, bench
}
BY = {
    "task": "string",
    "shots": "Int64",
    "length": "Int64",  # tokens
    "pairs": "Int64",  # of key and value, in a sample
    "depth": "Float64",  # share of the text
    "position": "Int64",  # tokens
    "layer": "Int64",
    "head": "Int64",
    "bits": "Int64",
    "variant": "string",
}
COLUMNS = {
    **MODEL,
    "metric": "string",
    "unit": "string",
    "better": "string",  # lower, higher, none
    "aggregate": "string",  # example, or how the group's figure is made of its examples'
    **BY,
    "example": "string",  # pairs models; null unless the row is one example's
    "weight": "Float64",  # of the example in a weighted mean
    "value": "Float64",
    "stderr": "Float64",
    "low": "Float64",  # ends of the 95% interval
    "high": "Float64",
    "n": "Int64",  # examples
}
EXAMPLE = "example"
AVERAGE = "mean of means"  # the aggregate of an average over groups
ROWS = "rows.parquet"  # in an evaluation's folder


def make_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Make a frame with the columns of the schema; what a row lacks is null.

    Raises:
        ValueError: a row has a column that is not in the schema.
    """
    rows = list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"no columns of the table of results: {', '.join(sorted(unknown))}")
    return pd.DataFrame(
        {
            name: pd.array(
                [None if _is_nan(value := row.get(name)) else value for row in rows], dtype=kind
            )
            for name, kind in COLUMNS.items()
        }
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and not np.isfinite(value)


def write_frame(frame: pd.DataFrame, path: Path) -> None:
    """Write a frame as Parquet, whole or not at all."""
    with replacing(path) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")


def read_frame(path: Path) -> pd.DataFrame:
    """Read a frame that ``write_frame`` wrote.

    Raises:
        UserError: the file is missing or damaged, or its columns are not those of the schema. A
            column of ``BY`` that an older version did not have is null.
    """
    try:
        frame = pd.read_parquet(path)
        if not COLUMNS.keys() - BY.keys() <= {*frame.columns} <= COLUMNS.keys():
            raise ValueError("its columns are not those of the table of results")
        return frame.reindex(columns=[*COLUMNS]).astype(COLUMNS)
    except (
        OSError,
        ValueError,
        TypeError,
    ) as error:  # pyarrow's errors are ValueErrors or OSErrors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be used: {reason}; make the evaluation again with force=true"
        ) from error


def by_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of ``BY`` that are not null in a row, as Python's own numbers and texts."""
    present = {name: row[name] for name in BY if not pd.isna(row.get(name, pd.NA))}
    return {name: getattr(value, "item", lambda v=value: v)() for name, value in present.items()}
