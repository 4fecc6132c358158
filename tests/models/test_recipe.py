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
    command = [sys.executable, "-m", "models.recipe", "--quick", "--threads", "1"]
    command += ["--work", f"{folder}/work", "--out", f"{folder}/out"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=840)
    return folder / "out"


@pytest.mark.bench
def test_the_quick_recipe_exports_a_pipeline_that_draws(exported: Path) -> None:
    pipe = FluxPipeline.from_pretrained(exported)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a red circle on a blue background", height=96, width=160, num_inference_steps=2, max_sequence_length=32
    ).images[0]
    assert image.size == (160, 96)
    assert pipe.transformer.config.guidance_embeds
    assert pipe.scheduler.config.use_dynamic_shifting
    assert np.asarray(image).std() > 1, "not one flat colour"


@pytest.mark.bench
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


def test_a_checkpoint_takes_up_every_part_where_it_was(tmp_path: Path) -> None:
    def stage(seed: int) -> tuple[torch.nn.Linear, list[torch.optim.Optimizer], loop.Average, loop.Budget]:
        torch.manual_seed(seed)
        layer = torch.nn.Linear(2, 2)
        steppers: list[torch.optim.Optimizer] = [torch.optim.Adam([parameter]) for parameter in layer.parameters()]
        return layer, steppers, loop.Average(layer, 0.9), loop.Budget(60, steps=5)

    def step(layer: torch.nn.Linear, steppers: list[torch.optim.Optimizer]) -> None:
        layer(torch.ones(1, 2)).square().sum().backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()

    layer, steppers, average, budget = stage(1)
    step(layer, steppers)
    budget.tick()
    loop.Checkpoint(tmp_path / "a.pt", budget, layer=layer, steppers=steppers, average=average).save()
    again, others, other_average, other_budget = stage(2)
    loop.Checkpoint(tmp_path / "a.pt", other_budget, layer=again, steppers=others, average=other_average).resume(
        torch.device("cpu")
    )
    assert other_budget.step == 1
    for mine, saved in zip(other_average.shadow, average.shadow, strict=True):
        torch.testing.assert_close(mine, saved)
    step(layer, steppers)
    step(again, others)  # equal only if the optimizers' moments came along
    torch.testing.assert_close(again.weight, layer.weight)
    loop.Checkpoint(tmp_path / "none.pt", other_budget, layer=again).resume(torch.device("cpu"))
    assert other_budget.step == 1
