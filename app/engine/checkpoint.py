"""Check a whole checkpoint at start-up: every part's files, classes, tensor names and shapes, and the split over ranks.

Only configurations and the headers of the weight files are read, which takes seconds and no memory. A fault is one
message at start-up instead of a rank, an encoder or a decoder that fails later.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from app.engine import quantized
from app.engine.checkpoint_files import CheckpointError, SafetensorsFile, read_json, refuse_foreign
from app.engine.families import family_of
from app.engine.fitting import SCHEDULER, check_fit, check_scheduler
from app.engine.loading import check_tensors, open_transformer, shapes
from app.engine.parallel import shard_specs
from app.engine.sequence import check_heads
from app.engine.weight_files import ENCODER_WEIGHTS, WEIGHTS, encoder_variant, weight_files

TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""Any of these sets of files makes a tokenizer."""


@dataclass(frozen=True)
class PipelineParts:
    """The parts of a pipeline's folder: component folders with their classes, and tokenizer folders."""

    classes: Mapping[str, str]
    tokenizers: tuple[str, ...]


_FLUX1 = PipelineParts(
    classes={
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    tokenizers=("tokenizer", "tokenizer_2"),
)
_KLEIN = PipelineParts(
    classes={
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "text_encoder": "Qwen3ForCausalLM",
    },
    tokenizers=("tokenizer",),
)
_PARTS = {"FluxPipeline": _FLUX1, "FluxKontextPipeline": _FLUX1, "Flux2KleinPipeline": _KLEIN}


def check_checkpoint(
    model: Path, tensor_parallel_size: int, sequence_parallel_size: int = 1, single_file: Path | None = None
) -> None:
    """Check that ``model`` can be served, as far as its configurations and its files' headers show.

    Args:
        model: a folder in diffusers layout.
        tensor_parallel_size: ranks that share the transformer.
        sequence_parallel_size: ranks with equal shards that share an image's tokens.
        single_file: the transformer's weights, in BFL's layout, instead of those of ``model``.

    Raises:
        CheckpointError: a file is missing, truncated or of another kind, a part is of another class, quantized, lacks a
            tensor or does not fit the others, or the scheduler asks for what sampling does not do.
        ValueError: the ranks can't share the attention heads.
    """
    family = family_of(model)  # raises for an unknown pipeline
    index = read_json(model / "model_index.json")
    parts = _PARTS[index["_class_name"]]
    for name, expected in parts.classes.items():
        _check_class(model, index, name, expected)
    _check_listed(model, index, "scheduler", SCHEDULER)
    check_scheduler(model)
    built = {name: _build(model / name, expected) for name, expected in parts.classes.items()}
    transformer = built["transformer"]
    shard_specs(transformer, tensor_parallel_size)
    check_heads(transformer.config.num_attention_heads // tensor_parallel_size, sequence_parallel_size)
    check_fit(model, family, {name: part.config for name, part in built.items()})
    for name, part in built.items():
        if name == "transformer":
            _check_transformer(model / name, part, single_file)
        else:
            _check_weights(model / name, part)
    encoder_variant(model)  # raises for several
    for name in parts.tokenizers:
        _check_tokenizer(model / name)


def _check_class(model: Path, index: Mapping[str, Any], name: str, expected: str) -> None:
    _check_listed(model, index, name, expected)
    path = model / name / "config.json"
    config = read_json(path)
    classes = config.get("architectures") or [config.get("_class_name")]
    if expected not in classes:
        raise CheckpointError(f"{path} names the class {classes[0]!r}; supported is {expected}")
    if method := quantized.method_of_config(config):
        raise CheckpointError(f"{path}: the weights are quantized by {method}, which is not read: {quantized.REMEDY}")


def _check_listed(model: Path, index: Mapping[str, Any], name: str, expected: str) -> None:
    entry = index.get(name)
    listed = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    if listed != expected:
        raise CheckpointError(f"{model / 'model_index.json'}: {name} is {listed!r}; this pipeline's is {expected}")


def _build(folder: Path, expected: str) -> Any:
    """The component that ``folder``'s ``config.json`` describes, without memory for its parameters."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        return _meta_part(expected, config) if hasattr(diffusers, expected) else _meta_encoder(expected, config)
    except (TypeError, ValueError, LookupError, ArithmeticError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not describe a {expected}: {reason}") from error


def _check_transformer(folder: Path, transformer: diffusers.ModelMixin, single_file: Path | None) -> None:
    with ExitStack() as stack:
        check_tensors(folder, shapes(transformer), open_transformer(stack, folder, transformer, single_file))


def _check_weights(folder: Path, part: nn.Module) -> None:
    is_encoder = not isinstance(part, diffusers.ModelMixin)
    with ExitStack() as stack:
        stem = ENCODER_WEIGHTS if is_encoder else WEIGHTS
        files = [stack.enter_context(SafetensorsFile(path)) for path in weight_files(folder, stem)]
        if is_encoder:
            _check_encoder(folder, part, files)
        else:
            check_tensors(folder, shapes(part) | _buffers(part), files)


def _meta_part(name: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        part: nn.Module = getattr(diffusers, name).from_config(config)
    return part


def _meta_encoder(name: str, config: dict[str, Any]) -> nn.Module:
    cls = getattr(transformers, name)
    with torch.device("meta"):
        encoder: nn.Module = cls(cls.config_class.from_dict(config))
    return encoder


def _buffers(part: nn.Module) -> dict[str, tuple[int, ...]]:
    saved = part.state_dict()
    return {name: tuple(buffer.shape) for name, buffer in part.named_buffers() if name in saved}


def _check_encoder(folder: Path, part: nn.Module, files: list[SafetensorsFile]) -> None:
    """Check a text encoder: extra tensors are allowed, missing ones are not (transformers would fill them with noise).

    Some published weights have a prefix that today's classes don't use (``text_model.embeddings...``).
    """
    for file in files:
        file.refuse_quantized()
    stored = {name: tensor.shape for file in files for name, tensor in file.tensors.items()}
    stored |= {name.partition(".")[2]: shape for name, shape in stored.items() if name.startswith("text_model.")}
    expected = shapes(part)
    missing = sorted(expected.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the text encoder, among them {missing[0]}")
    for name, shape in expected.items():
        if stored[name] != shape:
            raise CheckpointError(f"{folder}: {name} has shape {stored[name]}, config.json asks for {shape}")


def _check_tokenizer(folder: Path) -> None:
    read_json(folder / "tokenizer_config.json")
    for name in sorted({name for names in TOKENIZER_FILES for name in names}):
        refuse_foreign(folder / name)
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        choices = " or ".join(" with ".join(names) for names in TOKENIZER_FILES)
        raise CheckpointError(f"{folder} has no tokenizer: it needs {choices}")
