"""The serving benchmark: its figures are what they say, and all of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serve.load import SIZES, STEPS, Outcome, summarise, workload
from benchmarks.serve.peers import CachedPipeline
from benchmarks.serve.systems import MODEL, PROFILE
from benchmarks.serve.tables import BEGIN, END
from magcache_core import load_profile, schedule

ROOT = Path(__file__).resolve().parents[2]


def test_the_workload_is_mixed_and_the_same_for_all() -> None:
    wishes = workload(60, seed=1)
    assert wishes == workload(60, seed=1) != workload(60, seed=2)
    assert {(wish.width, wish.height) for wish in wishes} == set(SIZES)
    assert {wish.steps for wish in wishes} == set(STEPS)
    assert len({wish.prompt for wish in wishes}) == 60
    assert workload(1, seed=1)[0].body.keys() == {"prompt", "size", "num_inference_steps", "seed"}


def test_the_figures_of_a_run() -> None:
    outcomes = [Outcome(sent, latency, 200) for sent, latency in ((0.0, 1.0), (0.0, 2.0), (1.0, 3.0))]
    outcomes += [Outcome(2.0, 0.5, 429)]
    figures = summarise(outcomes, deadline_s=2.0)
    assert figures == {
        "requests": 4,
        "failed": 1,
        "seconds": 4.0,
        "throughput": 0.75,
        "p50_s": 2.0,
        "p95_s": 2.9,
        "p99_s": 2.98,
        "goodput": 0.5,
        "in_time": 0.5,
    }
    with pytest.raises(ValueError, match=r"statuses \[429\]"):
        summarise(outcomes[3:], deadline_s=2.0)


def test_the_peer_computes_the_steps_that_the_rule_says() -> None:
    """What makes the comparison fair, also when the number of steps changes from one image to the next."""
    pipeline = CachedPipeline(str(MODEL), PROFILE, threads=1, dtype="float32")
    block = pipeline._pipeline.transformer.single_transformer_blocks[0]
    computed: list[int] = []
    block.attn.register_forward_pre_hook(lambda module, inputs: computed.append(len(inputs)))
    for wishes in ([workload(1, seed=1)[0]], workload(12, seed=3)):
        alike = [wish for wish in wishes if wish.steps == wishes[0].steps and wish.width == wishes[0].width]
        alike = [wish for wish in alike if wish.height == alike[0].height]
        computed.clear()
        files = pipeline(alike)
        assert [file[:4] for file in files] == [b"\x89PNG"] * len(alike)
        marks = schedule(load_profile(PROFILE).config(alike[0].steps))
        assert len(computed) == marks.count("C")


@pytest.mark.bench
@pytest.mark.timeout(2400)
def test_all_of_it_runs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    files = ["--out", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.png"), "--page", str(page)]
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--quick", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    document = json.loads((tmp_path / "figures.json").read_text())
    assert list(document["systems"]) == ["pipeline", "ours-tp1"]
    for system in document["systems"].values():
        for figures in (*system["closed"], *system["open"]):
            assert figures["failed"] == 0
            assert figures["throughput"] > 0
    rule = schedule(load_profile(PROFILE).config(28))
    for phase in document["denoising"].values():
        assert phase["computed"] == rule.count("C")
        assert phase["gap_per_step_s"] is not None
    assert all(isinstance(target["reached"], bool) for target in document["targets"].values())
    assert (tmp_path / "figures.png").stat().st_size > 10_000
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "old" not in written
    assert written.count("| this service, tp 1, 2 groups |") == 3
