from __future__ import annotations

import json

import pytest
import torch

from app.engine.attention import positions, use_positions
from app.engine.fused import fuse
from app.engine.modulation import Modulation
from app.engine.parallel import TensorParallelGroup
from app.engine.sequence import SequenceParallelGroup
from benchmarks import fits, memory
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import MODELS, repository
from benchmarks.gpu_runs import random_model
from magcache_core import get_strategy

REPORT = json.loads(fits.RESULTS.read_text(encoding="utf-8"))


def test_live_bytes_are_those_alive_at_once() -> None:
    module = torch.nn.Linear(4, 4)

    def run() -> None:
        kept = torch.zeros(100)  # 400 bytes
        for _ in range(3):
            passing = torch.zeros(1000)  # 4000, gone before the next
            del passing
        view = kept[:50].view(5, 10)  # no memory of its own
        assert view.sum() == 0  # 4 bytes

    assert memory.alive_at_most(module, run) == 4400


def test_weights_do_not_count_as_work() -> None:
    module = torch.nn.Linear(10, 10, bias=False)
    assert memory.alive_at_most(module, lambda: module(torch.zeros(1, 10))) == 80


@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_real_tensors_holds_what_fake_ones_say(model: str) -> None:
    part = repository(model, "tiny").parts["transformer"]
    transformer = random_model(part, torch.device("cpu"), torch.bfloat16)
    fuse(transformer)
    use_positions(transformer, SequenceParallelGroup(), complex_rotary=False)
    config = transformer.config
    rotary = positions(transformer, transformer.pos_embed(torch.zeros(16 + 4, len(config.axes_dims_rope))), ())

    def run() -> None:
        hidden, context = (torch.zeros(2, tokens, 96, dtype=torch.bfloat16) for tokens in (16, 4))
        ahead = modulation.by_block(torch.zeros(2, modulation.width, dtype=torch.bfloat16))
        get_strategy(transformer).blocks(transformer, hidden, context, ahead, rotary)

    modulation = Modulation(transformer, TensorParallelGroup(), torch.device("cpu"))
    measured = memory.alive_at_most(transformer, run)
    assert measured == memory.step_bytes(memory.shard(part, 1), memory.Image(64, 4, rows=2), 1)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_grows_with_rows_and_references_and_shrinks_with_ranks(model: str) -> None:
    part = repository(model, "tiny").parts["transformer"]
    one = memory.step_bytes(memory.shard(part, 2), memory.Image(64, 4), 2)
    assert memory.step_bytes(memory.shard(part, 1), memory.Image(64, 4), 1) > one
    assert 1.5 * one < memory.step_bytes(memory.shard(part, 2), memory.Image(64, 4, rows=2), 2) < 2.5 * one
    assert 1.5 * one < memory.step_bytes(memory.shard(part, 2), memory.Image(64, 4, references=1), 2) < 2.5 * one


@pytest.mark.parametrize("model", MODELS)
def test_shards_add_up(model: str) -> None:
    part = repository(model, "tiny").parts["transformer"]
    whole = memory.weight_bytes(part)
    halves, thirds = (memory.shard_bytes(memory.shard(part, size)) for size in (2, 3))
    replicated = 2 * halves - whole
    assert thirds == replicated + (whole - replicated) // 3


def test_the_kept_figures_are_of_the_published_geometry() -> None:
    for model, kept in REPORT["models"].items():
        part = repository(model, "full").parts["transformer"]
        assert kept["parameters"] == sum(weights.parameters(weights.tensors(weights.build(part))))
        assert kept["transformer_gb"] == round(2 * kept["parameters"] / 1e9, 2)


def test_the_documents_tables_are_the_kept_figures() -> None:
    document = fits.DOCUMENT.read_text(encoding="utf-8")
    assert fits.with_tables(document) == document


MODEL = {
    "heads": 6,
    "replicated_gb": 4.0,
    "text_encoders_gb": {"text_encoder": 8.0},
    "vae_gb": 0.2,
    "vae_decode_gb": 1.8,
    "residual_per_image_mb": 100.0,
    "modulation_per_image_mb": 0.0,
    "tensor_parallel_size": {
        "1": {"weights_gb": 20.0, "modulation_gb": 0.0, "computed_step_gb": 0.7, "computed_step_fp8_gb": 0.9},
        "2": {"weights_gb": 12.0, "modulation_gb": 0.0, "computed_step_gb": 0.7, "computed_step_fp8_gb": 0.9},
        "3": {"weights_gb": 9.3, "modulation_gb": 0.0, "computed_step_gb": 0.7, "computed_step_fp8_gb": 0.9},
        "4": {"weights_gb": 8.0, "modulation_gb": 0.0, "computed_step_gb": 0.7, "computed_step_fp8_gb": 0.9},
    },
}


@pytest.mark.parametrize(
    ("cards", "gib", "settings"),
    [
        (1, 80, "tp 1, encoder gpu, 16+ rows"),
        (1, 32, "tp 1, encoder cpu, 8 rows"),
        (1, 24, "tp 1, fp8, encoder cpu, 7 rows"),  # whose steps hold more
        (1, 16, "does not fit"),  # 12 GB in 8 bits, and no room for the VAE
        (2, 24, "tp 1, encoder and VAE on a card of their own, 3 rows"),
        (2, 20, "tp 2, encoder cpu, 4 rows"),
        (3, 16, "tp 2, encoder and VAE on a card of their own, 3 rows"),
        (4, 24, "tp 3, encoder and VAE on a card of their own, 13 rows"),  # 4 does not divide 6 heads
        (5, 24, "does not fit"),
    ],
)
def test_the_first_settings_that_fit(cards: int, gib: int, settings: str) -> None:
    assert str(fits.fit(MODEL, cards, gib) or "does not fit") == settings


def test_what_only_admission_reads_goes_to_the_host_before_anything_loses_precision() -> None:
    ranks = {"1": MODEL["tensor_parallel_size"]["1"] | {"modulation_gb": 4.0}}
    found = fits.fit(MODEL | {"tensor_parallel_size": ranks}, 1, 24)
    assert str(found) == "tp 1, modulation_on_host, encoder cpu, 4 rows"


def test_a_text_is_put_between_its_marks() -> None:
    begin, end = (mark.format(name="memory", module="benchmarks.fits") for mark in fits.MARKS)
    text = f"before\n{begin}\nearlier\n{end}\nafter\n"
    assert fits.put(text, "memory", "new") == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
