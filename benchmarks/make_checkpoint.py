"""Write a FLUX checkpoint of random weights as the model's repository lays it out, so that every loading path can run.

    python -m benchmarks.make_checkpoint --model flux.1-dev --scale tiny --out out/flux-dev-tiny

Folders, file names, tensor names, dtype (bfloat16), configurations, and where weights are split into files are those of
the published repository; values are random and the tokenizers are trained on the spot. Left out are the copies of the
same weights for other programs that stand beside the folders, which nothing here reads. ``full`` has the real geometry
(34 GB for FLUX.1, 16 GB for FLUX.2-klein-4B) and is written tensor by tensor in the memory of the largest one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast, get_args

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler

from benchmarks.checkpoints import tokenizers, weights
from benchmarks.checkpoints.geometry import MODELS, Part, Repository, Scale, repository


def make_checkpoint(
    model: str, scale: str, out: Path, seed: int = 0, components: Collection[str] | None = None
) -> Path:
    """Write ``model`` at ``scale`` into the folder ``out``, which must not exist or be empty, and return it.

    Args:
        model: one of `MODELS`.
        scale: ``full``, ``1/8`` (an eighth of the parameters) or ``tiny``.
        seed: of the weights; the same seed gives the same files.
        components: folders to write; None writes all.

    Raises:
        ValueError: an unknown model, scale or component.
        FileExistsError: ``out`` holds something.
    """
    described = repository(model, cast(Scale, scale))
    known = {*described.parts, *described.tokenizers, "scheduler"}
    if components is not None and (unknown := set(components) - known):
        raise ValueError(f"{model} has no component {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    wanted = known if components is None else set(components)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in described.parts.items():
        if name in wanted:
            _write_part(part, out / name, seed)
    for name, tokenizer in described.tokenizers.items():
        if name in wanted:
            (out / name).mkdir()
            tokenizers.WRITERS[tokenizer](out / name)
    if "scheduler" in wanted:
        FlowMatchEulerDiscreteScheduler(**described.scheduler).save_pretrained(out / "scheduler")
    # Last: a folder with it is complete.
    _write_json(out / "model_index.json", _model_index(described))
    return out


def _write_part(part: Part, folder: Path, seed: int) -> None:
    folder.mkdir()
    model: Any = weights.build(part)
    if part.library == "diffusers":
        model.save_config(folder)
    else:
        config = model.config.to_diff_dict() | {"architectures": [part.class_name], "dtype": "bfloat16"}
        _write_json(folder / "config.json", config)
    weights.write(weights.tensors(model, part.prefix), folder, part.weights, part.shard_bytes, seed)


def _model_index(described: Repository) -> dict[str, Any]:
    libraries = {name: [part.library, part.class_name] for name, part in described.parts.items()}
    libraries |= {name: ["transformers", cls] for name, cls in described.tokenizers.items()}
    libraries["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    head = {"_class_name": described.pipeline, "_diffusers_version": diffusers.__version__}
    return {**head, **described.extra, **dict(sorted(libraries.items()))}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--scale", choices=get_args(Scale), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="FOLDER", help="write these components only, e.g. transformer")
    args = parser.parse_args()
    out = make_checkpoint(args.model, args.scale, args.out, args.seed, args.only)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{args.model} at scale {args.scale}: {size / 1e9:.3f} GB in {out}")


if __name__ == "__main__":
    main()
