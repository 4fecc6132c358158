"""Which sizes blocks are compiled for, and where the result is kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from app.engine.engine import Engine
from app.engine.tuning import Tuning, UsualRow
from app.engine.warmup import warm_up
from tests.engine.models import TEXT_TOKENS, TinyModel
from tests.local_group import job

SYMBOLIC: list[bool] = []
"""For every graph that was compiled, whether a size in it is symbolic."""


@torch._dynamo.register_backend  # type: ignore[misc]
def noting(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    SYMBOLIC.append(any(isinstance(one, torch.SymInt) for one in inputs))
    return gm.forward


@pytest.fixture(scope="module", params=["flux.1-schnell", "flux.2-klein-4b"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(request.param, tmp_path_factory.mktemp("compiled") / "model")


@pytest.fixture(autouse=True)
def _nothing_noted() -> None:
    SYMBOLIC.clear()


@pytest.mark.usefixtures("_fresh_compiler")
def test_the_usual_row_alone_has_graphs_of_fixed_size(model: TinyModel) -> None:
    engine = Engine(model.folder, tuning=Tuning(compile=True, usual=UsualRow(24, TEXT_TOKENS), compiler="noting"))
    warm_up(engine, job("a/0", size=(96, 64)), TEXT_TOKENS, max_rows=2)
    # A double and a single block; FLUX.1's first single block apart, whose inputs are no slices of the joint stream.
    kinds = 2 if "klein" in model.family.name else 3
    assert SYMBOLIC.count(False) == kinds
    assert SYMBOLIC.count(True) == 2 * kinds, "each for several rows, and for one row of another size"


def test_a_usual_row_is_known_by_its_sizes() -> None:
    usual = UsualRow(24, 12)
    image, text = torch.empty(1, 24, 8), torch.empty(1, 12, 8)
    assert usual.is_alone(image, text)
    assert usual.is_alone(torch.cat([text, image], dim=1), None)
    assert not usual.is_alone(image.expand(2, -1, -1), text.expand(2, -1, -1))
    assert not usual.is_alone(text, image), "as many tokens in all, and other shapes"
    assert not usual.is_alone(image, None)


def test_the_cache_is_kept_apart_by_attention(
    model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    Engine(model.folder, tuning=Tuning(compile_cache=tmp_path))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere", "nothing is compiled"
    for backend in ("native", "flash"):
        Engine(model.folder, tuning=Tuning(backend, compile=True, compile_cache=tmp_path))
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / backend)
