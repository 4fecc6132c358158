"""Results that are kept while a benchmark goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.correctors import Line, Loop, euler, run
from magcache_core import Profile, load_profile

MODEL = Path(__file__).parents[2] / "models" / "flux-tiny"


def cut_off() -> torch.Tensor:
    raise RuntimeError("cut off")


def test_a_run_that_is_cut_off_keeps_the_lines_that_it_did_not_reach(tmp_path: Path) -> None:
    out = tmp_path / "results.json"

    def measure(*computed: int) -> None:
        def lines(profile: Profile, loop: Loop, budgets: Sequence[int]) -> Iterator[Line]:
            for count in computed:
                make = cut_off if count == 3 else partial(loop.images, euler(loop.sigmas(count)))
                yield count, "Euler", "C" * count, make

        run(MODEL, load_profile("flux-tiny"), out, 1, (), lines)

    def kept() -> list[int]:
        return [line["computed"] for line in json.loads(out.read_text())["lines"]]

    measure(2, 4)
    with pytest.raises(RuntimeError, match="cut off"):
        measure(1, 3, 4)
    assert kept() == [1, 4]
