"""The weights that ship: their size, their parts and what they draw."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from models.recipe import evaluate

FOLDER = Path(__file__).parents[2] / "models" / "flux-tiny"


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return evaluate.load(FOLDER, torch.device("cpu"))


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 24e6


def test_it_has_the_parts_of_flux(pipe: FluxPipeline) -> None:
    parts = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert parts == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5Tokenizer",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
    }
    assert pipe.transformer.config.guidance_embeds
    assert pipe.transformer.config.num_attention_heads % 6 == 0
    assert pipe.scheduler.config.use_dynamic_shifting


def test_the_tokenizers_know_whole_words(pipe: FluxPipeline) -> None:
    prompt = "a red circle on a blue background"
    words = prompt.split()
    assert pipe.tokenizer_2(prompt).tokens() == [*(f"▁{word}" for word in words), "</s>"]
    assert pipe.tokenizer(prompt).tokens() == ["<|startoftext|>", *(f"{word}</w>" for word in words), "<|endoftext|>"]


def test_it_draws_what_held_out_captions_say(pipe: FluxPipeline) -> None:
    """A floor well under the model card's figures, for a few pictures."""
    pairs = evaluate.captions(16, seed=50)
    images = evaluate.generate(pipe, [prompt for _, prompt in pairs], steps=16)
    figures = evaluate.judge(images, [scene for scene, _ in pairs])
    assert figures["background"] >= 0.9
    assert figures["colour_and_half"] >= 0.85
    assert figures["shape"] >= 0.8
