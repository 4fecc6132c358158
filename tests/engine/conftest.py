from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import FluxPipeline
from torch._dynamo.utils import counters

from app.engine.engine import Engine
from tests.local_group import MODEL, load_pipeline


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline() -> FluxPipeline:
    return load_pipeline()


@pytest.fixture
def engine() -> Engine:
    return Engine(MODEL)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
