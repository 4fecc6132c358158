from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scheduler_sim import growth, main


def test_it_measures_draws_and_tells_growth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sim.json"
    main(["--out", str(out), "--ticks", "5", "--scale", "10"])
    document = json.loads(out.read_text())
    assert [cell["active"] for cell in document["by_active"]] == [1, 3, 10, 30, 100]
    assert [cell["queued"] for cell in document["by_queued"]] == [0, 100, 1000, 10000]
    assert all(0 < cell["rows_per_plan"] <= cell["active"] for cell in document["by_active"])
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert "under way" in capsys.readouterr().out


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_growth_is_the_exponent(exponent: int) -> None:
    cells = [{"active": n, "tick_us": {"p50": 3.0 * n**exponent}} for n in (10, 100, 1000)]
    assert growth(cells, "active") == pytest.approx(exponent, abs=1e-6)
