"""The table of models: how a checkpoint is recognised, and what few-step models do with the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from app.engine.families import (
    FAMILIES,
    FLUX2_KLEIN,
    FLUX2_KLEIN_BASE,
    FLUX_DEV,
    FLUX_KONTEXT,
    FLUX_SCHNELL,
    Edits,
    Family,
    family_of,
)
from app.engine.loading import CheckpointError
from tests.local_group import MODEL

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


def write(folder: Path, index: dict[str, object], transformer: dict[str, object] | None = None) -> Path:
    (folder / "transformer").mkdir()
    (folder / "model_index.json").write_text(json.dumps(index))
    if transformer is not None:
        (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    return folder


@pytest.mark.parametrize(
    ("index", "transformer", "expected"),
    [
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": True}, FLUX_DEV),
        ({"_class_name": "FluxPipeline"}, {"guidance_embeds": False}, FLUX_SCHNELL),
        ({"_class_name": "FluxPipeline"}, {}, FLUX_SCHNELL),
        ({"_class_name": "FluxKontextPipeline"}, None, FLUX_KONTEXT),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": True}, None, FLUX2_KLEIN),
        ({"_class_name": "Flux2KleinPipeline", "is_distilled": False}, None, FLUX2_KLEIN_BASE),
    ],
)
def test_a_checkpoint_is_recognised(
    tmp_path: Path, index: dict[str, object], transformer: dict[str, object] | None, expected: Family
) -> None:
    assert family_of(write(tmp_path, index, transformer)) is expected


def test_the_shipped_model_is_of_the_first_family() -> None:
    assert family_of(MODEL) is FLUX_DEV


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "names the pipeline 'StableDiffusionPipeline'; served are Flux"),
        ({"_class_name": "FluxPipeline"}, r"config\.json is missing"),
    ],
)
def test_another_pipeline_is_refused(tmp_path: Path, index: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        family_of(write(tmp_path, index))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"model_index\.json is not valid JSON"):
        family_of(tmp_path)


def test_why_nothing_is_reused_without_a_profile() -> None:
    few = {
        family.name for family in FAMILIES if family.uncached_reason.startswith(f"{family.name} is made for 4 steps")
    }
    assert few == {FLUX_SCHNELL.name, FLUX2_KLEIN.name}
    assert "calibrate one" in FLUX_DEV.uncached_reason


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_who_takes_images_says_how_many(family: Family) -> None:
    assert (family.max_sources > 0) == (family.edits is not Edits.NONE)
    assert not family.trained_sizes or family.edits is Edits.REFERENCES


@pytest.mark.parametrize(
    ("file", "family"),
    [
        ("flux.yaml", FLUX_DEV),
        ("flux-multi-node.yaml", FLUX_DEV),
        ("flux-schnell.yaml", FLUX_SCHNELL),
        ("flux-kontext.yaml", FLUX_KONTEXT),
        ("flux2-klein.yaml", FLUX2_KLEIN),
    ],
)
def test_the_shipped_settings_are_the_models_own(file: str, family: Family) -> None:
    document = yaml.safe_load((DEPLOYMENTS / file).read_text(encoding="utf-8"))
    sampling = document["applications"][0]["args"]["sampling"]
    assert sampling["num_inference_steps"] == family.steps
    assert sampling["max_sequence_length"] == family.text_tokens
    assert family.guidance_scale is None or sampling["guidance_scale"] == family.guidance_scale
