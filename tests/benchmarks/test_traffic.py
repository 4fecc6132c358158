"""What a step moves is counted on the engine's own modules, and the counts add up."""

from __future__ import annotations

import json

import pytest
import torch

from app.engine.geometry import Geometry
from app.engine.modulation import modulation_linears
from benchmarks import traffic
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import repository
from benchmarks.launches import ATTENTION, LINEAR, ONE_ROW, OTHER, RATES, Launch, moved
from benchmarks.roofline import step_flops
from benchmarks.traffic import Counted, variants

SIDE = 64
PART = repository("flux.1-dev", "tiny").parts["transformer"]


@pytest.fixture(scope="module")
def counted() -> dict[str, Counted]:
    return variants(PART, SIDE)


def test_all_variants_multiply_what_a_step_must(counted: dict[str, Counted]) -> None:
    once_an_image = 0.02  # embeddings of time and text, which a step has no part in
    for name, one in counted.items():
        assert one.flops == pytest.approx(step_flops(PART, Geometry.of(SIDE, SIDE), 512), rel=once_an_image), name


def test_the_modulation_is_gone(counted: dict[str, Counted]) -> None:
    transformer = weights.build(PART)
    names = [name for names in modulation_linears(transformer) for name in names]
    held = sum(2 * one.numel() for name in names for one in transformer.get_submodule(name).parameters())
    for way in ("eager", "compiled"):
        theirs, ours = (counted[f"{whose}, {way}"] for whose in ("diffusers' modules", "this engine"))
        assert held < theirs.bytes[ONE_ROW] < 1.1 * held  # the vectors themselves are the rest
        assert theirs.launches[ONE_ROW] == len(names)
        assert ours.bytes[ONE_ROW] == ours.launches[ONE_ROW] == 0


def test_the_compiler_fuses_what_is_no_product(counted: dict[str, Counted]) -> None:
    eager, compiled = (counted[f"this engine, {way}"] for way in ("eager", "compiled"))
    # A single block's MLP has two products of its own, one that activates and one that is added to attention's.
    assert compiled.launches[LINEAR] == eager.launches[LINEAR] + 2 * len(weights.build(PART).single_transformer_blocks)
    assert compiled.launches[ATTENTION] == eager.launches[ATTENTION] == len(weights.build(PART).attn_processors)
    assert compiled.launches[OTHER] < eager.launches[OTHER]
    assert compiled.bytes[OTHER] < 0.8 * eager.bytes[OTHER]


def test_fp8_is_for_the_compiler(counted: dict[str, Counted]) -> None:
    assert counted["this engine, fp8, eager"].bytes[OTHER] > 2.5 * counted["this engine, eager"].bytes[OTHER]
    assert counted["this engine, fp8, compiled"].bytes[LINEAR] < counted["this engine, compiled"].bytes[LINEAR]


def test_a_launch_takes_the_longer_of_its_bytes_and_its_operations() -> None:
    for kind, operator, rate in [(LINEAR, "addmm", RATES.matmul), (LINEAR, "_scaled_mm", RATES.matmul_fp8)]:
        assert Launch(kind, operator, 3, 10**12).seconds(RATES, RATES.flash) == 10**12 / rate
    assert Launch(ATTENTION, "sdpa", 3, 10**12).seconds(RATES, RATES.cudnn) == 10**12 / RATES.cudnn
    assert Launch(OTHER, "mul", 3 * 10**12, 0).seconds(RATES, RATES.flash) == 1


def test_what_is_repeated_is_read_once() -> None:
    assert moved(torch.empty(4, 8).expand(3, 4, 8)) == 4 * 8 * 4


def test_the_page_shows_the_kept_counts() -> None:
    page = traffic.DOCUMENT.read_text(encoding="utf-8")
    assert traffic.table(json.loads(traffic.RESULTS.read_text(encoding="utf-8"))) in page
