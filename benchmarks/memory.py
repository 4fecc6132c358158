"""Memory of each model by component at its real geometry, computed from the models' own classes; no weights are made.

    python -m benchmarks.memory

Weights are counted, a rank's shard by the plan that the loader follows. What a forward pass holds at its fullest is
found by running the real modules on fake tensors (shapes without data) and adding up the storages that are alive:
kernels' workspaces, the allocator's rounding and CUDA's own memory come on top. `benchmarks.fits` makes the tables of
docs/models.md of the result.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.engine.attention import positions, use_positions
from app.engine.fp8 import quantize
from app.engine.fused import fuse
from app.engine.geometry import Geometry
from app.engine.modulation import Modulation
from app.engine.parallel import TensorParallelGroup, modulation_linears, parallelize, planned_linears, shard_specs
from app.engine.sequence import SequenceParallelGroup
from benchmarks.checkpoints import weights
from benchmarks.checkpoints.geometry import MODELS, Part, Repository, Scale, repository
from benchmarks.loading import bound_mb
from magcache_core import get_strategy

RESULTS = Path(__file__).parent / "results" / "memory.json"
TEXT_TOKENS = {"flux.1-dev": 512, "flux.1-schnell": 256, "flux.1-kontext-dev": 512, "flux.2-klein-4b": 512}
SIZES = (1, 2, 3, 4)
STEPS = 28
GB = 1e9


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators make, and notes the most that were alive at once, in bytes."""

    def __init__(self, weights_of: torch.nn.Module) -> None:
        """Leave out the tensors of the module ``weights_of``, which are there before."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        for tensor in (*weights_of.parameters(), *weights_of.buffers()):
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and note what it made."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


class OneOfMany(TensorParallelGroup):
    """A rank without the others: sums take no memory of their own."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """``partial``, as if it were everybody's."""
        return partial


@dataclass(frozen=True)
class Image:
    """What a forward pass works on; ``references`` are further images of the same size beside it."""

    size: int
    text_tokens: int
    references: int = 0
    rows: int = 1

    @property
    def geometry(self) -> Geometry:
        """Its image tokens."""
        return Geometry.of(self.size, self.size)


def weight_bytes(part: Part) -> int:
    """Bytes of a part's weights, whole."""
    return sum(tensor.bytes for tensor in weights.tensors(weights.build(part)))


def shard(part: Part, size: int) -> Any:
    """Rank 0's shard of the transformer, on the meta device, in bfloat16."""
    transformer: Any = weights.build(part)
    parallelize(transformer, shard_specs(transformer, size), OneOfMany(0, size))
    fuse(transformer)
    for module in transformer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.to(weights.DTYPE), requires_grad=False))
    return transformer


def shard_bytes(transformer: Any) -> int:
    """Bytes of a shard's weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in transformer.parameters())


def modulation_bytes(transformer: Any) -> int:
    """Bytes of a shard's modulation weights, which only admission reads."""
    linears = [transformer.get_submodule(name) for names in modulation_linears(transformer) for name in names]
    return sum(shard_bytes(linear) for linear in linears)


def alive_at_most(module: torch.nn.Module, run: Callable[[], object]) -> int:
    """The most bytes that are alive at once while ``run`` computes with ``module``, whose weights don't count."""
    with torch.no_grad(), LiveBytes(module) as live:
        run()
    return live.peak


def step_bytes(transformer: Any, image: Image, size: int, *, fp8: bool = False) -> int:
    """What the block stack holds at its fullest: everything but weights, for all rows of a computed step.

    Operator by operator, as it runs without a compiler: with one it holds less. ``fp8`` quantizes ``transformer``.
    """
    config = transformer.config
    dim = config.num_attention_heads * config.attention_head_dim
    axes = len(config.axes_dims_rope)
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(transformer)
        if fp8:
            for _, linear in planned_linears(transformer):
                quantize(linear)
        modulation = Modulation(transformer, OneOfMany(0, size), torch.device("cpu"))
        image_tokens = image.geometry.tokens * (1 + image.references)
        joint = image_tokens + image.text_tokens
        use_positions(transformer, SequenceParallelGroup(), complex_rotary=False)
        rotary = positions(transformer, transformer.pos_embed(torch.zeros(joint, axes)), ())

        def run() -> None:
            hidden = torch.empty(image.rows, image_tokens, dim, dtype=weights.DTYPE)
            context = torch.empty(image.rows, image.text_tokens, dim, dtype=weights.DTYPE)
            ahead = modulation.by_block(torch.empty(image.rows, modulation.width, dtype=weights.DTYPE))
            get_strategy(transformer).blocks(transformer, hidden, context, ahead, rotary)

        return alive_at_most(transformer, run)


def decode_bytes(part: Part, size: int, *, tiling: bool) -> int:
    """What the VAE holds at its fullest while it decodes one image of ``size`` x ``size``."""
    vae: Any = weights.build(part)
    if tiling:
        vae.enable_tiling()
    with FakeTensorMode(allow_non_fake_inputs=True):
        to_fake(vae)
        side = size // 8
        return alive_at_most(
            vae, lambda: vae.decode(torch.empty(1, vae.config.latent_channels, side, side, dtype=weights.DTYPE))
        )


def to_fake(module: torch.nn.Module) -> None:
    """Give every tensor of ``module`` a fake one in its place, in bfloat16."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=weights.DTYPE)
            setattr(part, name, torch.nn.Parameter(fake, requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            dtype = weights.DTYPE if buffer.is_floating_point() else buffer.dtype
            setattr(part, name, torch.empty(buffer.shape, dtype=dtype))


def model_report(model: str, described: Repository, image: Image) -> dict[str, Any]:
    """One model by component, in GB of 10^9 bytes."""
    parts = described.parts
    config: Any = weights.build(parts["transformer"]).config
    dim = config.num_attention_heads * config.attention_head_dim
    encoders = {name: weight_bytes(part) for name, part in parts.items() if name.startswith("text_encoder")}
    ranks = {}
    for size in SIZES:
        transformer = shard(parts["transformer"], size)
        held = shard_bytes(transformer)
        ranks[str(size)] = {
            "weights_gb": _gb(held),
            "modulation_gb": _gb(modulation_bytes(transformer)),
            "computed_step_gb": _gb(step_bytes(transformer, image, size)),
            "computed_step_fp8_gb": _gb(step_bytes(shard(parts["transformer"], size), image, size, fp8=True)),
            "host_bound_gb": round(bound_mb(held / 1e6) / 1e3, 1),
        }
    whole = weight_bytes(parts["transformer"])
    # What tensor parallelism leaves whole on every rank: norms, embeddings.
    two = shard_bytes(shard(parts["transformer"], 2))
    return {
        "parameters": sum(weights.parameters(weights.tensors(weights.build(parts["transformer"])))),
        "heads": config.num_attention_heads,
        "transformer_gb": _gb(whole),
        "replicated_gb": _gb(2 * two - whole),
        "text_encoders_gb": {name: _gb(size) for name, size in encoders.items()},
        "vae_gb": _gb(weight_bytes(parts["vae"])),
        "vae_decode_gb": _gb(decode_bytes(parts["vae"], image.size, tiling=False)),
        "vae_decode_double_gb": _gb(decode_bytes(parts["vae"], 2 * image.size, tiling=False)),
        "vae_decode_double_tiled_gb": _gb(decode_bytes(parts["vae"], 2 * image.size, tiling=True)),
        # Latents and one residual, image tokens x dim in bfloat16, on every rank for every image under way.
        "residual_per_image_mb": round(image.geometry.tokens * dim * 2 / 1e6, 1),
        # What an image's computed steps look up, at most at all of them.
        "modulation_per_image_mb": round(modulation_bytes(weights.build(parts["transformer"])) / dim * STEPS / 1e6, 1),
        "tensor_parallel_size": ranks,
        "model": model,
    }


def _gb(size: int) -> float:
    return round(size / GB, 2)


def report(scale: Scale = "full", size: int = 1024) -> dict[str, Any]:
    """All models at images of ``size`` x ``size``."""
    models = {}
    for model in MODELS:
        image = Image(size, TEXT_TOKENS[model], references=int("kontext" in model))
        models[model] = model_report(model, repository(model, scale), image)
    return {"scale": scale, "image": f"{size}x{size}", "dtype": "bfloat16", "models": models}


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.write_text(json.dumps(report(size=args.size), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
