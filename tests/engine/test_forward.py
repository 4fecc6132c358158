"""The forward pass as tensors: what it computes is diffusers' own, and reuse puts a residual in the blocks' place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from app.engine.engine import Engine
from app.engine.geometry import Geometry
from tests.engine.models import TEXT_TOKENS, TinyModel

GEOMETRY = Geometry(4, 5)
LEVEL = torch.tensor([0.5, 0.25])


@pytest.fixture(scope="module", params=["flux.1-schnell", "flux.2-klein-4b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(request.param, tmp_path_factory.mktemp("forward") / "model")


@torch.inference_mode()
def test_a_computed_pass_is_diffusers_and_a_reused_one_repeats_it(model: TinyModel) -> None:
    engine = Engine(model.folder)
    transformer, strategy = model.pipeline.transformer, engine.strategy
    prompts = [model.prompt(1), model.prompt(2)]
    latents = torch.randn(2, GEOMETRY.tokens, transformer.config.in_channels)
    tokens = torch.stack([prompt.tokens for prompt in prompts])
    pooled = None if prompts[0].pooled is None else torch.stack([prompt.pooled for prompt in prompts])
    ids = model.family.layout.position_ids(GEOMETRY, TEXT_TOKENS)
    asked: dict[str, Any] = {} if pooled is None else {"pooled_projections": pooled}
    if pooled is None:  # FLUX.2 takes ids per row
        ids = ids.expand(2, -1, -1)
    asked |= {"txt_ids": ids[..., :TEXT_TOKENS, :], "img_ids": ids[..., TEXT_TOKENS:, :], "guidance": None}
    expected = transformer(latents, tokens, timestep=LEVEL, return_dict=False, **asked)[0]

    temb = strategy.embed_time(engine.transformer, LEVEL, None, pooled)
    context = strategy.context(engine.transformer, tokens)
    output_modulation = strategy.output_modulation(engine.transformer, temb)
    velocity, residual = engine._forward.computed(
        engine._rotary(GEOMETRY, TEXT_TOKENS, ()),
        latents,
        context,
        context[:, :0],
        engine._modulation.ahead(temb),
        output_modulation,
    )
    assert torch.allclose(velocity, expected, rtol=0, atol=1e-5)
    assert residual.shape == (2, GEOMETRY.tokens, context.shape[2])
    (again,) = engine._forward.reused(latents, residual, output_modulation)
    assert torch.allclose(again, velocity, rtol=0, atol=1e-5)
    (other,) = engine._forward.reused(latents, torch.zeros_like(residual), output_modulation)
    assert not torch.allclose(other, velocity, rtol=0, atol=1e-2)
