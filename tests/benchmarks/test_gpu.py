from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.geometry import Geometry
from benchmarks import gpu, gpu_process
from benchmarks.checkpoints.geometry import repository
from benchmarks.gpu_models import Models
from benchmarks.gpu_runs import random_model
from benchmarks.gpu_variants import ORDER, chosen
from benchmarks.gpu_worker import Bench, measures
from benchmarks.roofline import step_flops

ROOT = Path(__file__).parents[2]
TINY = ["--scale", "tiny", "--device", "cpu", "--size", "64", "--small", "32", "--dtype", "float32"]
TINY += ["--text-tokens", "16", "--compiler", "eager", "--repeats", "1"]


def run(out: Path, *arguments: str) -> dict[str, Any]:
    """The report of a run."""
    gpu.main([*arguments, "--out", str(out)])
    return json.loads(out.read_text())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_process, "WORKER", "tests.benchmarks.gpu_stand_in")
    monkeypatch.chdir(ROOT)


@pytest.mark.bench
def test_it_runs_at_tiny_scale_on_the_cpu(tmp_path: Path) -> None:
    report = run(tmp_path / "gpu.json", *TINY, "--budget-s", "1700", "--variant-s", "600")
    # Attention kernels that a CPU has not are all that it lacks.
    lacking = {"peaks/attention cudnn", "peaks/attention fa3", "peaks/attention xformers"}
    assert report["left_out"].keys() == lacking | {"bf16/1 row, cudnn", "bf16/1 row, fa3"}
    results = report["results"]
    assert results.keys() | report["left_out"].keys() == set(ORDER)
    assert "CPU, torch" in report["machine"]
    # The authors' schedule at 28 steps; diffusers' rule knows no protected step and computes one fewer.
    assert results["schedules/authors"]["schedule"] == "CCC..C...C.C.....C.....C..C."
    assert results["diffusers/compiled, its MagCache"]["schedule"] == "CCC..C...C.....C.....C....C."
    assert results["diffusers/compiled"]["difference_to_ours"] < 1e-4
    assert results["schedules/14 computed"]["computed"] == 14
    assert 0 < results["ranks/tp 2 equals tp 1"]["relative_difference"] < 1e-4
    for name in (
        "bf16/1 row, flash",
        "bf16/4 rows",
        "fp8/1 row",
        "fp8/4 rows",
        "small/8 rows",
        "bf16/1 row, eager",
        "bf16/1 row, fixed size",
    ):
        assert results[name]["computed_step_s"] > 0
        assert results[name]["reused_step_s"] > 0
        assert results[name]["fraction_of_roofline"] > 0
        assert results[name]["finite"]
    assert results["bf16/4 rows"]["times_one_row"] > 0
    assert len(results["bf16/kernels of a computed step"]["kernels"]) > 3
    graphs = [one for name, one in results.items() if name.startswith("graphs/")]
    assert [one["relative_difference"] for one in graphs] == [0.0] * 3


def test_what_was_measured_is_there_when_the_run_is_stopped(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", *TINY, "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("peaks/matmul: ")
        assert json.loads(out.read_text())["results"]["peaks/matmul"]["tflops_per_s"] > 0  # already
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    report = json.loads(out.read_text())
    assert "peaks/matmul" in report["results"]
    assert report["left_out"]["ranks/tp 2 equals tp 1"] == "the run was stopped by SIGTERM"
    assert report["results"].keys() | report["left_out"].keys() == set(ORDER)
    assert process.returncode == 0


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fails", "RuntimeError: illegal memory access"),
        ("dies", "its process ended with code 11"),
        ("hangs", "it took more than 2 s"),
    ],
)
def test_one_variant_that_goes_wrong_costs_only_itself(tmp_path: Path, what: str, reason: str) -> None:
    report = run(tmp_path / "gpu.json", "--only", "t5", "vae", "--compiler", f"decode={what}", "--variant-s", "2")
    assert report["left_out"] == {"vae/decode": reason}
    assert report["results"].keys() == set(chosen(["t5", "vae"], skip=["vae/decode"]))
    assert "chatter of a library" in (tmp_path / "gpu.log").read_text()


@pytest.mark.usefixtures("stand_in")
def test_a_new_process_knows_the_results_of_the_one_before(tmp_path: Path) -> None:
    report = run(tmp_path / "gpu.json", "--only", "peaks", "--compiler", "copy=fails")
    assert report["results"]["peaks/matmul"]["known"] == 0
    assert report["results"]["peaks/attention flash"]["known"] == 1


@pytest.mark.usefixtures("stand_in")
def test_a_machine_that_lacks_something_is_said_for_all(tmp_path: Path) -> None:
    report = run(tmp_path / "gpu.json", "--only", "t5", "--compiler", "start=dies")
    assert report["results"] == {}
    assert set(report["left_out"].values()) == {"its process ended with code 1: ImportError: no diffusers"}


@pytest.mark.usefixtures("stand_in")
def test_the_budget_ends_the_run(tmp_path: Path) -> None:
    started = time.monotonic()
    report = run(tmp_path / "gpu.json", "--only", "t5", "--compiler", "4-prompts=hangs", "--budget-s", "4")
    assert time.monotonic() - started < 60
    assert report["results"].keys() == {"t5/1 prompt"}
    assert report["left_out"] == {"t5/4 prompts": "no time was left of 4 s"}


@pytest.mark.usefixtures("stand_in")
def test_a_report_is_completed_on_the_same_machine_only(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    run(out, "--only", "t5", "--compiler", "4-prompts=fails")
    same = run(tmp_path / "same.json", "--only", "t5", "--compiler", "x=y", "--resume", str(out))
    assert [one["known"] for one in same["results"].values()] == [0, 1]
    other = run(tmp_path / "other.json", "--only", "t5", "--compiler", "machine=another", "--resume", str(out))
    assert other["results"].keys() == {"t5/1 prompt"}
    assert "this machine is another, the report to resume was made on a card" in other["left_out"]["t5/4 prompts"]


def test_every_variant_can_be_measured() -> None:
    settings = Namespace(**vars(gpu.parse(TINY)))
    assert measures(Bench(settings, {})).keys() == set(ORDER)


def test_variants_are_chosen_by_how_they_begin() -> None:
    assert chosen(["t5", "vae/decode, t"]) == ["vae/decode, tiled", "t5/1 prompt", "t5/4 prompts"]
    assert chosen([], skip=ORDER[:-1]) == [ORDER[-1]]
    with pytest.raises(ValueError, match="no variant begins with 'fp9'; groups are peaks, bf16"):
        chosen(["fp9"])


def test_the_faster_attention_is_taken_once_both_are_known() -> None:
    models = Models(Namespace(**vars(gpu.parse(TINY))), {})
    assert models.kernel() == "flash"
    models.results["bf16/1 row, flash"] = {"computed_step_s": 2.0}
    assert models.kernel() == "flash"
    models.results["bf16/1 row, cudnn"] = {"computed_step_s": 1.0}
    assert models.kernel() == "cudnn"


def test_the_script_takes_what_is_missing_from_the_wheels_that_it_is_given(tmp_path: Path) -> None:
    """Without a network: its interpreter stands in, and says how it was called."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != -c ]\n')
    python.chmod(0o755)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "diffusers-0.42.1-py3-none-any.whl").touch()
    told = {"PYTHON": str(python), "WHEELS": str(wheels), "OUT": str(tmp_path / "out"), "SITE": str(tmp_path / "site")}
    subprocess.run(["bash", "benchmarks/gpu_run.sh", "--only", "t5"], cwd=ROOT, env=os.environ | told, check=True)
    _, install, measure = (tmp_path / "calls").read_text().splitlines()
    assert f"--target {tmp_path}/site --no-index {wheels}/diffusers-0.42.1-py3-none-any.whl" in install
    assert measure == f"-m benchmarks.gpu --out {tmp_path}/out/gpu.json --only t5"


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
    parts = repository("flux.1-dev", "tiny").parts
    cpu = torch.device("cpu")
    first, again, other = (random_model(parts["transformer"], cpu, torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.proj_out.weight, again.proj_out.weight)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


def test_tied_weights_stay_tied() -> None:
    part = repository("flux.1-dev", "tiny").parts["text_encoder_2"]
    encoder = random_model(part, torch.device("cpu"), torch.float32)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert not any(parameter.is_meta for parameter in encoder.parameters())
