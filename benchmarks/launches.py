"""The kernels that code would launch on tensors without data, with the bytes and operations of each.

- Eager: every operator that is no view is one launch; it reads each of its inputs once and writes its outputs once. An
  RMSNorm is one launch, as on CUDA (a CPU has no fused one and would show eight).
- Compiled: the operators of a block as torch's inductor fuses them, with the bytes that it counts for each kernel, less
  what it counts of a buffer that the kernel does not refer to. It plans for the CPU here, since torch builds without
  CUDA have no other planner; both fuse chains of elementwise operators and reductions, and neither fuses anything into
  a library's matrix product or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

PRODUCTS = ("addmm", "mm", "_scaled_mm", "_addmm_activation")
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
    counted = torch.ops.aten.addmm if name == "_addmm_activation" else packet
    flops = flop_registry[counted](*args, **kwargs, out_val=made) if counted in flop_registry else 0
    if name in PRODUCTS:
        return Launch(ONE_ROW if made.shape[0] == rows else LINEAR, name, size, flops)
    return Launch(OTHER, name, size, flops)


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
