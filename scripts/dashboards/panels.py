"""Panels as plain data: what they ask Prometheus, in which unit they show it, and a sentence of what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["timeseries", "stat", "heatmap", "table", "bargauge"]

FLUX = 'cluster=~"$cluster", application=~"$application"'
"""Picks the API's and the encoder's metrics by the dashboard's variables."""
GROUP = f'{FLUX}, replica=~"$replica"'
"""Picks the coordinators' metrics."""
SERVE = 'cluster=~"$cluster", application=~"$application"'
NODE = 'cluster=~"$cluster"'
RATE = "$__rate_interval"
"""Grafana's own window, wide enough for a rate at any zoom."""


@dataclass(frozen=True)
class Query:
    """An expression, and the legend of its series (Grafana's ``{{label}}``)."""

    expr: str
    legend: str = ""

    @property
    def buckets(self) -> bool:
        """Whether the series are a histogram's cumulative buckets."""
        return self.legend == "{{le}}"


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's name of a unit.
        width: of the 24 columns.
        needs: what must be there for the panel to have data beside the service and some traffic: ``gpu``, API
            ``keys``, a folder of ``loras``, or ``event`` for something that does not happen by itself.
        stacked: time series add up to a whole.
    """

    title: str
    description: str
    kind: Kind
    unit: str
    queries: tuple[Query, ...]
    width: int = 12
    needs: Literal["gpu", "keys", "loras", "event"] | None = None
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """A row of panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard; ``uid`` is part of its address and never changes."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in reading order."""
        return tuple(panel for row in self.rows for panel in row.panels)


def rate(series: str, by: str, labels: str) -> str:
    """Events per second, summed by the labels ``by``."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({series}{{{labels}}}[{RATE}]))"


def share(series: str, part: str, by: str, labels: str) -> str:
    """The share of a counter's events that ``part`` (one more matcher) picks."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({series}{{{labels}, {part}}}[{RATE}])) / {rate(series, by, labels)}"


def mean(histogram: str, by: str, labels: str) -> str:
    """Mean of a histogram's observations."""
    return f"{rate(f'{histogram}_sum', by, labels)} / {rate(f'{histogram}_count', by, labels)}"


def quantile(q: float, histogram: str, by: str, labels: str) -> str:
    """A quantile of a histogram, interpolated within a bucket."""
    grouping = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, {rate(f'{histogram}_bucket', grouping, labels)})"


def quantiles(histogram: str, labels: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile of a histogram."""
    return tuple(
        Query(quantile(q, histogram, "", labels), legend) for q, legend in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    )


def distribution(histogram: str, labels: str) -> tuple[Query, ...]:
    """A histogram's buckets as a heatmap takes them."""
    buckets = f"sum by (le) (increase({histogram}_bucket{{{labels}}}[{RATE}]))"
    return (Query(buckets, "{{le}}"),)
