"""Draws the dashboards' panels from a Prometheus' answers, as one picture for the documentation.

``python -m scripts.dashboards.render`` while `make monitoring` watches a service with traffic.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from scripts.dashboards.ask import Range, Series, legend
from scripts.dashboards.build import DASHBOARDS
from scripts.dashboards.panels import Panel, Query

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
_COLUMNS = 4
_SCALES = {"percentunit": (100.0, "%"), "bytes": (2**-20, "MiB"), "s": (1.0, "s")}


def draw(url: str, when: Range, path: Path) -> None:
    """Ask Prometheus at ``url`` for every panel that needs nothing special, and write them to the PNG ``path``."""
    boards = [
        (board.title, [panel for panel in board.panels if panel.needs is None and panel.kind != "table"])
        for board in DASHBOARDS.values()
    ]
    rows = sum(-(-len(panels) // _COLUMNS) for _, panels in boards)
    figure = plt.figure(figsize=(20, 2.6 * rows + len(boards)), layout="constrained")
    parts = figure.subfigures(len(boards), 1, height_ratios=[-(-len(panels) // _COLUMNS) for _, panels in boards])
    for part, (title, panels) in zip(np.atleast_1d(parts), boards, strict=True):
        part.suptitle(title, fontsize=15, fontweight="bold", x=0.01, ha="left")
        axes = part.subplots(-(-len(panels) // _COLUMNS), _COLUMNS, squeeze=False).flat
        for panel in panels:
            _draw(next(axes), panel, [(query, when.series(url, query)) for query in panel.queries], when)
        for unused in axes:
            unused.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _draw(axes: Any, panel: Panel, answers: list[tuple[Query, Series]], when: Range) -> None:
    factor, unit = _SCALES.get(panel.unit, (1.0, ""))
    axes.set_title(panel.title + (f" [{unit}]" if unit and panel.kind != "stat" else ""), fontsize=10)
    axes.tick_params(labelsize=7)
    named = [(legend(query, labels), samples) for query, series in answers for labels, samples in series]
    if panel.kind == "stat":
        value = named[0][1][-1][1] * factor
        axes.text(0.5, 0.5, f"{value:.3g} {unit}", ha="center", va="center", fontsize=26)
        axes.set_axis_off()
    elif panel.kind == "bargauge":
        axes.barh([name for name, _ in named], [samples[-1][1] * factor for _, samples in named], color="tab:orange")
    elif panel.kind == "heatmap":
        _heatmap(axes, named, when, cumulative=answers[0][0].buckets)
    else:
        for name, samples in named:
            times, values = np.array(samples).T
            axes.plot(times - when.start, values * factor, label=name, linewidth=1.2)
        top = max((value for _, samples in named for _, value in samples), default=0.0) * factor
        axes.set_ylim(0, 1.3 * top or 1)
        if 0 < len(named) <= 8:
            axes.legend(fontsize=6, loc="upper left")


def _heatmap(axes: Any, named: list[tuple[str, list[tuple[float, float]]]], when: Range, *, cumulative: bool) -> None:
    """Cells by time and bucket, or by time and row."""
    named = sorted(named, key=lambda each: float(each[0]))
    columns = round((when.end - when.start) / when.step_s) + 1
    cells = np.full((len(named), columns), np.nan)
    for row, (_, samples) in enumerate(named):
        for moment, value in samples:
            cells[row, round((moment - when.start) / when.step_s)] = value
    if cumulative:
        cells = np.diff(cells, axis=0, prepend=0.0)
    axes.imshow(
        np.where(cells > 0, cells, np.nan),
        origin="lower", aspect="auto", cmap="Oranges", interpolation="nearest",
        extent=(0, when.end - when.start, -0.5, len(named) - 0.5),
    )  # fmt: skip
    shown = range(0, len(named), max(len(named) // 8, 1))
    axes.set_yticks(list(shown), [f"{float(named[row][0]):g}" for row in shown])


def main() -> None:
    """Draw the last minutes."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from a running Prometheus.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back")
    parser.add_argument("--step", type=float, default=5.0, help="seconds between points")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/images/dashboards.png", help="the PNG to write")
    arguments = parser.parse_args()
    now = time.time()
    window = f"{max(int(4 * arguments.step), 20)}s"
    draw(arguments.prometheus, Range(now - 60 * arguments.minutes, now, arguments.step, window), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
