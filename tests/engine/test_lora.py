"""Diffusers' pipeline with PEFT is the oracle: ``load_lora_weights``, and ``set_adapters`` with the rows' scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from app.control.schedule import BranchSchedule
from app.control.scheduler import StepScheduler
from app.engine.engine import Engine
from app.engine.lora import sites
from app.engine.lora_files import lora_digest, read_lora
from app.engine.lora_names import LoraError, targets
from app.engine.parallel import TensorParallelGroup
from app.engine.process_groups import RankGroups
from app.engine.sampling import FlowMatchSampler
from app.engine.tuning import Tuning
from app.engine.warmup import warm_up
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.loras import LoraUse
from app.messages.plans import StepPlan
from app.settings import Settings
from magcache_core import Plan, apply_mag_cache, decisions, remove_mag_cache
from tests.engine.lora_cases import adapted_pipeline, flux_tiny, random_adapter, save_peft, use
from tests.local_group import MODEL, decode, embed, execute, job, plans, psnr, random_conditioning, reference
from tests.ranks import on_ranks

PROMPT = "a red circle on a blue background"
STEPS = 8
EVERYWHERE, SOME = LoraUse("everywhere", 1.0), LoraUse("some", 0.7)
CASES = {
    "a": (EVERYWHERE,),
    "b": (SOME,),
    "none": (),
    "both": (replace(EVERYWHERE, scale=-0.5), replace(SOME, scale=1.2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter of every linear of the transformer, one of some in the blocks, with an alpha."""
    made = tmp_path_factory.mktemp("loras")
    save_peft(made / "everywhere.safetensors", random_adapter(flux_tiny(), 1))
    chosen = random_adapter(flux_tiny(), 2, lambda name: "blocks." in name and ("to_" in name or "proj_out" in name))
    save_peft(made / "some.safetensors", chosen, alpha=9.0)
    return made


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return adapted_pipeline(folder, ["everywhere", "some"])


@pytest.fixture(scope="module")
def conditioning(oracle: Any) -> Conditioning:
    use(oracle, ())
    return Conditioning(embed(oracle, PROMPT))


def jobs(**options: Any) -> list[DenoiseJob]:
    """One row of each kind, of different seeds."""
    return [
        job(f"{name}/0", steps=STEPS, seed=seed, loras=loras, **options)
        for seed, (name, loras) in enumerate(CASES.items())
    ]


def by_schedule(asked: Sequence[DenoiseJob], plan: Plan) -> list[StepPlan]:
    """Plans for ``asked`` in one batch, all by one schedule."""
    decided = decisions(plan, FlowMatchSampler(MODEL).sigmas(STEPS, 64).tolist())
    scheduler = StepScheduler(Settings())
    for one in asked:
        scheduler.submit(one, {"cond": BranchSchedule(decided, max(len(each.weights) for each in decided), 0.0)})
    return list(iter(scheduler.next_plan, None))


def made(
    groups: RankGroups,
    folder: Path,
    asked: Sequence[DenoiseJob],
    conditioning: Conditioning,
    formed: Sequence[StepPlan] = (),
    **options: Any,
) -> Mapping[str, torch.Tensor]:
    """Latents of ``asked``, all in one batch, by the plans ``formed`` if given."""
    engine = Engine(MODEL, groups, loras=folder, **options)
    assert engine.loras is not None
    for name in ("everywhere", "some"):
        engine.loras.load(name)
    return execute(engine, formed or plans(asked), {one.row_id: conditioning for one in asked})


def alone(folder: Path, asked: DenoiseJob, conditioning: Conditioning, **options: Any) -> torch.Tensor:
    return made(RankGroups(), folder, [asked], conditioning, **options)[asked.row_id]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_of_all_kinds_in_one_batch_equal_the_pipeline(
    size: int, folder: Path, oracle: Any, conditioning: Conditioning, tmp_path: Path
) -> None:
    asked = jobs()
    if size == 1:
        ours = made(RankGroups(), folder, asked, conditioning)
    else:
        ours = on_ranks((size, 1, 1), tmp_path, made, folder, asked, conditioning)
    images = {}
    for one in asked:
        use(oracle, one.loras)
        expected = reference(oracle, PROMPT, one)
        assert (ours[one.row_id] - expected).abs().max() <= 1e-4, one.row_id
        images[one.row_id] = decode(oracle, expected, one)
        assert psnr(decode(oracle, ours[one.row_id], one), images[one.row_id]) >= 60
        use(oracle, ())
        if one.loras:
            without = decode(oracle, reference(oracle, PROMPT, one), one)
            assert psnr(images[one.row_id], without) < 40, "the adapter must change the image"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_with_the_cache_they_equal_the_hooks_on_the_pipeline(
    size: int, folder: Path, oracle: Any, conditioning: Conditioning, tmp_path: Path
) -> None:
    asked, plan = jobs(), Plan("CC.C..C.", "linear")
    formed = by_schedule(asked, plan)
    if size == 1:
        ours = made(RankGroups(), folder, asked, conditioning, formed)
    else:
        ours = on_ranks((size, 1, 1), tmp_path, made, folder, asked, conditioning, formed)
    for one in asked:
        use(oracle, one.loras)
        uncached = reference(oracle, PROMPT, one)
        apply_mag_cache(oracle.transformer, plan)
        try:
            expected = reference(oracle, PROMPT, one)
        finally:
            remove_mag_cache(oracle.transformer)
        assert psnr(decode(oracle, ours[one.row_id], one), decode(oracle, expected, one)) >= 60, one.row_id
        assert (expected - uncached).abs().max() > 1e-2, "the cache must matter"


@pytest.mark.parametrize(
    "options", [{"true_cfg_scale": 2.0}, {"magcache": MagCacheOptions(enabled=True)}], ids=["true CFG", "cache on"]
)
def test_rows_in_one_batch_equal_themselves_alone(
    options: dict[str, Any], folder: Path, conditioning: Conditioning
) -> None:
    asked = jobs(**options)
    given = random_conditioning(asked[0])
    together = made(RankGroups(), folder, asked, given)
    for one in asked:
        single = alone(folder, one, given)
        if one.loras:
            assert (together[one.row_id] - single).abs().max() <= 1e-4, one.row_id
        else:
            assert torch.equal(together[one.row_id], single), "a row without adapters is not touched"
            plain = execute(Engine(MODEL), plans([one]), {one.row_id: given})[one.row_id]
            assert torch.equal(single, plain), "and neither is a service's that has a folder of them"


@pytest.mark.parametrize("sizes", [(1, 2, 1), (1, 1, 2)], ids=["shared tokens", "shared branches"])
def test_ranks_that_share_tokens_or_branches_make_the_same(
    sizes: tuple[int, int, int], folder: Path, tmp_path: Path
) -> None:
    asked = [replace(one, num_inference_steps=3) for one in jobs(true_cfg_scale=2.0)]
    given = random_conditioning(asked[0])
    shared = on_ranks(sizes, tmp_path, made, folder, asked, given)
    for row_id, latents in made(RankGroups(), folder, asked, given).items():
        assert (shared[row_id] - latents).abs().max() <= 1e-4, row_id


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks_and_weights_on_the_host_make_the_same(folder: Path) -> None:
    asked = [replace(one, num_inference_steps=3) for one in jobs()]
    given = random_conditioning(asked[0])
    tuned = made(
        RankGroups(), folder, asked, given, tuning=Tuning(compile=True, compiler="eager", modulation_on_host=True)
    )
    for row_id, latents in made(RankGroups(), folder, asked, given).items():
        assert (tuned[row_id] - latents).abs().max() <= 1e-4, row_id


@pytest.mark.usefixtures("_fresh_compiler")
def test_warm_up_compiles_what_adapters_need(folder: Path) -> None:
    engine = Engine(MODEL, tuning=Tuning(compile=True, compiler="eager"), loras=folder)
    assert engine.loras is not None
    engine.loras.load("some")
    warm_up(engine, job("warm/0", size=(64, 64)), 32, max_rows=2)
    compiled = counters["stats"]["unique_graphs"]
    asked = job("a/0", size=(64, 64), steps=2, loras=(SOME,))
    execute(engine, plans([asked]), {"a/0": random_conditioning(asked)})
    assert counters["stats"]["unique_graphs"] == compiled > 0


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_keep_slices_that_make_up_the_whole(size: int, folder: Path) -> None:
    """Of outputs where the base linear is split by outputs, of inputs where it is by inputs, all of it elsewhere."""
    adapter = read_lora(folder / "everywhere.safetensors", targets(flux_tiny()))
    per_rank = [sites(flux_tiny(), TensorParallelGroup(rank, size)) for rank in range(size)]
    device, dtype = torch.device("cpu"), torch.float32
    for name, whole in adapter.items():
        pieces = [one[name].piece(whole, device, dtype) for one in per_rank]
        if per_rank[0][name].dim == 0:
            assert torch.equal(torch.cat([piece.up for piece in pieces]), whole.up), name
        elif per_rank[0][name].dim == 1:
            product = sum(piece.up @ piece.down[:, :1] for piece in pieces)
            assert sum(piece.down.shape[1] for piece in pieces) == whole.down.shape[1], name
            assert product.shape == (len(whole.up), 1)
        else:
            assert all(torch.equal(piece.up, whole.up) and torch.equal(piece.down, whole.down) for piece in pieces)
    assert per_rank[0]["transformer_blocks.0.attn.to_k"].begin == 192 // size, "after the queries"
    assert {one.dim for one in per_rank[0].values()} == {0, 1, None}


def test_adapters_are_loaded_and_dropped_by_name_and_content(folder: Path, conditioning: Conditioning) -> None:
    engine = Engine(MODEL, loras=folder)
    assert engine.loras is not None
    asked = job("a/0", steps=2, loras=(SOME,))
    with pytest.raises(LookupError, match="adapter 'some', which is not loaded"):
        execute(engine, plans([asked]), {"a/0": conditioning})
    digest = lora_digest(folder / "some.safetensors")
    engine.loras.load("some", digest)
    engine.loras.load("some", digest)
    once = engine.loras.nbytes
    assert once > 0
    engine.loras.load("some")
    assert engine.loras.nbytes == 2 * once, "another content, as far as is known"
    for content in (digest, "", "never loaded"):
        engine.loras.drop("some", content)
    assert engine.loras.nbytes == 0
    with pytest.raises(LoraError, match="was replaced"):
        engine.loras.load("some", "0" * 64)
    with pytest.raises(LoraError, match=r"absent\.safetensors cannot be read"):
        engine.loras.load("absent")
