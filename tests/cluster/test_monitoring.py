"""A real Prometheus scrapes the real service: every expression of panels, rules and alerts parses and has its data."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
import yaml

from scripts.dashboards.ask import Range
from scripts.dashboards.build import DASHBOARDS
from scripts.dashboards.panels import Panel
from scripts.dashboards.render import draw
from scripts.prometheus import ROOT, Prometheus, PrometheusError, ask, config_for
from tests.ops.needs import missing
from tests.patience import ANSWER_S

INTERVAL_S = 1.0
GROUPS = yaml.safe_load((ROOT / "k8s/base/rules.yaml").read_text(encoding="utf-8"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [
    pytest.param(panel, id=f"{board.uid}: {panel.title}") for board in DASHBOARDS.values() for panel in board.panels
]
TINY = {"size": "64x64", "num_inference_steps": 12}
MIX = (
    {"prompt": "a red circle on a blue background", **TINY},
    {"prompt": "a red circle on a blue background", **TINY, "magcache": {"enabled": False}},
    {"prompt": "a green square", **TINY, "negative_prompt": "a circle", "true_cfg_scale": 2.0},
    {"prompt": "two yellow triangles", "size": "128x128", "num_inference_steps": 28, "n": 2},
    {"prompt": "a blue square", **TINY, "magcache": {"computed_steps": 4}},
    # Impossible in time; or late before it gets there, on a machine that is slow to encode.
    {
        "prompt": "a red circle on a blue background",
        "size": "256x256",
        "num_inference_steps": 100,
        "magcache": {"enabled": False},
        "deadline_s": 0.2,
    },
    {"prompt": "a red circle", "size": "65x64"},
)


@pytest.fixture(scope="module")
def watched(service: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Range]]:
    """Prometheus' URL, and the time in which there was traffic."""
    if shutil.which("prometheus") is None:
        missing("prometheus is not installed (Debian's package prometheus)")
    node = ray.nodes()[0]
    config = config_for(
        service.removeprefix("http://"),
        ray_target=f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}",
        interval_s=INTERVAL_S,
    )
    with Prometheus(config, tmp_path_factory.mktemp("prometheus")) as prometheus:
        wait_for(prometheus.url, 'up{job="flux"} == 1')
        start = time.time()
        for _ in range(3):
            send_the_mix(service)
            time.sleep(2 * INTERVAL_S)
        # What happened last is scraped, and the rules have seen it.
        finished = finished_images(service)
        wait_for(prometheus.url, f"sum(flux_pictures_finished_total) >= {finished}")
        wait_for(prometheus.url, "flux:slow_requests:ratio_rate5m >= 0")
        # Ray's agents report every few seconds.
        wait_for(prometheus.url, "rate(ray_serve_deployment_request_counter_total[1m])")
        # A scrape that fails later, on a busy machine, hides nothing of what is known at this moment.
        end = wait_for(prometheus.url, 'up{job="flux"} == 1')
        yield prometheus.url, Range(start, end, INTERVAL_S, "10s")


def send_the_mix(service: str) -> None:
    with httpx.Client(base_url=service, timeout=ANSWER_S) as client, ThreadPoolExecutor(len(MIX)) as pool:
        replies = pool.map(lambda body: client.post("/v1/images/generations", json=body).status_code, MIX)
        *made, late, wrong = replies
        assert made == [200] * 5
        assert late in (422, 504)
        assert wrong == 400


def finished_images(service: str) -> float:
    text = httpx.get(f"{service}/metrics").text
    return sum(float(value) for value in re.findall(r"(?m)^flux_pictures_finished_total\{.*\} (\S+)", text))


def wait_for(url: str, expr: str) -> float:
    """The moment at which ``expr`` has an answer."""
    until = time.monotonic() + 240
    while not ask(url, "query", query=expr, time=(moment := time.time()))["result"]:
        assert time.monotonic() < until, f"{expr} has no answer"
        time.sleep(0.2)
    return moment


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_has_data(watched: tuple[str, Range], panel: Panel) -> None:
    url, when = watched
    for query in panel.queries:
        series = when.series(url, query)
        assert series or panel.needs is not None, f"{when.fill(query.expr)} has no data"


def test_variables_have_values(watched: tuple[str, Range]) -> None:
    url, _ = watched
    found = ask(url, "series", **{"match[]": "flux_group_up"})
    assert [(each["cluster"], each["application"]) for each in found] == [("local", "flux")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule.get("record"))
def test_a_rule_parses_and_what_it_asks_for_is_there(watched: tuple[str, Range], rule: dict[str, str]) -> None:
    url, when = watched
    answer = ask(url, "query", query=rule["expr"], time=when.end)["result"]
    assert answer or "alert" in rule, "a recording rule has data"
    for name in set(re.findall(r"\b(?:flux[_:][\w:]+|up\b)", rule["expr"])):
        assert ask(url, "query", query=f"count({name})", time=when.end)["result"], f"nobody exports {name}"


def test_the_rules_work_in_the_running_prometheus(watched: tuple[str, Range]) -> None:
    url, _ = watched
    rules = [rule for group in ask(url, "rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert {(rule["name"], rule["health"]) for rule in rules if rule["health"] != "ok"} == set()
    firing = [rule["name"] for rule in rules if rule.get("state") == "firing"]
    assert firing == [], "nothing is wrong"


def test_a_wrong_expression_is_noticed(watched: tuple[str, Range]) -> None:
    with pytest.raises(PrometheusError, match="parse error"):
        ask(watched[0], "query", query="sum(rate(flux_steps_total))[")
    with pytest.raises(PrometheusError, match="range"):
        ask(watched[0], "query", query="rate(flux_steps_total)")


def test_exemplars_lead_to_requests(watched: tuple[str, Range]) -> None:
    url, when = watched
    found = ask(url, "query_exemplars", query="flux_phase_duration_seconds_bucket", start=when.start, end=when.end)
    ids = {exemplar["labels"]["request_id"] for each in found for exemplar in each["exemplars"]}
    assert ids
    assert all(re.fullmatch(r"[0-9a-f-]{32,36}", each) for each in ids)


@pytest.mark.parametrize(
    "expr",
    [
        # Three rounds, and the tests before may have added to them.
        'sum(flux_request_errors_total{code=~"deadline_.*"}) >= 3',
        'sum(flux_request_errors_total{code="invalid_value"}) >= 3',
        'sum(flux_requests_total{outcome="ok"}) >= 15',
        "sum(flux_pictures_finished_total) >= 18",
        'sum(flux_prompt_cache_lookups_total{result="hit"}) >= 3',
        'sum(flux_steps_total{branch="uncond"}) >= 36',
        "sum(flux_saved_seconds_total) > 0",
        "sum(flux_digests_checked_total) > sum(flux_step_duration_seconds_count)",
        "count(count by (rank) (flux_rank_step_duration_seconds_count)) == 2",
    ],
)
def test_the_figures_are_those_of_the_traffic(watched: tuple[str, Range], expr: str) -> None:
    url, when = watched
    assert ask(url, "query", query=expr, time=when.end)["result"]


def test_the_images_of_the_dashboards_can_be_drawn(watched: tuple[str, Range], tmp_path: Path) -> None:
    url, when = watched
    draw(url, when, tmp_path / "dashboards.png")
    assert (tmp_path / "dashboards.png").stat().st_size > 100_000
