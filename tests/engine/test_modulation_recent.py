"""Further images of a prompt take the modulation of the last ones; with anything else in it, it is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.engine.engine import Engine
from app.engine.modulation import BranchModulation, Recent
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.messages.loras import LoraUse
from tests.engine.lora_cases import flux_tiny, random_adapter, save_peft
from tests.engine.models import TinyModel, run
from tests.engine.models import plans as plans_of
from tests.local_group import MODEL, job, random_conditioning

ASKED = job("a/0", size=(64, 64), steps=3)


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of steps of each product that ``engine`` makes from now on."""
    made: list[int] = []
    ahead = engine._modulation.ahead

    def noted(temb: torch.Tensor) -> torch.Tensor:
        made.append(len(temb))
        return ahead(temb)

    monkeypatch.setattr(engine._modulation, "ahead", noted)
    return made


def image(engine: Engine, asked: DenoiseJob, conditioning: Conditioning) -> torch.Tensor:
    engine.restart()
    return run(engine, plans_of(asked), conditioning)


def test_images_of_one_prompt_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, given = Engine(MODEL), random_conditioning(seed=1)
    made = computed(engine, monkeypatch)
    first, second = ASKED, replace(ASKED, row_id="b/0", seed=8)
    for one in (first, second):
        assert torch.equal(image(engine, one, given), image(Engine(MODEL), one, given))
    assert made == [3], "the second took the first one's"


@pytest.mark.parametrize(
    "other",
    [{"guidance_scale": 2.0}, {"num_inference_steps": 4}, {"width": 512, "height": 512}, {"computing": (0, 1, 2)}],
)
def test_other_settings_have_their_own(other: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, given = Engine(MODEL), random_conditioning(seed=1)
    made = computed(engine, monkeypatch)
    for one in (ASKED, replace(ASKED, **other)):
        engine.restart()
        engine.execute(plans_of(one)[0], [given])
    assert len(made) == 2


def test_another_prompt_has_its_own_unless_the_model_pools_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, products in (("flux.1-schnell", 2), ("flux.2-klein-4b", 1)):
        model = TinyModel(name, tmp_path / name)
        engine = Engine(model.folder)
        made = computed(engine, monkeypatch)
        for seed in (1, 2):
            given = Conditioning(model.prompt(seed))
            assert torch.equal(image(engine, ASKED, given), image(Engine(model.folder), ASKED, given))
        assert len(made) == products, name


def test_adapters_have_their_own(tmp_path: Path) -> None:
    save_peft(tmp_path / "some.safetensors", random_adapter(flux_tiny(), 1))
    given = random_conditioning(seed=1)
    engine = Engine(MODEL, loras=tmp_path)
    assert engine.loras is not None
    engine.loras.load("some")
    half, whole = (replace(ASKED, loras=(LoraUse("some", scale),)) for scale in (0.5, 1.0))
    for one in (ASKED, half, whole):
        alone = Engine(MODEL, loras=tmp_path)
        assert alone.loras is not None
        alone.loras.load("some")
        assert torch.equal(image(engine, one, given), image(alone, one, given))


def test_the_least_recent_leaves_first() -> None:
    recent, made = Recent(limit_bytes=24), []

    def get(key: str) -> None:
        def make() -> BranchModulation:
            made.append(key)
            return BranchModulation({0: torch.zeros(1)}, torch.zeros(2))  # 12 bytes

        recent.get(key, make)

    for key in "abacab":
        get(key)
    assert made == ["a", "b", "c", "b"]
