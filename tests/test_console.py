import io

from rich.console import Console

from diffx.console import Reporter, duration, figure, make_table


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
    assert [figure(n) for n in (12, 1234, 2_600_000, 1.41e9, 3e12)] == ["12", "1.23K", "2.6M", "1.41B", "3T"]
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
