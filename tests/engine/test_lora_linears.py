"""Rows of one batch with different adapters: what each linear adds to which rows, and in compiled code."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from app.engine.fp8 import quantize
from app.engine.lora_linears import Adapter, Piece, RowAdapters, adapt, applied

INPUTS, OUTPUTS = 16, 32


def adapter(seed: int, begin: int = 0, end: int = OUTPUTS) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, INPUTS, generator=generator), torch.randn(end - begin, 2, generator=generator)
    return Adapter({1: [Piece(begin, end, down, up)]})


A, B = adapter(1), adapter(2, 8, 24)
ROWS = [
    RowAdapters(((A, 1.0),)),
    RowAdapters(((A, 1.0),)),
    None,
    RowAdapters(((A, 0.5), (B, -1.0))),
]


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, OUTPUTS))
    adapt(made, ["0", "1"])
    return made.eval().requires_grad_(False)


def expected(model: nn.Sequential, rows: Sequence[RowAdapters | None], given: torch.Tensor) -> torch.Tensor:
    """Each row with a weight of its own, into which its adapters are merged."""
    made = []
    hidden = model[0](given)
    for row, one in zip(rows, hidden, strict=True):
        weight = model[1].weight.clone()
        for used, scale in () if row is None else row.scaled:
            for piece in used.pieces[1]:
                weight[piece.begin : piece.end] += scale * piece.up @ piece.down
        made.append(nn.functional.linear(one, weight, model[1].bias))
    return torch.stack(made)


def test_each_row_gets_its_own_adapters(model: nn.Sequential) -> None:
    given = torch.randn(4, 5, INPUTS)
    base = model(given)
    with applied(ROWS):
        adapted = model(given)
    assert torch.allclose(adapted, expected(model, ROWS, given), atol=1e-5)
    assert torch.equal(adapted[2], base[2]), "not touched"
    assert torch.equal(model(given), base), "and none of them outside of the block"


def test_one_rows_adapters_are_for_all_its_steps(model: nn.Sequential) -> None:
    steps = torch.randn(7, INPUTS)
    with applied(ROWS[:1]):
        assert torch.allclose(model(steps), expected(model, ROWS[:1] * 7, steps), atol=1e-5)


def test_an_inner_block_is_left_for_the_outer_one(model: nn.Sequential) -> None:
    given = torch.randn(1, 5, INPUTS)
    with applied(ROWS[:1]):
        before = model(given)
        with applied([None]):
            inner = model(given)
        assert torch.equal(model(given), before)
    assert torch.equal(model(given), inner)


def test_the_base_weight_may_be_in_8_bits(model: nn.Sequential) -> None:
    plain = nn.Linear(INPUTS, OUTPUTS)
    quantize(plain)
    adapt(nn.Sequential(plain), ["0"])
    given = torch.randn(4, 5, INPUTS)
    base = plain(given)
    moved = Adapter({0: A.pieces[1]})
    with applied([RowAdapters(((moved, 2.0),)), None, None, None]):
        adapted = plain(given)
    (piece,) = A.pieces[1]
    assert torch.allclose(adapted[0], base[0] + 2 * given[0] @ piece.down.T @ piece.up.T, atol=1e-5)
    assert torch.equal(adapted[1:], base[1:])


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_code_is_made_once_with_and_once_without_adapters() -> None:
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    blocks = nn.Sequential(*(nn.Linear(INPUTS, INPUTS) for _ in range(3)))
    adapt(blocks, ["0", "1", "2"])
    blocks.eval().requires_grad_(False)
    for block in blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True, backend=counting)
    generator = torch.Generator().manual_seed(0)
    pieces = {
        number: [
            Piece(0, INPUTS, torch.randn(2, INPUTS, generator=generator), torch.randn(INPUTS, 2, generator=generator))
        ]
        for number in range(3)
    }
    rows = [RowAdapters(((Adapter(pieces), 1.0),)), None]
    given = torch.randn(2, 5, INPUTS)
    for asked in (rows, [None, None], rows[::-1]):
        hidden = given
        with applied(asked):
            made = blocks(given)
        for number, block in enumerate(blocks):
            (piece,) = pieces[number]
            weights = [block.weight if row is None else block.weight + piece.up @ piece.down for row in asked]
            hidden = torch.stack(
                [nn.functional.linear(one, weight, block.bias) for one, weight in zip(hidden, weights, strict=True)]
            )
        assert torch.allclose(made, hidden, rtol=1e-4, atol=1e-4)
    assert graphs == 2, "and not once for each linear"
