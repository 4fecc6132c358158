"""`benchmarks.serving`'s figures as Markdown, put into the page that explains them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- serving: written by benchmarks/serving.py -->", "<!-- serving: end -->"


def markdown(document: dict[str, Any]) -> str:
    """Tables of one run: what was to be reached, closed loops, arrivals, denoising."""
    systems, bare = document["systems"].values(), document["bare"]
    closed = _table(
        ["system", "clients", "images/s", "p50", "p95", "p99"],
        (
            [system["label"], str(run["clients"]), f"{run['throughput']:.2f}", *_latencies(run)]
            for system in systems
            for run in system["closed"]
        ),
    )
    arrivals = _table(
        ["system", "requests/s", "in time", "goodput/s", "p50", "p95", "p99"],
        (
            [system["label"], f"{run['rate']:.2f}", f"{run['in_time']:.0%}", f"{run['goodput']:.2f}", *_latencies(run)]
            for system in systems
            for run in system["open"]
        ),
    )
    denoising = _table(
        ["model", "computed", "uncached", "cached", "speed-up", "possible", "share", "gap per step"],
        (
            [
                name,
                f"{phase['computed']} of {phase['steps']}",
                f"{phase['uncached_s']:.3f} s",
                f"{phase['cached_s']:.3f} s",
                f"{phase['speed_up']:.2f}",
                f"{phase['possible']:.2f}",
                f"{phase['ratio']:.2f}",
                f"{phase['gap_per_step_s'] * 1e6:.0f} µs, {phase['gap_share']:.1%} of a computed step",
            ]
            for name, phase in document["denoising"].items()
        ),
    )
    turns = _table(
        list(document["in_turns"][0]), ([f"{v:.3g}" for v in turn.values()] for turn in document["in_turns"])
    )
    targets = _table(
        ["what", "measured", "wanted", ""],
        (
            [name, f"{target['measured']:.2f}", target["wanted"], "reached" if target["reached"] else "**missed**"]
            for name, target in document["targets"].items()
        ),
    )
    machine = f"{document['machine']}; {document['software']}; {document['threads']} threads for the transformer."
    return "\n\n".join(
        [
            machine,
            targets,
            "The first two are medians of rounds in which both are up and take turns:",
            turns,
            f"Closed loops (latency in seconds). The bare pipeline without Serve: {bare['throughput']:.2f} images/s, "
            f"p50 {bare['p50_s']:.3f} s.",
            closed,
            f"Poisson arrivals; in time is within {document['deadline_s']:.2f} s.",
            arrivals,
            "Denoising, one client:",
            denoising,
        ]
    )


def fill(path: Path, text: str) -> None:
    """Replace what stands between the two marks in ``path``.

    Raises:
        ValueError: the marks are not there.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _latencies(run: dict[str, float]) -> list[str]:
    return [f"{run[name]:.3f}" for name in ("p50_s", "p95_s", "p99_s")]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
