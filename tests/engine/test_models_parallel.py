"""Every family on several ranks (real processes, gloo) against diffusers' pipeline, cache off and on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.process_groups import RankGroups
from app.engine.tuning import Tuning
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.messages.plans import StepPlan
from magcache_core import Plan, apply_mag_cache, choose, decisions, load_profile, remove_mag_cache
from tests.engine import bfl
from tests.engine.models import TinyModel, image, plans, run
from tests.local_group import job, psnr
from tests.magcache_core.slow_least_squares import products
from tests.ranks import on_ranks, relative_error

CASES: dict[str, tuple[DenoiseJob, int]] = {
    "flux.1-dev": (job("a/0", size=(64, 80), steps=12, true_cfg_scale=2.0), 0),
    "flux.1-schnell": (job("a/0", size=(64, 96), steps=4), 0),
    "flux.1-kontext-dev": (job("a/0", size=(64, 80), steps=12), 1),
    "flux.2-klein-4b": (job("a/0", size=(96, 96), steps=4), 2),
    "flux.2-klein-base": (job("a/0", size=(64, 80), steps=12, true_cfg_scale=4.0), 1),
}
# What tuning changes must not depend on the number of ranks: compiled blocks hold the all-reduce, fp8 its own slices.
TUNED = {
    "compiled": ("flux.1-kontext-dev", Tuning(compile=True, compiler="eager")),
    "fp8": ("flux.2-klein-4b", Tuning(quantization="fp8")),
}
SINGLE_FILES = ("flux.1-dev", "flux.2-klein-4b")
IMAGES = (image(64, 80, seed=1), image(80, 64, seed=2))
Work = list[tuple[list[StepPlan], Conditioning]]


def _cached(asked: DenoiseJob) -> list[Plan]:
    """Residuals reused, and velocities; few-step models run with the cache off."""
    if asked.num_inference_steps <= 8:
        return []
    plan = choose(load_profile("flux.1-dev"), asked.num_inference_steps)
    fitted = replace(plan, reuse="least_squares", products=products(asked.num_inference_steps))
    return [plan, replace(plan, reuse="corrected"), fitted]


def _run_all(groups: RankGroups, folder: Path, work: dict[str, Work]) -> dict[str, list[torch.Tensor]]:
    made = {
        name: [run(Engine(folder / name, groups), formed, tensors) for formed, tensors in parts]
        for name, parts in work.items()
    }
    for label, (name, tuning) in TUNED.items():
        formed, tensors = work[name][0]
        made[label] = [run(Engine(folder / name, groups, tuning=tuning), formed, tensors)]
    for name in SINGLE_FILES:
        formed, tensors = work[name][0]
        file = folder / f"{name}.safetensors"
        made[file.name] = [run(Engine(folder / name, groups, single_file=file), formed, tensors)]
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: TinyModel(name, folder / name) for name in CASES}
    for name in SINGLE_FILES:
        bfl.write(bfl.transformer_of(made[name].folder), folder / f"{name}.safetensors")
    return made


@pytest.fixture(scope="module")
def expected(models: dict[str, TinyModel]) -> dict[str, list[torch.Tensor]]:
    """What diffusers makes, first with every step computed, then with the cache where the model has one."""
    found = {}
    for name, (asked, sources) in CASES.items():
        model = models[name]
        found[name] = [model.reference(asked, IMAGES[:sources])]
        for plan in _cached(asked):
            apply_mag_cache(model.pipeline.transformer, plan)
            found[name].append(model.reference(asked, IMAGES[:sources]))
            remove_mag_cache(model.pipeline.transformer)
    return found


# Two ranks that share weights alone are in test_parallel.py and test_mix.py; here they share tokens as well.
@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (1, 1, 2)])
def test_sharded_equals_the_pipelines(
    sizes: tuple[int, int, int], models: dict[str, TinyModel], expected: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    work: dict[str, Work] = {}
    for name, (asked, sources) in CASES.items():
        tensors = models[name].conditioning(asked, IMAGES[:sources])
        work[name] = [(plans(asked), tensors)]
        for plan in _cached(asked):
            sigmas = Engine(models[name].folder).sampler.sigmas(asked.num_inference_steps, 20).tolist()
            work[name].append((plans(asked, dict.fromkeys(asked.branches, decisions(plan, sigmas))), tensors))
    made = on_ranks(sizes, tmp_path, _run_all, next(iter(models.values())).folder.parent, work)
    for label, (name, _) in TUNED.items():
        allowed = 0.05 if label == "fp8" else 1e-4
        (ours,), theirs = made.pop(label), expected[name][0]
        assert relative_error(ours, theirs) <= allowed, label
    for name in SINGLE_FILES:
        assert torch.equal(made.pop(f"{name}.safetensors")[0], made[name][0]), name
    assert made.keys() == expected.keys()
    for name, (asked, _) in CASES.items():
        for ours, theirs in zip(made[name], expected[name], strict=True):
            assert relative_error(ours, theirs) <= 1e-4, name
            assert psnr(models[name].decode(ours, asked), models[name].decode(theirs, asked)) >= 60, name
