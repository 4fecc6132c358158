"""What a computed step moves and multiplies: launches, bytes and operations of FLUX.1-dev at full geometry, by variant.

    python -m benchmarks.traffic            # prints the table
    python -m benchmarks.traffic --write    # keeps the counts and puts the table into docs/performance.md

The real modules run on tensors without data, so that nothing is measured and everything is counted: see `launches`.

The estimate takes for each launch the longer of its bytes and its operations at `RATES`, and nothing for the launch
itself: it is a floor for a GPU that is never kept waiting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from app.engine.attention import positions, use_positions
from app.engine.epilogues import join_products
from app.engine.fp8 import quantize
from app.engine.geometry import Geometry
from app.engine.modulation import Modulation
from app.engine.parallel import TensorParallelGroup, planned_linears
from app.engine.sequence import SequenceParallelGroup
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import Part, Scale, repository
from benchmarks.fits import put
from benchmarks.launches import KINDS, RATES, Eager, Launch, fused
from benchmarks.memory import shard, to_fake
from magcache_core import get_strategy

MODEL = "flux.1-dev"
TEXT_TOKENS = 512
RESULTS = Path(__file__).parent / "results" / "traffic.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


@dataclass(frozen=True)
class Counted:
    """A variant's step: launches and bytes by kind, operations in all, estimates with either attention kernel."""

    launches: dict[str, int]
    bytes: dict[str, int]
    flops: int
    flash_s: float
    cudnn_s: float

    @classmethod
    def of(cls, launches: list[Launch]) -> Counted:
        """The sums over ``launches``."""
        return cls(
            {kind: sum(one.kind == kind for one in launches) for kind in KINDS},
            {kind: sum(one.bytes for one in launches if one.kind == kind) for kind in KINDS},
            sum(one.flops for one in launches),
            *(sum(one.seconds(RATES, rate) for one in launches) for rate in (RATES.flash, RATES.cudnn)),
        )


class Step:
    """A computed step of ``rows`` images, as tensors without data, in one of the forms in which a block may run."""

    def __init__(self, part: Part, side: int, *, ours: bool, fp8: bool = False, rows: int = 1) -> None:
        """``ours``: the engine's modules, with the modulation computed ahead; else diffusers' own."""
        self.rows = rows
        self._ours = ours
        self._transformer: Any = shard(part, 1) if ours else weights.build(part)
        config = self._transformer.config
        dim = config.num_attention_heads * config.attention_head_dim
        tokens = Geometry.of(side, side).tokens
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            to_fake(self._transformer)
            if fp8:
                for _, linear in planned_linears(self._transformer):
                    quantize(linear)
            self._rotary = self._transformer.pos_embed(torch.zeros(tokens + TEXT_TOKENS, len(config.axes_dims_rope)))
            self._latents = torch.empty(rows, tokens, config.in_channels, dtype=weights.DTYPE)
            self._hidden = torch.empty(rows, tokens, dim, dtype=weights.DTYPE)
            self._context = torch.empty(rows, TEXT_TOKENS, dim, dtype=weights.DTYPE)
            self._temb: Any = torch.empty(rows, dim, dtype=weights.DTYPE)
            self._output_modulation = torch.empty(rows, 2 * dim, dtype=weights.DTYPE)
            if ours:
                ahead = Modulation(self._transformer, TensorParallelGroup(), torch.device("cpu"))
                self._temb = ahead.by_block(torch.empty(rows, ahead.width, dtype=weights.DTYPE))
        self._strategy = get_strategy(self._transformer)

    @torch.no_grad()
    def eager(self) -> list[Launch]:
        """Every operator on its own."""
        rotary = self._positions(complex_rotary=True)
        return self._counted(lambda: self._outside(blocks=self._run_blocks(rotary)))

    @torch.no_grad()
    def compiled(self) -> list[Launch]:
        """Blocks as inductor fuses them, what surrounds them operator by operator; the engine's as on a GPU."""
        if self._ours:
            join_products(self._transformer)
        launches = self._counted(lambda: self._outside(blocks=None))
        rotary = self._positions(complex_rotary=False)
        first = 0
        for stack in (self._transformer.transformer_blocks, self._transformer.single_transformer_blocks):
            temb = self._temb[first] if isinstance(self._temb, tuple) else self._temb
            launches += len(stack) * fused(
                stack[0],
                self.rows,
                hidden_states=self._hidden,
                encoder_hidden_states=self._context,
                temb=temb,
                image_rotary_emb=rotary,
            )
            first += len(stack)
        return launches

    def _positions(self, complex_rotary: bool) -> Any:
        """The rotary embedding as diffusers has it, or as the engine takes it."""
        if not self._ours:
            return self._rotary
        use_positions(self._transformer, SequenceParallelGroup(), complex_rotary)
        with self.fake:
            return positions(self._transformer, self._rotary, ())

    def _counted(self, run: Callable[[], object]) -> list[Launch]:
        with self.fake, Eager(self.rows) as eager, eager.norms_as_one(self._transformer):
            run()
        return eager.launches

    def _outside(self, blocks: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        hidden = self._strategy.embed_image(self._transformer, self._latents)
        self._strategy.project(self._transformer, blocks(hidden) if blocks else hidden, self._output_modulation)

    def _run_blocks(self, rotary: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: self._strategy.blocks(self._transformer, hidden, self._context, self._temb, rotary)


def variants(part: Part, side: int) -> dict[str, Counted]:
    """What the table compares, by name."""
    steps = {
        "diffusers' modules": {"ours": False},
        "this engine": {"ours": True},
        "this engine, fp8": {"ours": True, "fp8": True},
    }
    counted = {}
    for name, options in steps.items():
        # Modules of its own for each: `eager` gives the engine's attention another form of the rotary embedding.
        counted[f"{name}, eager"] = Counted.of(Step(part, side, **options).eager())
        counted[f"{name}, compiled"] = Counted.of(Step(part, side, **options).compiled())
    return counted


def table(report: dict[str, Any]) -> str:
    """The counts in Markdown."""
    lines = [
        f"| variant | launches | {' | '.join(f'{kind}, GB' for kind in KINDS)} | TFLOP | ms, flash | ms, cuDNN |",
        "|---|---" + "|---" * (len(KINDS) + 3) + "|",
    ]
    for name, one in report["variants"].items():
        cells = [
            str(sum(one["launches"].values())),
            *(f"{one['bytes'][kind] / 1e9:.2f}" for kind in KINDS),
            f"{one['flops'] / 1e12:.1f}",
            *(f"{one[seconds] * 1e3:.0f}" for seconds in ("flash_s", "cudnn_s")),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(scale: Scale = "full", side: int = 1024) -> dict[str, Any]:
    """All variants at one image of ``side`` x ``side``."""
    counted = variants(repository(MODEL, scale).parts["transformer"], side)
    return {
        "model": MODEL,
        "scale": scale,
        "image": f"{side}x{side}",
        "rates": asdict(RATES),
        "variants": {name: asdict(one) for name, one in counted.items()},
    }


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--scale", choices=("full", "1/8", "tiny"), default="full")
    parser.add_argument("--size", type=int, default=1024)
    args = parser.parse_args()
    made = report(args.scale, args.size)
    if args.write:
        RESULTS.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(put(document, "traffic", table(made), "benchmarks.traffic"), encoding="utf-8")
    else:
        print(table(made))


if __name__ == "__main__":
    main()
