"""The whole recipe for a few steps, and what it exports in plain diffusers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from models.recipe import loop


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `--quick` writes."""
    folder = tmp_path_factory.mktemp("recipe")
    command = [sys.executable, "-m", "models.recipe", "--quick", "--work", f"{folder}/work", "--out", f"{folder}/out"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=600)
    return folder / "out"


def test_the_quick_recipe_exports_a_pipeline_that_draws(exported: Path) -> None:
    pipe = FluxPipeline.from_pretrained(exported, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red circle on a blue background", height=96, width=160, num_inference_steps=2, max_sequence_length=32
    ).images[0]
    assert image.size == (160, 96)
    assert pipe.transformer.config.guidance_embeds
    assert pipe.scheduler.config.use_dynamic_shifting
    assert np.asarray(image).dtype == np.uint8


def test_the_quick_recipe_prints_its_evaluation(exported: Path) -> None:
    figures = json.loads((exported / "evaluation.json").read_text())
    assert set(figures["128x128"]) >= {"background", "colour_and_half", "shape"}
    assert (exported / "grid.png").exists()


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    budget = loop.Budget(60, steps=2)
    assert [step for step, _ in budget.run("first")] == [0, 1]
    loop.save(tmp_path / "state.pt", {"budget": budget.state()})
    resumed = loop.Budget(60, steps=2)
    resumed.resume(loop.load(tmp_path / "state.pt", torch.device("cpu"))["budget"])
    assert list(resumed.run("second")) == []


def test_the_learning_rate_is_flat_and_then_falls_to_its_floor() -> None:
    assert loop.flat_then_linear(0.0) == loop.flat_then_linear(0.29) == 1.0
    assert loop.flat_then_linear(1.0) == pytest.approx(0.02)
    assert loop.flat_then_linear(0.5) > loop.flat_then_linear(0.9)


def test_the_average_starts_at_once_and_ends_slow() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    average = loop.Average(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(7.0)
    for step in range(100):
        average.update(step)
    average.copy_to(layer)
    assert layer.weight.item() == pytest.approx(7.0, rel=1e-3)
