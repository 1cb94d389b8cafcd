"""Curves and evaluations of the runs in ``golden/`` as one frame."""

from pathlib import Path

import pandas as pd
import pytest

from diffx.config import UserError
from diffx.results.read import read_results
from diffx.results.table import COLUMNS, make_frame, read_frame, write_frame

RUNS = Path(__file__).with_name("golden") / "new"


def test_curves_and_evaluations_are_one_frame(monkeypatch):
    monkeypatch.chdir(RUNS)
    frame = read_results(["sweep"])
    assert list(frame.columns) == list(COLUMNS)
    curves = frame[(frame["source"] == "train") & (frame["metric"] == "val/loss")]
    assert curves["checkpoint"].nunique() == 6 and set(curves["seed"]) == {0, 1, 2}
    last = curves[(curves["checkpoint"] == "sweep/0") & (curves["step"] == 40)]
    assert (
        last["value"].item() == pytest.approx(2.4559597549149954)
        and last["unit"].item() == "nats per token"
    )
    asked = frame[(frame["source"] == "icl") & (frame["aggregate"] == "example")]
    assert set(asked["architecture"]) == {"transformer", "diff_v1"} and set(asked["shots"]) == {
        1,
        2,
    }
    assert len(read_results([])) == 0


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"config\.yaml") as error:
        read_results([tmp_path])
    assert "\n" not in str(error.value)


def test_a_frame_reads_back_and_refuses_other_columns(tmp_path):
    frame = make_frame(
        [{"metric": "a", "value": float("nan"), "depth": 0.5}, {"metric": "b", "n": 3}]
    )
    assert frame["value"].isna().all() and frame["n"].tolist()[1] == 3
    write_frame(frame, tmp_path / "rows.parquet")
    assert read_frame(tmp_path / "rows.parquet").equals(frame)
    write_frame(frame.drop(columns="depth"), tmp_path / "older.parquet")  # without a column of BY
    assert read_frame(tmp_path / "older.parquet").equals(frame.assign(depth=pd.NA).astype(COLUMNS))
    for other in (frame.drop(columns="value"), frame.assign(colour="red")):
        write_frame(other, tmp_path / "other.parquet")
        with pytest.raises(UserError, match="not those of the table"):
            read_frame(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="colour"):
        make_frame([{"colour": "red"}])
