"""The tables of docs/models.md from benchmarks/results: settings that fit cards, memory by component, loading.

python -m benchmarks.fits            # prints the tables
python -m benchmarks.fits --write    # puts them into docs/models.md
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loading import table as loading_table

RESULTS = Path(__file__).parent / "results" / "memory.json"
LOADING = Path(__file__).parent / "results" / "loading.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
MARKS = "<!-- {name}: python -m {module} --write -->", "<!-- end of {name} -->"

USABLE = 0.92
"""Share of a card's memory that is planned with; the rest is for the allocator's rounding and kernels' workspaces."""
PROCESS_GB = 0.5
"""What CUDA takes for each process on a card."""
RESIDUALS = 3
"""Most residuals that an image keeps, for the planner's fitted reuse."""
MOST_ROWS = 16
CARDS = ((1, 24), (2, 24), (3, 24), (4, 24), (1, 48), (2, 48), (1, 80), (2, 80))
"""Number of cards and GiB of each."""


@dataclass(frozen=True)
class Fit:
    """Settings, and how many 1024x1024 images may be under way with them."""

    tensor_parallel_size: int
    text_encoder: str
    vae: str
    rows: int
    own_card: bool = False
    fp8: bool = False
    on_host: bool = False

    def __str__(self) -> str:
        where = "encoder and VAE on a card of their own" if self.own_card else f"encoder {self.text_encoder}"
        if not self.own_card and self.vae == "cpu":
            where += ", VAE cpu"
        rows = f"{self.rows}+" if self.rows == MOST_ROWS else str(self.rows)
        special = ("fp8, " if self.fp8 else "") + ("modulation_on_host, " if self.on_host else "")
        return f"tp {self.tensor_parallel_size}, {special}{where}, {rows} rows"


def fit(model: dict[str, Any], count: int, gib: int) -> Fit | None:
    """The first of these that leaves room for an image; None when none does.

    One rank per card with encoder and VAE beside one of them; one card for encoder and VAE; the modulation's weights in
    host memory; encoders on the CPU, with that or with 8-bit weights as well; encoders and VAE on the CPU.
    """
    room = USABLE * gib * 1.073741824
    encoder = sum(model["text_encoders_gb"].values()) + PROCESS_GB
    vae = model["vae_gb"] + model["vae_decode_gb"] + PROCESS_GB

    def rows(size: int, beside: float, fp8: bool = False, on_host: bool = False) -> int:
        rank = model["tensor_parallel_size"].get(str(size))
        if rank is None or model["heads"] % size:
            return 0
        # Of what the ranks share out, all but the modulation is in 8 bits then; what each holds whole is not.
        whole = model["replicated_gb"] + rank["modulation_gb"]
        held = (rank["weights_gb"] + whole) / 2 if fp8 else rank["weights_gb"]
        held -= rank["modulation_gb"] if on_host else 0.0
        kept_mb = RESIDUALS * model["residual_per_image_mb"] + model["modulation_per_image_mb"]
        row = rank["computed_step_fp8_gb" if fp8 else "computed_step_gb"] + kept_mb / 1e3
        return min(int((room - held - PROCESS_GB - beside) / row), MOST_ROWS)

    if (most := rows(count, encoder + vae)) > 0:
        return Fit(count, "gpu", "gpu", most)
    if encoder + vae <= room and count > 1 and (most := rows(count - 1, 0.0)) > 0:
        return Fit(count - 1, "gpu", "gpu", most, own_card=True)
    if (most := rows(count, encoder + vae, on_host=True)) > 0:
        return Fit(count, "gpu", "gpu", most, on_host=True)
    if (most := rows(count, vae)) > 0:
        return Fit(count, "cpu", "gpu", most)
    if (most := rows(count, vae, on_host=True)) > 0:
        return Fit(count, "cpu", "gpu", most, on_host=True)
    if (most := rows(count, vae, fp8=True)) > 0:
        return Fit(count, "cpu", "gpu", most, fp8=True)
    if (most := rows(count, 0.0)) > 0:
        return Fit(count, "cpu", "cpu", most)
    return None


def component_table(models: dict[str, Any]) -> str:
    """Weights by component, in GB."""
    lines = [
        "| model | parameters | transformer | of it on every rank | text encoders | VAE | decoding 1024² | 2048² "
        "| tiled |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = ("transformer_gb", "replicated_gb", "", "vae_gb", "vae_decode_gb", "vae_decode_double_gb")
    for name, model in models.items():
        encoders = " + ".join(f"{size:.2f}" for size in model["text_encoders_gb"].values())
        cells = [f"{model[size]:.2f}" if size else encoders for size in (*sizes, "vae_decode_double_tiled_gb")]
        lines.append(f"| {name} | {model['parameters'] / 1e9:.2f} B | {' | '.join(cells)} |")
    return "\n".join(lines)


def shard_table(models: dict[str, Any]) -> str:
    """What one rank holds, in GB, and the host memory that loading it may take."""
    lines = [
        "| model | ranks | weights per rank | a computed step, per image | in fp8 | host memory to load, at most |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in models.items():
        for size, rank in model["tensor_parallel_size"].items():
            lines.append(
                f"| {name} | {size} | {rank['weights_gb']:.2f} | {rank['computed_step_gb']:.2f} "
                f"| {rank['computed_step_fp8_gb']:.2f} | {rank['host_bound_gb']:.1f} |"
            )
    return "\n".join(lines)


def fit_table(models: dict[str, Any]) -> str:
    """Settings that fit, by model and cards."""
    lines = ["| cards | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    for count, gib in CARDS:
        cells = [str(fit(model, count, gib) or "does not fit") for model in models.values()]
        lines.append(f"| {count} x {gib} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(report: dict[str, Any]) -> str:
    """All three, as they stand in the document."""
    models = report["models"]
    return "\n\n".join(
        [
            "**Settings that fit**",
            fit_table(models),
            "**Memory by component**, in GB (10⁹ bytes), bfloat16",
            component_table(models),
            "**What one rank holds**, in GB, at 1024x1024",
            shard_table(models),
        ]
    )


def put(document: str, name: str, text: str, module: str = "benchmarks.fits") -> str:
    """``document`` with ``text``, which ``module`` writes, between the marks that bear ``name``."""
    begin, end = (mark.format(name=name, module=module) for mark in MARKS)
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def with_tables(document: str) -> str:
    """``document`` with all tables made anew from the kept results."""
    memory, loading = (json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, LOADING))
    return put(put(document, "memory", tables(memory)), "loading", loading_table(loading))


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
