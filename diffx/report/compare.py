"""``diffx compare``: one table, one picture and one JSON file out of several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from diffx.config.checks import refuse
from diffx.console import Reporter, figure, make_table
from diffx.report.write import write_report
from diffx.results import plot
from diffx.results.runs import group_runs, read_runs, sweep_jobs
from diffx.results.training import analyse
from diffx.results.verdict import ends

_INTERVAL = "[95% interval]"
_Shown = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]  # groups, each with its look


def compare_runs(paths: list[Path], out: Path | None = None) -> None:
    """Print a table over runs, and draw their loss curves.

    Args:
        paths: run folders of ``diffx train`` or of ``diffx adapt-dex``, or their sweep folders.
        out: the picture, with every figure in a JSON file beside it; None is ``compare.png`` in the
            sweep folder if one alone was given, and no picture otherwise.

    Raises:
        UserError: a folder is no run, a file in it is damaged, none of the runs has a validation,
            or ``out`` is no picture's name.
        RunError: the picture cannot be written.
    """
    if out is None and len(paths) == 1 and sweep_jobs(paths[0]):
        out = paths[0] / "compare.png"
    plot.check_picture("out", out)
    reporter = Reporter()
    measured = []
    for run in read_runs(paths):
        if run.curve("val/loss")[0].size:
            measured.append(run)
        else:
            reporter.warn(f"{run.path} is left out: it has no validation yet")
    refuse(not measured, f"RUN={paths[0]}", "no run given has a validation loss yet")
    report = analyse(group_runs(measured))
    rows = [_cells(group) for group in report["groups"]]
    title = f"runs: {len(measured)}, groups: {len(rows)}"
    reporter.table(make_table(title, rows[0], [row.values() for row in rows]))
    write_report(report, out, draw, reporter)


def _cells(group: dict[str, Any]) -> dict[str, str]:
    """The texts of a group by column; an adaptation has its difference to the base."""
    count, equal, loss = group["parameters"], group["tokens_at_equal_loss"], group["val/loss"]
    bpb, speed, adapted = group["val/bpb"], group["tokens_per_second"], group["adapted"]
    parts = ("trained",) if adapted else ("embedding", "rest")
    sizes = " + ".join(figure(count[part]) for part in parts) if count else "-"
    std = "" if loss["std"] is None else f" ± {loss['std']:.4f} (n={len(loss['by_seed'])})"
    is_baseline = group["baseline"] == group["label"]
    cells = {
        "runs": group["label"],
        "seeds": " ".join(map(str, group["seeds"])),
        f"parameters\n({' + '.join(parts)})": sizes,
        "tokens": figure(group["tokens"]),
        "final val loss": f"{loss['mean']:.4f}{std}",
        "bpb": f"{bpb['mean']:.4f}" if bpb else "-",
        f"difference\n{_INTERVAL}": "baseline" if is_baseline else _gap(group["difference"]),
    }
    if adapted:
        cells[f"to the base\n{_INTERVAL}"] = _gap(group["difference_to_base"])
    else:
        cells["tokens at\nequal loss"] = f"{equal['ratio']:.1%}" if equal else "-"
    return cells | {"tokens/s": figure(speed) if speed else "-"}


def _gap(gap: dict[str, Any] | None) -> str:
    return f"{gap['mean']:+.4f}{ends(gap)}" if gap else "-"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draw the comparison that ``analyse`` returned, in the format of the path's suffix."""
    groups, scaling = report["groups"], report["scaling"]
    kinds = [group["kind"] for group in groups]
    looks = [plot.look(number) for number in range(len(groups))]
    if scaling:  # a colour is an architecture, and a line is a size
        colours = list(dict.fromkeys(kinds))
        looks = [plot.look(colours.index(k), kinds[:i].count(k)) for i, k in enumerate(kinds)]
    shown = list(zip(groups, looks, strict=True))
    differences = [(group, look) for group, look in shown if group["difference_curve"]]
    panels = 2 if scaling or differences else 1
    columns = min(panels, len(groups))
    canvas, axes = plot.canvas(1, panels, width=6.4, height=5 + 0.2 * len(groups) / columns)
    _curves(axes[0], shown, "curve", [min(group["curve"]["low"]) for group in groups])
    plot.style(axes[0], "Validation loss", "training tokens", "nats per token")
    note = (
        "final validation loss: mean ± standard deviation over seeds; bands: lowest to highest seed"
    )
    plot.shared_legend(canvas, axes[0], note, columns)
    if scaling:
        _scaling_panel(axes[1], scaling, dict(zip(kinds, looks, strict=True)))
    elif differences:
        _curves(axes[1], differences, "difference_curve", [0.0])
        axes[1].axhline(0, color="#444444", linewidth=1)
        baselines = {group["baseline"] for group, _ in differences}
        base = baselines.pop() if len(baselines) == 1 else "the baseline"
        ylabel = "nats per token (below 0 is better)"
        plot.style(axes[1], f"Difference to {base}, seed by seed", "training tokens", ylabel)
    plot.save(canvas, path)


def _curves(axes: Axes, shown: _Shown, key: str, values: list[float]) -> None:
    """Draw curves; ``values`` are in view whatever the curves are."""
    end = max(group[key]["tokens"][-1] for group, _ in shown)
    for group, look in shown:
        loss, curve = group["val/loss"], group[key]
        spread = f" ± {loss['std']:.3f}" if loss["std"] is not None else ""
        label = f"{group['label']}: {loss['mean']:.3f}{spread}"
        tokens, mean, low, high = (curve[name] for name in ("tokens", "mean", "low", "high"))
        plot.curve(axes, tokens, mean, low, high, label, look)
        # The first steps fall from ln(vocabulary) and would flatten the rest of the curve.
        late = [i for i, count in enumerate(tokens) if count >= 0.1 * end] or [-1]
        values = [*values, *(side[i] for side in (low, high) for i in late)]
    if margin := 0.05 * (max(values) - min(values)):
        axes.set_ylim(min(values) - margin, max(values) + margin)
    plot.token_axis(axes)


def _scaling_panel(axes: Axes, scaling: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    for law in scaling["laws"]:
        colour, sizes = looks[law["kind"]]["color"], law["parameters"]
        grid = np.geomspace(min(sizes) / 1.15, max(sizes) * 1.15, 100)
        floor = f" + {law['c']:.2f}" if law["c"] else ""
        label = f"{law['kind']}: {law['a']:.3g}·N$^{{{-law['b']:.3f}}}${floor}"
        fitted = law["a"] * grid ** -law["b"] + law["c"]
        axes.plot(grid, fitted, color=colour, linewidth=1.8, label=label)
        axes.plot(sizes, law["losses"], "o", color=colour, markersize=5.5)
    axes.set(xscale="log", yscale="log")
    ylabel = "final validation loss, nats per token"
    plot.style(axes, "Loss against size", "parameters N without embeddings", ylabel)
    sizes = scaling["laws"][0]["parameters"]
    axes.set_xticks(sizes, [figure(n) for n in sizes])
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=10)
