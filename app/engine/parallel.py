"""Megatron-style tensor parallelism for diffusers transformers, from the plan that diffusers publishes per class.

Column-sharded linears keep their own output features and need no communication; row-sharded linears sum their partial
outputs with one all-reduce (Shoeybi et al., arXiv 1909.08053). Plain linears and ``all_reduce`` are used instead of
DTensor, whose dispatch costs more than the small matmuls it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.tensor_parallel import TPShardSpec, resolve_tp_shard_specs
from torch import nn

from app.engine.fp8 import product
from app.engine.fused import FUSED


@dataclass(frozen=True)
class TensorParallelGroup:
    """This process's place among the ranks that share one transformer; ``size`` 1 has no process group."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Sum ``partial`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(partial, group=self.process_group)
        return partial


class RowParallelLinear(nn.Linear):
    """A linear whose input features are split over the ranks: partial product, then all-reduce.

    The bias is in rank 0's product, so that it is in the sum once and needs no pass of its own.
    """

    group: TensorParallelGroup

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features / size) -> (..., out_features), equal on all ranks."""
        return self.group.sum(self.partial(input))

    def partial(self, input: torch.Tensor) -> torch.Tensor:
        """This rank's part of the output."""
        return product(self, input, own_bias(self))


def own_bias(module: nn.Linear) -> torch.Tensor | None:
    """What this rank adds to the product of ``module``: of a row-parallel one's bias all of it is rank 0's."""
    return None if isinstance(module, RowParallelLinear) and module.group.rank else module.bias


class PartialLinear(RowParallelLinear):
    """A row-parallel linear without its all-reduce: `JoinedStreams` sums two of them at once."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features / size) -> this rank's part of (..., out_features)."""
        return self.partial(input)


class JoinedStreams:
    """Mixed into a double block's attention: one all-reduce for the outputs of both its image and its text stream.

    Measured over gloo on two ranks, this saves up to 12 % of flux-tiny's block stack (benchmarks/collectives.py).
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention's own forward: image (rows, image_tokens, dim) and text (rows, text_tokens, dim)."""
        image, text = super().forward(*args, **kwargs)  # type: ignore[misc]
        group: TensorParallelGroup = self.to_add_out.group  # type: ignore[attr-defined]
        summed = group.sum(torch.cat([image, text], dim=1))
        image, text = summed.tensor_split([image.shape[1]], dim=1)
        return image, text


def shard_specs(transformer: nn.Module, size: int) -> dict[str, TPShardSpec]:
    """How each parameter splits over ``size`` ranks, by name; parameters not named are replicated.

    Raises:
        ValueError: the class publishes no plan, or ``size`` does not divide the attention heads.
    """
    if size == 1:
        return {}
    name = type(transformer).__name__
    plan: Mapping[str, Any] | None = getattr(transformer, "_tp_plan", None)
    if not plan:
        raise ValueError(f"{name} has no tensor-parallel plan in diffusers: set tensor_parallel_size to 1")
    heads = int(transformer.config.num_attention_heads)  # type: ignore[union-attr, arg-type]
    if heads % size:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"tensor_parallel_size {size} does not divide the {heads} attention heads of {name}: use one of {divisors}"
        )
    specs: dict[str, TPShardSpec] = resolve_tp_shard_specs(transformer, dict(plan), size)
    # Not in diffusers' plan, whose blocks need them whole at every step (see `app.engine.modulation`).
    for linear in (name for names in modulation_linears(transformer) for name in names):
        for parameter, value in transformer.get_submodule(linear).named_parameters():
            specs[f"{linear}.{parameter}"] = TPShardSpec(0, [len(value)])
    return specs


def modulation_linears(transformer: nn.Module) -> list[list[str]]:
    """Names of the linears that modulate the blocks' streams, one list per block, or one for all that share them."""
    if type(transformer).__name__ == "Flux2Transformer2DModel":
        shared = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        return [[f"{name}.linear" for name in shared]]
    stacks = (("transformer_blocks", ("norm1", "norm1_context")), ("single_transformer_blocks", ("norm",)))
    return [
        [f"{stack}.{index}.{norm}.linear" for norm in norms]
        for stack, norms in stacks
        for index in range(len(transformer.get_submodule(stack)))  # type: ignore[arg-type]
    ]


def planned_linears(transformer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the linears that the class's plan splits, whether they are split or fused already or not."""
    patterns = [*(getattr(transformer, "_tp_plan", None) or ()), *(f"*.{name}" for name in FUSED)]
    for name, module in transformer.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            assert isinstance(module, nn.Linear)
            yield name, module


def local_ranges(spec: TPShardSpec | None, rank: int, size: int) -> list[tuple[int, int]]:
    """The ranges (begin, end) along ``spec.dim`` that ``rank`` holds of a parameter; empty when it holds all of it.

    A packed projection has one range per fused block, so that heads and MLP columns of a rank stay together.
    """
    if spec is None or spec.dim is None or spec.block_sizes is None:
        return []
    ranges = []
    offset = 0
    for block in spec.block_sizes:
        width = block // size
        ranges.append((offset + rank * width, offset + (rank + 1) * width))
        offset += block
    return ranges


def parallelize(transformer: nn.Module, specs: Mapping[str, TPShardSpec], group: TensorParallelGroup) -> None:
    """Make a transformer on the meta device this rank's shard, in place: local shapes, and all-reduces where due."""
    for name, spec in specs.items():
        ranges = local_ranges(spec, group.rank, group.size)
        owner, _, leaf = name.rpartition(".")
        linear = transformer.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        if spec.dim is None:
            continue
        shape = list(linear.get_parameter(leaf).shape)
        shape[spec.dim] = sum(end - begin for begin, end in ranges)
        local = torch.empty(shape, dtype=linear.weight.dtype, device="meta")
        setattr(linear, leaf, nn.Parameter(local, requires_grad=False))
        linear.out_features, linear.in_features = linear.weight.shape
        if spec.dim == 1:
            # The instance stays the same (other modules may refer to it); only its forward changes.
            linear.__class__ = RowParallelLinear
            linear.group = group  # type: ignore[assignment]
    joined: dict[type, type] = {}  # one class for all blocks, so that what is compiled for one serves the others
    for module in transformer.modules():
        if isinstance(getattr(module, "to_add_out", None), RowParallelLinear):
            module.to_out[0].__class__ = module.to_add_out.__class__ = PartialLinear  # type: ignore[index]
            kind = type(module)
            module.__class__ = joined.setdefault(kind, type(f"Joined{kind.__name__}", (JoinedStreams, kind), {}))
