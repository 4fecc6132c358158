"""Recording and alert rules: promtool checks and unit-tests them, and every alert tells what it means."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.metrics import CATALOGUE
from tests.ops.needs import missing

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "k8s/base/rules.yaml"
UNIT_TESTS = ROOT / "tests/ops/rules_test.yaml"

GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"] if "alert" in rule]
NAMES = {
    "FluxSkipRatioCollapsed",
    "FluxLatencyBurn",
    "FluxQueueFull",
    "FluxGroupRebuilding",
    "FluxDigestMismatch",
    "FluxStraggler",
    "FluxNoReadyReplica",
}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        missing("promtool is not installed (Debian's package prometheus)")
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False)


def test_promtool_accepts_the_rules_and_the_config() -> None:
    for arguments in (("check", "rules", RULES), ("check", "config", ROOT / "k8s/prometheus.yml")):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", UNIT_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = yaml.safe_load(UNIT_TESTS.read_text(encoding="utf-8"))["tests"]
    expected = [each for case in cases for each in case.get("alert_rule_test", [])]
    assert {each["alertname"] for each in expected if each["exp_alerts"]} == NAMES
    assert {each["alertname"] for each in expected if not each["exp_alerts"]} == NAMES


def test_the_unit_tests_notice_a_rule_that_changed(tmp_path: Path) -> None:
    changed = RULES.read_text(encoding="utf-8").replace("[30m]) > 1.5", "[30m]) > 0.5")
    (tmp_path / "rules.yaml").write_text(changed, encoding="utf-8")
    unit_tests = UNIT_TESTS.read_text(encoding="utf-8").replace("../../k8s/base/rules.yaml", "rules.yaml")
    (tmp_path / "rules_test.yaml").write_text(unit_tests, encoding="utf-8")
    done = promtool("test", "rules", tmp_path / "rules_test.yaml")
    assert done.returncode != 0
    assert "FluxGroupRebuilding" in done.stdout + done.stderr


def test_the_alerts() -> None:
    assert {rule["alert"] for rule in ALERTS} == NAMES


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert all(text[-1] == "." for key, text in rule["annotations"].items() if key != "runbook_url")
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = (ROOT / page).read_text(encoding="utf-8").splitlines()
    # A heading of one word is its own anchor, in lower case.
    assert f"### {rule['alert']}" in headings
    assert anchor == rule["alert"].lower()


def test_rules_ask_for_metrics_that_exist() -> None:
    known = {spec.series for spec in CATALOGUE}
    known |= {f"{spec.name}_{part}" for spec in CATALOGUE for part in ("bucket", "sum", "count") if spec.buckets}
    recorded = {rule["record"] for group in GROUPS for rule in group["rules"] if "record" in rule}
    for group in GROUPS:
        for rule in group["rules"]:
            asked = set(re.findall(r"\bflux[_:][\w:]+", rule["expr"]))
            assert asked, rule
            assert asked <= known | recorded, asked - known - recorded
