"""Dashboards as Grafana's JSON, with Grafana's own SDK."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from scripts.dashboards.magcache import MAGCACHE
from scripts.dashboards.panels import Dashboard, Panel, Query, Row
from scripts.dashboards.service import SERVICE

DASHBOARDS = {"service.json": SERVICE, "magcache.json": MAGCACHE}
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT = 8
_STAT_HEIGHT = 4


def rendered() -> dict[str, str]:
    """The text of every dashboard by its file's name."""
    return {name: to_json(each) for name, each in DASHBOARDS.items()}


def to_json(source: Dashboard) -> str:
    """``source`` as Grafana imports it."""
    built = (
        dashboard.Dashboard(source.title)
        .uid(source.uid)
        .description(source.description)
        .tags(["flux"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .timezone("browser")
        .link(dashboard.DashboardLink("FLUX").type(models.DashboardLinkType.DASHBOARDS).tags(["flux"]).keep_time(True))
    )
    for variable in _variables():
        built.with_variable(variable)
    number = 0
    for row in source.rows:
        built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            number += 1
            built.with_panel(_panel(panel, row).id(number))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variables() -> list[Any]:
    """The data source, and then each choice among those that the ones before it leave."""
    chain = (
        ("cluster", "Cluster", "flux_build_info"),
        ("application", "Application", 'flux_build_info{cluster=~"$cluster"}'),
        ("replica", "Replica", 'flux_group_up{cluster=~"$cluster", application=~"$application"}'),
    )
    return [
        dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"),
        *(
            dashboard.QueryVariable(name)
            .label(label)
            .query({"query": f"label_values({series}, {name})", "refId": name})
            .datasource(SOURCE)
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(models.VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(models.VariableOption(text="All", value="$__all", selected=True))
            for name, label, series in chain
        ),
    ]


def _panel(panel: Panel, row: Row) -> Any:
    made = _KINDS[panel.kind](panel)
    height = _STAT_HEIGHT if all(each.kind == "stat" for each in row.panels) else _HEIGHT
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    made.height(height).span(panel.width)
    for index, query in enumerate(panel.queries):
        made.with_target(_target(panel, query, "ABCDEFGH"[index]))
    return made


def _target(panel: Panel, query: Query, name: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(name).datasource(SOURCE).expr(query.expr).legend_format(query.legend)
    if panel.kind == "table":
        return target.format(PromQueryFormat.TABLE).instant()
    if panel.kind in ("stat", "bargauge"):
        return target.instant()
    if panel.kind == "heatmap":
        # Grafana takes cumulative buckets apart; other series are the rows themselves.
        return target.format(PromQueryFormat.HEATMAP if query.buckets else PromQueryFormat.TIME_SERIES).range()
    # Dots beside the lines are single requests: their id is in the tooltip.
    return target.range().exemplar(panel.unit == "s")


def _timeseries(panel: Panel) -> timeseries.Panel:
    legend = common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST).show_legend(True)
    made = (
        timeseries.Panel()
        .legend(legend.placement(common_models.LegendPlacement.BOTTOM))
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .fill_opacity(20 if panel.stacked else 5)
        .min(0)
    )
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    return made


def _heatmap(panel: Panel) -> heatmap.Panel:
    scheme = heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
    made = heatmap.Panel().calculate(False).color(scheme).show_legend().cell_gap(1)
    if panel.queries[0].buckets:
        return made.y_axis(heatmap.YAxisConfig().unit(panel.unit))
    return made.cell_values(heatmap.CellValues().unit(panel.unit))


def _stat(panel: Panel) -> stat.Panel:
    return stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).no_value("no data")


def _bargauge(panel: Panel) -> bargauge.Panel:
    reduced = common.ReduceDataOptions().calcs(["lastNotNull"])
    return bargauge.Panel().reduce_options(reduced).orientation(common_models.VizOrientation.HORIZONTAL).min(0).max(1)


def _table(panel: Panel) -> table.Panel:
    return table.Panel().show_header(True).no_value("nothing")


_KINDS: dict[str, Callable[[Panel], Any]] = {
    "timeseries": _timeseries,
    "heatmap": _heatmap,
    "stat": _stat,
    "bargauge": _bargauge,
    "table": _table,
}
