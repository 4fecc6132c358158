"""Read a low-rank adapter (LoRA, Hu et al., arXiv 2106.09685) from its safetensors file.

`check_lora` reads the header only, for a list of what there is; `read_lora` all of it, and compares the file's digest
first, so that every rank has the same weights or an error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors

from app.engine.checkpoint_files import CheckpointError, SafetensorsFile
from app.engine.lora_names import Kind, LoraError, Target, parse

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoraInfo:
    """What the header of an adapter's file says.

    Attributes:
        rank: the largest of its modules' ranks.
        linears: how many linears of the transformer it changes.
        weights: numbers that a rank keeps of it, at most.
        text_encoder: whether it changes a text encoder as well, which is not applied.
    """

    rank: int
    linears: int
    weights: int
    text_encoder: bool


@dataclass(frozen=True)
class LowRank:
    """What an adapter of scale 1 adds to the weight of one linear: ``up @ down``.

    Attributes:
        down: (rank, in_features), float32, multiplied by alpha / rank.
        up: (out_features, rank), float32.
    """

    down: torch.Tensor
    up: torch.Tensor


def lora_digest(path: Path) -> str:
    """The content of a file as a name: SHA-256, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_lora(path: Path, known: Mapping[str, Target]) -> LoraInfo:
    """What the adapter in ``path`` is, from its header alone.

    Args:
        known: `app.engine.lora_names.targets` of the transformer.

    Raises:
        LoraError: it cannot be read, or it is no plain LoRA of this transformer.
    """
    try:
        with SafetensorsFile(path) as file:
            stored = file.tensors
        with safe_open(path, framework="pt") as opened:
            _config(path, opened.metadata())
    except CheckpointError as error:
        raise LoraError(str(error)) from error
    modules = _modules(path, {name: one.shape for name, one in stored.items()}, known)
    ranks = {module: stored[pair["down"]].shape[0] for module, pair in modules.items()}
    changed = [(ranks[module], known[module]) for module in modules]
    return LoraInfo(
        rank=max(ranks.values()),
        linears=sum(len(target.outputs) for _, target in changed),
        weights=sum(
            rank * (target.inputs + outputs) for rank, target in changed for outputs in target.outputs.values()
        ),
        text_encoder=any(parse(name) is None for name in stored),
    )


def read_lora(path: Path, known: Mapping[str, Target], digest: str = "") -> dict[str, LowRank]:
    """The adapter in ``path``, by linear of diffusers' transformer.

    Args:
        known: `app.engine.lora_names.targets` of the transformer.
        digest: what `lora_digest` of the file must be; empty for any.

    Raises:
        LoraError: as `check_lora`; or the file has another digest, or a weight that is not finite.
    """
    try:
        content = path.read_bytes()
        tensors = load_tensors(content)
    except (OSError, SafetensorError) as error:
        raise LoraError(f"{path} cannot be read ({error}): download it again") from error
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise LoraError(f"{path} was replaced since it was listed: reload the list of LoRAs, and ask again")
    config = _config(path, json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__"))
    made: dict[str, LowRank] = {}
    for module, pair in _modules(path, {name: tuple(one.shape) for name, one in tensors.items()}, known).items():
        target = known[module]
        down, up = (_finite(path, pair[kind], tensors[pair[kind]].float()) for kind in ("down", "up"))
        alpha = float(tensors[pair["alpha"]]) if "alpha" in pair else None
        # Into the half that is never near zero: `up` is trained from zeros, and rounded to float16 it might be lost.
        down = _finite(path, pair["down"], down * _scale(next(iter(target.outputs)), alpha, len(down), config))
        if target.halves_swapped:
            up = torch.cat(up.chunk(2)[::-1])
        parts = up.split(list(target.outputs.values()))
        made |= {linear: LowRank(down, part) for linear, part in zip(target.outputs, parts, strict=True)}
    return made


def _modules(path: Path, shapes: Mapping[str, Shape], known: Mapping[str, Target]) -> dict[str, dict[Kind, str]]:
    """The names of the tensors that belong together, by module: a key of ``known``."""
    modules: dict[str, dict[Kind, str]] = {}
    for name in shapes:
        try:
            key = parse(name)
        except LoraError as error:
            raise LoraError(f"{path} {error}") from error
        if key is None:
            continue
        if key.module not in known:
            raise LoraError(f"{path} changes {name!r}, which the model does not have: it belongs to another model")
        pair = modules.setdefault(key.module, {})
        if key.kind in pair:
            raise LoraError(f"{path} holds both {pair[key.kind]!r} and {name!r}: keep one of them")
        pair[key.kind] = name
    if not modules:
        raise LoraError(f"{path} changes no part of the transformer: use another file")
    _refuse_double(path, modules, known)
    for module, pair in modules.items():
        _check_shapes(path, module, pair, shapes, known[module])
    return modules


def _refuse_double(path: Path, modules: Iterable[str], known: Mapping[str, Target]) -> None:
    changed: dict[str, str] = {}
    for module in modules:
        for linear in known[module].outputs:
            if linear in changed:
                raise LoraError(
                    f"{path} changes {linear} twice, as {changed[linear]} and as {module}: keep one of them"
                )
            changed[linear] = module


def _check_shapes(
    path: Path, module: str, pair: Mapping[Kind, str], shapes: Mapping[str, Shape], target: Target
) -> None:
    if missing := {"down", "up"} - set(pair):
        raise LoraError(f"{path} has no {missing.pop()} part of {module}: the file is incomplete, download it again")
    down, up = shapes[pair["down"]], shapes[pair["up"]]
    rank = down[0] if down else 0
    if rank == 0:
        raise LoraError(f"{path}: {pair['down']} has shape {down}; its rank must be at least 1")
    expected = (rank, target.inputs), (sum(target.outputs.values()), rank)
    if (down, up) != expected:
        raise LoraError(
            f"{path}: {module} has shapes {down} and {up}, the model asks for {expected[0]} and {expected[1]}: "
            "the file belongs to another model"
        )
    if "alpha" in pair and prod(shapes[pair["alpha"]]) != 1:
        raise LoraError(f"{path}: {pair['alpha']} is not a single number: the file is damaged, download it again")


def _config(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """PEFT's configuration, which diffusers writes into the header; empty without one."""
    try:
        config = json.loads((metadata or {}).get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise LoraError(f"{path}: lora_adapter_metadata is not valid JSON: {error}") from error
    config = {name.removeprefix("transformer."): value for name, value in config.items()}
    if config.get("use_dora"):
        raise LoraError(f"{path} is a DoRA (lora_adapter_metadata); only plain LoRAs are applied: use another file")
    return config


def _scale(linear: str, alpha: float | None, rank: int, config: Mapping[str, Any]) -> float:
    """What an adapter's product is multiplied by: alpha over its rank, 1 where the file names no alpha."""
    if alpha is None:
        if "lora_alpha" not in config:
            return 1.0
        # As PEFT looks them up: the last parts of a path, as a regular expression.
        patterns = config.get("alpha_pattern", {}).items()
        own = (value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", linear))
        alpha = float(next(own, config["lora_alpha"]))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _finite(path: Path, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise LoraError(f"{path}: {name} has values that are not finite: the file is damaged, download it again")
    return tensor
