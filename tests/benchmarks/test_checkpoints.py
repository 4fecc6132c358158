"""Checkpoints of random weights: the published layout and geometry, and what diffusers' own pipelines make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import MODELS, SCALES, repository
from benchmarks.make_checkpoint import make_checkpoint

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a model, written once."""
    written: dict[str, Path] = {}

    def get(model: str) -> Path:
        if model not in written:
            written[model] = make_checkpoint(model, "tiny", tmp_path_factory.mktemp("checkpoint") / model)
        return written[model]

    return get


@pytest.mark.parametrize("model", MODELS)
def test_diffusers_own_pipeline_class_runs_it(checkpoint: Callable[[str], Path], model: str) -> None:
    pipeline_class = getattr(diffusers, repository(model, "tiny").pipeline)
    pipeline = pipeline_class.from_pretrained(checkpoint(model), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt: str, **options) -> np.ndarray:
        # Kontext's default resolution and area would be a megapixel.
        if "kontext" in model:
            options |= {"_auto_resize": False, "max_area": 64 * 64}
        return pipeline(
            prompt=prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            max_sequence_length=64,
            **options,
        ).images[0]

    image = paint(PROMPT)
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01
    # A text encoder or tokenizer that loses the prompt would go unnoticed otherwise.
    assert not np.array_equal(image, paint("green"))
    if pipeline_class is not diffusers.FluxPipeline:
        source = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
        assert not np.array_equal(image, paint(PROMPT, image=source))


@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_one_of_the_class(checkpoint: Callable[[str], Path], model: str) -> None:
    for name, part in repository(model, "tiny").parts.items():
        wanted = {tensor.name: tensor.shape for tensor in weights.tensors(weights.build(part), part.prefix)}
        found = {}
        for file in (checkpoint(model) / name).glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                found |= {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        assert found == wanted


# Sizes of the files in black-forest-labs/FLUX.1-dev, which hold little more than the tensors: a header of some
# hundred bytes for each.
FLUX1_DEV_FILES = {
    "transformer": (9983040304, 9949328904, 3870584832),
    "vae": (167666902,),
    "text_encoder": (246144152,),
    "text_encoder_2": (4994582224, 4530066360),
}


def test_full_flux_dev_has_the_size_and_the_files_of_the_published_one() -> None:
    for name, part in repository("flux.1-dev", "full").parts.items():
        files = weights.split(weights.tensors(weights.build(part), part.prefix), part.shard_bytes)
        published = FLUX1_DEV_FILES[name]
        assert len(files) == len(published)
        for content, size in zip(files, published, strict=True):
            assert 0 < size - sum(tensor.bytes for tensor in content) < 200 * len(content)


PARAMETERS = {
    ("flux.1-dev", "transformer"): 11_901_408_320,
    ("flux.1-schnell", "transformer"): 11_891_178_560,
    ("flux.1-kontext-dev", "transformer"): 11_901_408_320,
    ("flux.2-klein-4b", "transformer"): 3_875_544_576,
    ("flux.2-klein-4b", "text_encoder"): 4_022_468_096,
}


@pytest.mark.parametrize(("model", "name"), PARAMETERS)
def test_full_geometry_has_the_published_number_of_parameters(model: str, name: str) -> None:
    part = repository(model, "full").parts[name]
    assert sum(weights.parameters(weights.tensors(weights.build(part)))) == PARAMETERS[model, name]


@pytest.mark.parametrize("model", MODELS)
def test_an_eighth_is_an_eighth(model: str) -> None:
    sizes = {}
    for scale in SCALES:
        part = repository(model, scale).parts["transformer"]
        sizes[scale] = sum(weights.parameters(weights.tensors(weights.build(part))))
    assert 0.11 < sizes["1/8"] / sizes["full"] < 0.15


def test_the_layout_is_the_published_one(checkpoint: Callable[[str], Path]) -> None:
    files = {str(path.relative_to(checkpoint("flux.1-dev"))) for path in checkpoint("flux.1-dev").rglob("*.*")}
    assert files == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors",
        "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "tokenizer_2/special_tokens_map.json",
        "tokenizer_2/spiece.model",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
        "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_schedulers_are_each_models_own(checkpoint: Callable[[str], Path]) -> None:
    def scheduler(model: str) -> dict:
        return json.loads((checkpoint(model) / "scheduler/scheduler_config.json").read_text())

    for model in ("flux.1-dev", "flux.1-kontext-dev", "flux.2-klein-4b"):
        assert (scheduler(model)["shift"], scheduler(model)["use_dynamic_shifting"]) == (3.0, True)
    assert (scheduler("flux.1-schnell")["shift"], scheduler("flux.1-schnell")["use_dynamic_shifting"]) == (1.0, False)


def test_a_seed_means_the_same_weights(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> str:
        folder = make_checkpoint("flux.2-klein-4b", "tiny", tmp_path / name, seed, components=["transformer"])
        file = folder / "transformer/diffusion_pytorch_model.safetensors"
        return hashlib.sha256(file.read_bytes()).hexdigest()

    first = written("first", 0)
    assert written("again", 0) == first
    assert written("other", 1) != first


def test_it_does_not_write_over_something(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with pytest.raises(FileExistsError, match="name a new folder"):
        make_checkpoint("flux.1-dev", "tiny", tmp_path)


@pytest.mark.parametrize(
    ("model", "scale", "components", "message"),
    [
        ("flux.1-pro", "tiny", None, "model 'flux.1-pro' is unknown; there are flux.1-dev"),
        ("flux.1-dev", "half", None, "scale 'half' is unknown; there are full, 1/8, tiny"),
        ("flux.1-dev", "tiny", ["unet"], "flux.1-dev has no component 'unet'; there are scheduler, text_encoder"),
    ],
)
def test_an_unknown_name_is_refused(tmp_path: Path, model: str, scale: str, components, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_checkpoint(model, scale, tmp_path / "out", components=components)
