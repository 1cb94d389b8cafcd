"""Declared pictures: what is drawn where."""

import pytest

from diffx.results import plot
from diffx.results.aggregate import aggregate
from diffx.results.declare import Declaration, Metric, Picture, Reference, Table
from diffx.results.draw import draw_results
from diffx.results.table import EXAMPLE, make_frame

ROWS = [
    {"metric": "acc", "aggregate": EXAMPLE, "example": f"{n}", "value": value, **columns}
    for columns, values in (
        ({"task": "t", "shots": 1}, (0.0, 1.0, 0.0, 0.0)),
        ({"task": "t", "shots": 4}, (1.0, 1.0, 0.0, 1.0)),
    )
    for n, value in enumerate(values)
]


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Draw a picture of ``ROWS`` and give its panels."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))

    def drawn(picture):
        declaration = Declaration(
            metrics=[Metric(name="acc")],
            tables=[Table(by=["task", "shots"], label="{task} {shots}")],
            pictures=[picture],
            references=[
                Reference(label="guessing", metric="acc", value=0.4, by={"task": "t"}),
                Reference(label="paper", metric="acc", value=0.9, by={"task": "t", "shots": 4}),
                Reference(label="gain", metric="acc", value=0.7, by={"task": "t"}, gain=True),
            ],
        )
        frame = make_frame(ROWS)
        rows = aggregate(frame, declaration)
        draw_results(rows, frame.to_dict("records"), declaration, "tiny", tmp_path / "p.png")
        return figures[-1].axes

    return drawn


def test_a_curve_with_its_band_and_its_level(panels):
    (axes,) = panels(Picture(kind="curve", title="{panel}", x="shots", panels=["task"]))
    curve, level = axes.get_lines()
    assert list(curve.get_xdata()) == [1, 4] and list(curve.get_ydata()) == [0.25, 0.75]
    assert set(level.get_ydata()) == {0.4} and level.get_label() == "guessing, acc"
    assert axes.get_title(loc="left") == "t" and axes.get_ylabel() == "share"
    assert len(axes.collections) == 1, "the band"


def test_bars_and_what_is_published_for_one_of_them(panels):
    (axes,) = panels(Picture(kind="bars", title="bars"))
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75]
    (marker,) = axes.collections
    assert marker.get_offsets().tolist() == [[1.0, 0.9]] and marker.get_label() == "paper"


def test_points_with_their_intervals_a_line_each(panels):
    (axes,) = panels(Picture(kind="intervals", title="{panel}", panels=["unit"]))
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert [float(line.get_xdata()[0]) for line in points] == [0.25, 0.75]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["t 1", "t 4"]


def test_a_heat_map_has_a_cell_for_each_row(panels):
    picture = Picture(kind="heat", title="h", x="shots", y="task")
    axes, bar = panels(picture)
    assert axes.images[0].get_array().tolist() == [[0.25, 0.75]]
    assert bar.get_ylabel() == "share"
