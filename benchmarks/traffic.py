"""What a computed step moves and multiplies: launches, bytes and operations of FLUX.1-dev at full geometry, by variant.

    python -m benchmarks.traffic            # prints the table
    python -m benchmarks.traffic --write    # keeps the counts and puts the table into docs/performance.md

The real modules run on tensors without data, so that nothing is measured and everything is counted.

- Eager: every operator that is no view is one launch; it reads each of its inputs once and writes its outputs once. An
  RMSNorm is one launch, as on CUDA (a CPU has no fused one and would show eight).
- Compiled: the operators of a block as torch's inductor fuses them, with the bytes that it counts for each kernel, less
  what it counts of a buffer that the kernel does not refer to. It plans for the CPU here, since torch builds without
  CUDA have no other planner; both fuse chains of elementwise operators and reductions, and neither fuses anything into
  a library's matrix product or attention.

The estimate takes for each launch the longer of its bytes and its operations at `RATES`, and nothing for the launch
itself: it is a floor for a GPU that is never kept waiting.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from app.engine.attention import positions, use_positions
from app.engine.fp8 import quantize
from app.engine.geometry import Geometry
from app.engine.modulation import Modulation
from app.engine.parallel import TensorParallelGroup, planned_linears
from app.engine.sequence import SequenceParallelGroup
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import Part, Scale, repository
from benchmarks.fits import put
from benchmarks.memory import shard, to_fake
from magcache_core import get_strategy

MODEL = "flux.1-dev"
TEXT_TOKENS = 512
RESULTS = Path(__file__).parent / "results" / "traffic.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
PRODUCTS = ("addmm", "mm", "_scaled_mm")
VIEWS = ("_unsafe_view", "detach", "alias")
"""Operators that move nothing although they do not say so."""
LINEAR, ONE_ROW, ATTENTION, OTHER = "linears", "linears of one vector per row", "attention", "elementwise and copies"
PAIR = 2
KINDS = (LINEAR, ONE_ROW, ATTENTION, OTHER)


@dataclass(frozen=True)
class Rates:
    """What the estimate assumes of a card, in operations and bytes per second; for an H100 from public measurements."""

    matmul: float = 790e12
    matmul_fp8: float = 1520e12
    flash: float = 329e12
    cudnn: float = 631e12
    memory: float = 3.0e12


RATES = Rates()


@dataclass(frozen=True)
class Launch:
    """One kernel: ``kind`` is one of `KINDS`."""

    kind: str
    operator: str
    bytes: int
    flops: int

    def seconds(self, rates: Rates, attention: float) -> float:
        """The longer of its bytes and its operations; ``attention`` is the rate of the attention kernel."""
        product = rates.matmul_fp8 if self.operator == "_scaled_mm" else rates.matmul
        return max(self.bytes / rates.memory, self.flops / (attention if self.kind == ATTENTION else product))


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


class Eager(TorchDispatchMode):
    """Notes every launch of the operators that run in it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._rows = rows
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note it."""
        result = func(*args, **(kwargs or {}))
        given, made = tensors((args, kwargs)), tensors(result)
        if not self._inside and given and made and not is_view(func, given, made):
            size = sum(map(moved, (*given, *made)))
            self.launches.append(launch(func, args, kwargs or {}, result, size, self._rows))
        return result

    @contextmanager
    def norms_as_one(self, module: torch.nn.Module) -> Iterator[None]:
        """Note each RMSNorm of ``module`` as one launch."""

        def begin(*_: Any) -> None:
            self._inside += 1

        def end(norm: Any, given: Any, made: torch.Tensor) -> None:
            self._inside -= 1
            self.launches.append(Launch(OTHER, "_fused_rms_norm", sum(map(moved, (given[0], norm.weight, made))), 0))

        norms = [part for part in module.modules() if isinstance(part, torch.nn.RMSNorm)]
        hooks = [norm.register_forward_pre_hook(begin) for norm in norms]
        hooks += [norm.register_forward_hook(end) for norm in norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in ``tree``."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def is_view(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    """Whether ``func`` only looks at its input in another way."""
    if func._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given}
    same = all(tensor.untyped_storage()._cdata in storages for tensor in made)
    return same or func.overloadpacket.__name__ in VIEWS


def moved(tensor: torch.Tensor) -> int:
    """Bytes of what ``tensor`` refers to; what it repeats (expanded sides) counts once."""
    count = tensor.element_size()
    for side, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= side if stride else 1
    return count


def launch(func: Any, args: Any, kwargs: Any, made: Any, size: int, rows: int) -> Launch:
    """The launch of ``func``, which makes ``made`` and moves ``size`` bytes, in a step of ``rows`` rows."""
    packet = func.overloadpacket
    name = packet.__name__
    if "scaled_dot_product" in name:
        return Launch(ATTENTION, name, size, sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    flops = flop_registry[packet](*args, **kwargs, out_val=made) if packet in flop_registry else 0
    if name in PRODUCTS:
        return Launch(ONE_ROW if made.shape[0] == rows else LINEAR, name, size, flops)
    return Launch(OTHER, name, size, flops)


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
        """Blocks as inductor fuses them, what surrounds them operator by operator."""
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


def fused(block: torch.nn.Module, rows: int, **inputs: Any) -> list[Launch]:
    """The kernels that inductor makes of ``block`` for these inputs, which have no data."""
    launches: list[Launch] = []

    def plan(gm: torch.fx.GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        (output,) = gm.graph.find_nodes(op="output")
        made = [node.meta["val"] for node in output.args[0]]
        output.meta["original_output_strides"] = [value.stride() for value in made]
        graph = GraphLowering(gm)
        with V.set_graph_handler(graph), V.set_real_inputs([]), V.set_debug_handler(DebugContext()):
            graph.run(*example_inputs)
            graph._update_scheduler()
            launches.extend(_launch(node, rows) for node in graph.scheduler.nodes if _runs(node))
        return lambda *_: made

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(gm, example_inputs, inner_compile=plan)

    torch._dynamo.reset()
    torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(**inputs)
    return launches


def _runs(node: BaseSchedulerNode) -> bool:
    """Whether it is a kernel: concatenations written in place and parts of a result are none."""
    return not isinstance(node, NopKernelSchedulerNode) and type(node.node).__name__ != "MultiOutput"


def _launch(node: BaseSchedulerNode, rows: int) -> Launch:
    if not isinstance(node, ExternKernelSchedulerNode):
        return Launch(OTHER, "fused", fused_bytes(node), 0)
    kernel: Any = node.node
    packet = kernel.op_overload.overloadpacket
    origin = next(one for one in kernel.origins if getattr(one.target, "overloadpacket", None) is packet)
    args, kwargs = torch.fx.node.map_arg((origin.args, origin.kwargs), lambda one: one.meta["val"])
    made = origin.meta["val"]
    # The kernel's first result: attention has others, for gradients.
    out = tensors(made)[0]
    return launch(origin.target, args, kwargs, made, sum(map(moved, (*tensors((args, kwargs)), out))), rows)


def fused_bytes(node: BaseSchedulerNode) -> int:
    """Bytes that a fused kernel moves: inductor's own count, but of a buffer's regions only those that it refers to.

    Inductor counts a buffer whole where a part of it is read, such as the keys of fused projections. Regions are told
    apart by where they begin; the channels of a pair, which the rotary embedding reads apart, are one.
    """
    size = 0
    for name, whole in node.get_read_write_buffer_accesses(include_reads=True, include_writes=True).items():
        regions: dict[int, int] = {}
        for dep in (*node.read_writes.reads, *node.read_writes.writes):
            if dep.name == name and isinstance(dep, MemoryDep):
                begin = int(dep.index.subs(dict.fromkeys(dep.index.free_symbols, 0))) // PAIR
                regions[begin] = max(regions.get(begin, 0), int(dep.get_numel()))
        size += min(whole, sum(regions.values()) * V.graph.get_dtype(name).itemsize)
    return size


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
