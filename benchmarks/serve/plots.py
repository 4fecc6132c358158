"""Draws `benchmarks.serving`'s figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the backend has to be chosen before

COLOURS = {"pipeline": "tab:gray", "batched": "tab:orange", "ours-tp1": "tab:blue", "ours-tp2": "tab:cyan"}


def draw(document: dict[str, Any], path: Path) -> None:
    """Throughput and latency against clients, goodput and latency against arrival rate."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for name, system in document["systems"].items():
        colour, label = COLOURS[name], system["label"]
        clients = [run["clients"] for run in system["closed"]]
        rates = [run["rate"] for run in system["open"]]
        axes[0, 0].plot(clients, [run["throughput"] for run in system["closed"]], "o-", color=colour, label=label)
        axes[0, 1].plot(clients, [run["p50_s"] for run in system["closed"]], "o-", color=colour, label=f"{label}, p50")
        axes[0, 1].plot(clients, [run["p99_s"] for run in system["closed"]], "x:", color=colour, label=f"{label}, p99")
        axes[1, 0].plot(rates, [run["in_time"] for run in system["open"]], "o-", color=colour, label=label)
        axes[1, 1].plot(rates, [run["p95_s"] for run in system["open"]], "o-", color=colour, label=label)
    titles = (
        ("Closed loop: throughput", "clients", "images / s"),
        ("Closed loop: latency", "clients", "s"),
        (f"Poisson arrivals: share within {document['deadline_s']:.2f} s", "requests / s", "share"),
        ("Poisson arrivals: 95th percentile of latency", "requests / s", "s"),
    )
    for axis, (title, x, y) in zip(axes.flat, titles, strict=True):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
    axes[0, 1].set_yscale("log")
    axes[1, 1].set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
