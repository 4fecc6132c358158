"""The committed dashboards are what the code makes, and keep the conventions that let them load anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.metrics import CATALOGUE
from scripts.dashboards.build import DASHBOARDS, rendered
from scripts.dashboards.panels import Dashboard, Panel

FOLDER = Path(__file__).resolve().parents[2] / "k8s/base/dashboards"
TYPES = {"timeseries", "stat", "heatmap", "table", "bargauge"}
PANELS = [
    pytest.param(panel, id=f"{dashboard.uid}: {panel.title}")
    for dashboard in DASHBOARDS.values()
    for panel in dashboard.panels
]


def loaded(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return document


def test_the_committed_files_are_what_the_code_makes() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.json")}
    assert files == rendered(), "run `make dashboards`"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_conventions(name: str) -> None:
    document = loaded(name)
    assert document["uid"] == DASHBOARDS[name].uid
    variables = {each["name"]: each for each in document["templating"]["list"]}
    assert list(variables) == ["datasource", "cluster", "application", "replica"]
    assert variables["datasource"]["type"] == "datasource"
    # Each choice depends on those before it.
    queries = [variables[each]["query"]["query"] for each in ("cluster", "application", "replica")]
    assert [re.findall(r"\$(\w+)", query) for query in queries] == [[], ["cluster"], ["cluster", "application"]]
    panels = [panel for panel in document["panels"] if panel["type"] != "row"]
    assert {panel["type"] for panel in panels} <= TYPES
    assert len({panel["id"] for panel in panels}) == len(panels) == len(DASHBOARDS[name].panels)
    for panel in panels:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in loaded(name)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_explains_itself(panel: Panel) -> None:
    assert re.fullmatch(r"[A-Z].{20,}\.", panel.description), panel.description
    assert panel.queries
    for query in panel.queries:
        windows = re.findall(r"\[([^\]]+)\]", query.expr)
        assert set(windows) <= {"$__rate_interval", "$__range"}
        if not query.expr.startswith("ALERTS"):
            assert '$cluster"' in query.expr
        asked = set(re.findall(r"\bflux_\w+", query.expr))
        assert asked <= _series(), asked - _series()


def _series() -> set[str]:
    histograms = {f"{spec.name}_{part}" for spec in CATALOGUE if spec.buckets for part in ("bucket", "sum", "count")}
    return histograms | {spec.series for spec in CATALOGUE if not spec.buckets}


@pytest.mark.parametrize("dashboard", DASHBOARDS.values(), ids=lambda dashboard: dashboard.uid)
def test_beside_each_latency_percentile_there_is_its_heatmap(dashboard: Dashboard) -> None:
    for row in dashboard.rows:
        for panel, neighbour in zip(row.panels, (*row.panels[1:], None), strict=True):
            if any("histogram_quantile" in query.expr for query in panel.queries):
                assert neighbour is not None
                assert neighbour.kind == "heatmap"
                (bucket,) = set(re.findall(r"flux_\w+_bucket", panel.queries[0].expr))
                assert bucket in neighbour.queries[0].expr
                assert neighbour.width == panel.width


def test_every_metric_is_shown_somewhere() -> None:
    text = "".join(query.expr for board in DASHBOARDS.values() for panel in board.panels for query in panel.queries)
    missing = {spec.name for spec in CATALOGUE if spec.name not in text}
    # The objective's own recording rules show this one.
    assert missing <= {"flux_pictures_admitted"}
