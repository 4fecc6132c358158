"""Several sources of metrics as one valid exposition."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.metrics_core import Metric


def merge_families(*sources: Iterable[Metric]) -> list[Metric]:
    """One family per name with the samples of all sources, sorted by name, so that the exposition is valid.

    Raises:
        ValueError: two sources give one name different types, or one series twice.
    """
    merged: dict[str, Metric] = {}
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for family in (family for source in sources for family in source):
        target = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type, family.unit))
        if target.type != family.type:
            raise ValueError(f"metric {family.name} is a {target.type} in one source and a {family.type} in another")
        for sample in family.samples:
            series = sample.name, tuple(sorted(sample.labels.items()))
            if series in seen:
                raise ValueError(f"metric series {sample.name}{sample.labels} comes from two sources")
            seen.add(series)
            target.samples.append(sample)
    return [merged[name] for name in sorted(merged)]


class Families:
    """Metric families in the shape of a registry, as prometheus_client's exposition functions take them."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """The families."""
        return self._families
