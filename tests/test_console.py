import io
import types

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from diffx.console import SWEEP_JOB, Reporter, duration, figure, make_table


def reporter(terminal, width=100):
    one = Reporter()
    one.console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)
    return one, one.console.file


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    one, out = reporter(False)
    one.open_log(tmp_path / "train.log")
    with one.progress("step", 100) as bar:
        for done in range(1, 101):
            bar.at(done, "loss 1.0", always=done == 50)
    one.warn("odd")
    one.table(make_table("T", ["a", "b"], [["x", 1]]))
    one.close_log()
    text = out.getvalue()
    assert text.startswith("step 50/100  loss 1.0  ETA 0:00\n")  # one line, not a hundred
    assert "\x1b" not in text
    log = (tmp_path / "train.log").read_text()
    assert "step 50/100" in log
    assert "warning: odd" in log
    assert "x" in log


def test_a_bar_on_a_terminal_and_lines_that_stay():
    one, out = reporter(True)
    with one.progress("step", 10, done=3) as bar:
        bar.at(7, "note", always=True)
    text = out.getvalue()
    assert "step 7/10  note" in text
    assert "ETA" in text


def test_markup_in_text_is_text():
    one, out = reporter(False)
    one.line("[bold]x[/bold] [/]")
    assert out.getvalue() == "[bold]x[/bold] [/]\n"


def test_quiet_prints_nothing(capsys):
    Reporter(quiet=True).line("x")
    assert capsys.readouterr().out == ""


def test_figures_are_short():
    assert [figure(n) for n in (12, 1234, 2_600_000, 1.41e9, 3e12)] == [
        "12",
        "1.23K",
        "2.6M",
        "1.41B",
        "3T",
    ]
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


@pytest.mark.parametrize("steps", [3500, 10**6])
def test_bars_are_whole_at_80_columns(steps):
    one, _ = reporter(True, width=80)
    note = "loss 2.9462  val 3.0123  7.71K tok/s"
    with one.progress("step", steps) as bar:
        bar.at(steps // 3, note)
        with one.progress("val", 65536) as inner:
            inner.at(1024)
            screen = Console(
                file=io.StringIO(), width=80, color_system="truecolor", force_terminal=True
            )
            screen.print(one._bars.get_renderable())
    outer, validation, _ = Text.from_ansi(screen.file.getvalue()).plain.split("\n")
    for line, parts in (
        (outer, ["step", f"{steps // 3}/{steps}", note]),
        (validation, ["val ", "1024/65536"]),
    ):
        assert cell_len(line) <= 80 and all(
            part in line for part in [*parts, "ETA -:--:--", "━━━"]
        ), line


def test_what_a_bar_shows_reaches_the_log(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr("diffx.console.time.monotonic", lambda: next(clock))
    one, _ = reporter(True)
    one.open_log(tmp_path / "train.log")
    one._bars = bars = types.SimpleNamespace(
        add_task=lambda *_, **__: 0, update=lambda *_, **__: None, remove_task=lambda _: None
    )
    with one.progress("step", 9) as bar:
        for step in range(1, 5):
            bar.at(step, f"loss {step}.5")
    one.close_log()
    assert one._bars is bars
    told = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ")[1] for line in told] == ["loss 2.5", "loss 4.5"], "every ten seconds"


def test_lines_and_tables_name_the_job_of_a_sweep(tmp_path):
    token = SWEEP_JOB.set("3 (data.path=[a,b])")
    one, out = reporter(False)
    SWEEP_JOB.reset(token)
    one.open_log(tmp_path / "train.log")
    one.line("x")
    one.warn("y")
    one.table(make_table("T", ["a", "b"], [["x", 1]]))
    one.close_log()
    lines = out.getvalue().splitlines()
    job = "job 3 (data.path=[a,b]): "
    assert lines[:3] == [f"{job}x", f"{job}warning: y", f"{job}T"]
    assert "job 3" not in (tmp_path / "train.log").read_text()
