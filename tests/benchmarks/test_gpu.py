from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from app.engine.geometry import Geometry
from benchmarks import gpu
from benchmarks.checkpoints.geometry import repository
from benchmarks.roofline import step_flops

TINY = ["--scale", "tiny", "--device", "cpu", "--size", "64", "--dtype", "float32", "--text-tokens", "16"]


def test_it_runs_at_tiny_scale_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main([*TINY, "--compiler", "eager", "--repeats", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    # The authors' schedule at 28 steps; diffusers' rule knows no protected step and computes one fewer.
    assert report["schedule"] == "CCC..C...C.C.....C.....C..C."
    eager, compiled = report["variants"]
    assert (eager["name"], compiled["name"]) == ("native, eager", "native, compiled")
    for variant in (eager, compiled):
        assert variant["total_over_computed"] == pytest.approx(28 / 9)
        assert variant["diffusers_magcache_schedule"] == "CCC..C...C.....C.....C....C."
        assert variant["difference_to_diffusers"] < 1e-4
        assert variant["computed_step_s"] > 0
        assert variant["reused_step_s"] > 0
    assert "needs CUDA" in report["left_out"]["xformers"]
    assert report["roofline"]["least_step_s"] > 0


def test_it_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.main([*TINY, "--attention", "native", "--budget-s", "0", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["variants"] == []
    assert report["left_out"].keys() == {"native, eager", "native, compiled"}


def test_flops_of_a_step_are_those_of_its_matrix_products() -> None:
    part = repository("flux.1-dev", "tiny").parts["transformer"]
    geometry, text = Geometry.of(64, 96), 16
    image, dim, channels = geometry.tokens, 96, 64
    joint = image + text
    linear = lambda rows, fan_in, fan_out: 2 * rows * fan_in * fan_out  # noqa: E731
    attention = 2 * linear(joint, dim, joint)
    double = (
        linear(joint, dim, 4 * dim)  # q, k, v and out
        + 2 * linear(joint, dim, 4 * dim)  # MLP in and out
        + 2 * linear(1, dim, 6 * dim)  # modulation
        + attention
    )
    single = linear(joint, dim, 3 * dim) + linear(joint, dim, 4 * dim) + linear(joint, 5 * dim, dim)
    single += linear(1, dim, 3 * dim) + attention
    ends = linear(image, channels, dim) + linear(text, 64, dim) + linear(1, dim, 2 * dim) + linear(image, dim, channels)
    time = 2 * (linear(1, 256, dim) + linear(1, dim, dim)) + linear(1, 32, dim) + linear(1, dim, dim)
    assert step_flops(part, geometry, text) == 2 * double + 3 * single + ends + time


def test_full_geometry_takes_about_sixty_teraflops_a_step() -> None:
    """2 x tokens x 11.9 B parameters less the modulation, which sees one token, and attention on top."""
    part = repository("flux.1-dev", "full").parts["transformer"]
    assert 5.5e13 < step_flops(part, Geometry.of(1024, 1024), 512) < 8e13


def test_random_weights_are_a_function_of_the_seed() -> None:
    from benchmarks.checkpoints import weights
    from benchmarks.gpu_runs import random_transformer

    part = repository("flux.1-dev", "tiny").parts["transformer"]
    cpu = torch.device("cpu")
    first, again, other = (random_transformer(weights.build(part), cpu, torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)
