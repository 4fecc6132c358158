"""Instruments of prometheus_client made from the catalogue."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from app.metrics.catalogue import BY_NAME, CATALOGUE, COMMON, OTHER, Owner, Spec

_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)

EXEMPLAR = "request_id"
_EXEMPLAR_CHARS = 128
"""OpenMetrics' limit on an exemplar, names and values together."""


class Instruments:
    """All instruments of one owner, registered; series whose labels are known exist from the start at 0.

    A series that begins at 0 lets a rate see the first event.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        owner: Owner,
        common: Mapping[str, str],
        read_elsewhere: Container[str] = (),
    ) -> None:
        """``common`` has the values of the owner's common labels; ``read_elsewhere`` are another collector's."""
        self._common = tuple(common[name] for name in COMMON[owner])
        specs = [spec for spec in CATALOGUE if spec.owner == owner and spec.name not in read_elsewhere]
        self._made = {spec.name: _make(spec, registry) for spec in specs}
        for name, made in self._made.items():
            spec = BY_NAME[name]
            if not spec.labels:
                made.labels(*self._common)
            elif spec.from_start:
                for values in itertools.product(*spec.labels.values()):
                    made.labels(*self._common, *values)

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter of that name with its own labels' values."""
        return _of(Counter, self._made[name].labels(*self._common, *labels))

    def gauge(self, name: str, *labels: str) -> Gauge:
        """The gauge of that name with its own labels' values."""
        return _of(Gauge, self._made[name].labels(*self._common, *labels))

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The histogram of that name with its own labels' values."""
        return _of(Histogram, self._made[name].labels(*self._common, *labels))


class FirstNames:
    """The labels of the first ``limit`` names; all later ones share one, so that series stay bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        """The label of ``name``."""
        if len(self._names) < self._limit:
            self._names.add(name)
        return name if name in self._names else OTHER


def exemplar(request_id: str | None) -> dict[str, str] | None:
    """The exemplar of an observation; a long id is cut to what OpenMetrics allows."""
    return {EXEMPLAR: request_id[: _EXEMPLAR_CHARS - len(EXEMPLAR)]} if request_id else None


def _of(kind: type[_Instrument], metric: object) -> _Instrument:
    assert isinstance(metric, kind)
    return metric


def _make(spec: Spec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = (*COMMON[spec.owner], *spec.labels)
    if spec.kind == "counter":
        return Counter(spec.name, spec.help, labels, registry=registry)
    if spec.kind == "gauge":
        return Gauge(spec.name, spec.help, labels, registry=registry)
    return Histogram(spec.name, spec.help, labels, buckets=spec.buckets, registry=registry)
