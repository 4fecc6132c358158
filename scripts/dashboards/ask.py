"""Panels' expressions with Grafana's variables filled in, as Grafana would ask them."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.dashboards.panels import Query
from scripts.prometheus import ask

Series = list[tuple[dict[str, str], list[tuple[float, float]]]]
"""Labels, and (time in seconds, value) of each sample."""


@dataclass(frozen=True)
class Range:
    """From when to when (Unix seconds), in steps of how many seconds, with rates over which window."""

    start: float
    end: float
    step_s: float
    rate_interval: str

    def fill(self, expr: str) -> str:
        """``expr`` with everything chosen in each variable."""
        values = {
            "$__rate_interval": self.rate_interval,
            "$__range": f"{int(self.end - self.start)}s",
            "$cluster": ".*",
            "$application": ".*",
            "$replica": ".*",
        }
        for name, value in values.items():
            expr = expr.replace(name, value)
        return expr

    def series(self, url: str, query: Query) -> Series:
        """What Prometheus at ``url`` answers; samples that are not a number are left out."""
        found = ask(url, "query_range", query=self.fill(query.expr), start=self.start, end=self.end, step=self.step_s)[
            "result"
        ]
        series = [
            (each["metric"], [(float(when), float(value)) for when, value in each["values"] if value != "NaN"])
            for each in found
        ]
        return [(labels, samples) for labels, samples in series if samples]


def legend(query: Query, labels: dict[str, str]) -> str:
    """A series' name as Grafana would write it."""
    text = query.legend or ", ".join(f"{name}={value}" for name, value in sorted(labels.items()))
    for name, value in labels.items():
        text = text.replace("{{" + name + "}}", value)
    return text
