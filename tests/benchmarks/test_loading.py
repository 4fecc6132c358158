from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import loading
from benchmarks.make_checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.bench


def test_it_runs_at_tiny_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    model = make_checkpoint("flux.1-dev", "tiny", tmp_path / "model", components=["transformer"])
    ranks = loading.load_all(model, 2, cold=True)
    assert len(ranks) == 2
    whole_mb = sum(file.stat().st_size for file in (model / "transformer").glob("*.safetensors")) / 1e6
    for rank in ranks:
        assert rank["shard_mb"] < whole_mb
        assert rank["peak_mb"] >= rank["libraries_mb"] > 100


def test_a_rank_that_fails_fails_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match="a rank of 1 failed"):
        loading.load_all(tmp_path, 1, cold=False)


def test_the_peak_grows_with_what_is_touched() -> None:
    """In a process of its own: this one may have had a higher peak long ago."""
    grown = """
import torch
from benchmarks import loading
before = loading.peak_mb()
block = torch.ones(128 << 20, dtype=torch.uint8)
print(loading.peak_mb() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", grown], cwd=ROOT, capture_output=True, text=True, check=True, timeout=400
    )
    assert 120 <= float(result.stdout) <= 160


def test_loading_takes_the_shard_and_little_more(tmp_path: Path) -> None:
    """The bound itself, on a checkpoint large enough to tell a shard from a whole file."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=840,
    )
    assert result.returncode == 0, result.stderr
    whole_mb, shard_mb, grown_mb = map(float, result.stdout.split())
    assert shard_mb > 100
    assert whole_mb > 1.15 * shard_mb + 60
    assert grown_mb <= 1.15 * shard_mb + 30


MEASURE = """
import sys
from pathlib import Path
import torch
from app.engine.loading import load_transformer
from app.engine.parallel import TensorParallelGroup
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import Part
from benchmarks.loading import peak_mb

config = dict(num_layers=0, num_single_layers=8, num_attention_heads=12, joint_attention_dim=64)
part = Part("diffusers", "FluxTransformer2DModel", config, "diffusion_pytorch_model", 10**10)
folder = Path(sys.argv[1]) / "transformer"
folder.mkdir()
model = weights.build(part)
model.save_config(folder)
wanted = weights.tensors(model)
weights.write(wanted, folder, part.weights, part.shard_bytes, seed=0)
group, place = TensorParallelGroup(1, 3), (torch.device("cpu"), torch.bfloat16)
load_transformer(Path("models/flux-tiny"), group, *place)  # what libraries need once is no part of it
before = peak_mb()
transformer = load_transformer(folder.parent, group, *place)
held = sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())
print(sum(tensor.bytes for tensor in wanted) / 1e6, held / 1e6, peak_mb() - before)
"""
