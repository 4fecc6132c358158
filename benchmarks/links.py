"""Which layout suits which cards: a computed step's time by tensor_parallel_size, sequence_parallel_size and link.

    python -m benchmarks.links            # prints the tables
    python -m benchmarks.links --write    # puts them into docs/models.md

Arithmetic and no measurement: what the ranks send is counted from the model's geometry, the step on one card is the
compiled one of `benchmarks.traffic` (an H100), divided among the ranks, and nothing overlaps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoints.geometry import repository
from benchmarks.fits import DOCUMENT, PROCESS_GB, USABLE, put
from benchmarks.fits import RESULTS as MEMORY
from benchmarks.traffic import RESULTS as TRAFFIC
from benchmarks.traffic import TEXT_TOKENS

MODELS = ("flux.1-dev", "flux.2-klein-4b")
IMAGE_TOKENS = 4096
BYTES = 2
LINKS = {"NVLink, 300 GB/s": 300e9, "PCIe, 20 GB/s": 20e9, "PCIe without peer access, 8 GB/s": 8e9}
"""What one rank sends per second while all do."""
CARDS = ((2, 24), (2, 80), (4, 24), (4, 80), (8, 80))


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a transformer: blocks, width, attention heads, and one card's step in seconds."""

    name: str
    double_blocks: int
    single_blocks: int
    dim: int
    heads: int
    step_s: float

    def sent(self, tensor: int, sequence: int) -> float:
        """Bytes that one rank sends in a computed step, at 1024x1024 and one row.

        A ring's sum over n ranks sends 2 (n - 1) / n of the tensor: three per double block (attention of both streams,
        and each stream's feed-forward layer; together two tensors of all tokens) and one per single block. An
        exchange among n ranks sends (n - 1) / n of a rank's tokens, for queries, keys, values and the output.
        """
        tokens = (IMAGE_TOKENS + TEXT_TOKENS) / sequence
        sums = 2 * self.double_blocks + self.single_blocks
        summed = 2 * (tensor - 1) / tensor * sums * tokens * self.dim
        exchanges = 4 * (self.double_blocks + self.single_blocks)
        exchanged = (sequence - 1) / sequence * exchanges * tokens * self.dim / tensor
        return BYTES * (summed + exchanged)

    def step_seconds(self, tensor: int, sequence: int, rate: float) -> float:
        """A computed step of one image."""
        return self.step_s / (tensor * sequence) + self.sent(tensor, sequence) / rate


def described(name: str) -> Model:
    """The published geometry of ``name``; its step is FLUX.1-dev's by the weights that a step reads."""
    config = repository(name, "full").parts["transformer"].config
    memory, traffic = (json.loads(path.read_text(encoding="utf-8")) for path in (MEMORY, TRAFFIC))
    dev, own = memory["models"][traffic["model"]], memory["models"][name]

    def read(model: dict[str, Any]) -> float:
        rank: dict[str, float] = model["tensor_parallel_size"]["1"]
        return rank["weights_gb"] - rank["modulation_gb"]

    step = traffic["variants"]["this engine, compiled"]["cudnn_s"] * read(own) / read(dev)
    blocks = config.get("num_layers", 19), config.get("num_single_layers", 38)
    heads = own["heads"]
    return Model(name, *blocks, heads * config.get("attention_head_dim", 128), heads, step)


def layouts(heads: int, cards: int) -> Iterator[tuple[int, int, int]]:
    """(tensor_parallel_size, sequence_parallel_size, num_replicas) that use all of ``cards``."""
    for tensor in range(1, cards + 1):
        for sequence in range(1, cards // tensor + 1):
            if cards % (tensor * sequence) == 0 and heads % tensor == 0 and sequence <= heads // tensor:
                yield tensor, sequence, cards // (tensor * sequence)


def on_host(memory: dict[str, Any], tensor: int, gib: int) -> bool | None:
    """Whether a rank with one image under way needs ``modulation_on_host`` to fit a card; None when it doesn't fit.

    Encoder and VAE are elsewhere.
    """
    rank = memory["tensor_parallel_size"].get(str(tensor))
    if rank is None:
        return None
    row = rank["computed_step_gb"] + (memory["residual_per_image_mb"] + memory["modulation_per_image_mb"]) / 1e3
    over = rank["weights_gb"] + row + PROCESS_GB - USABLE * gib * 1.073741824
    return None if over > rank["modulation_gb"] else bool(over > 0)


def step_table(model: Model) -> str:
    """Milliseconds of a computed step by layout and link, and what a rank sends."""
    lines = [f"| {model.name}: tp x sp | a rank sends | " + " | ".join(LINKS) + " |", "|---" * (2 + len(LINKS)) + "|"]
    for tensor, sequence in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (2, 4), (1, 8)):
        times = " | ".join(f"{model.step_seconds(tensor, sequence, rate) * 1e3:.0f} ms" for rate in LINKS.values())
        lines.append(f"| {tensor} x {sequence} | {model.sent(tensor, sequence) / 1e9:.2f} GB | {times} |")
    return "\n".join(lines)


def best_table(models: list[Model]) -> str:
    """By cards and link: the layout with the shortest step; and the one that makes most images, where it is another."""
    memory = json.loads(MEMORY.read_text(encoding="utf-8"))["models"]
    columns = [(model, link) for model in models for link in list(LINKS)[:2]]
    titles = [f"{model.name}, {link.partition(',')[0]}" for model, link in columns]
    lines = ["| cards | " + " | ".join(titles) + " |", "|---" * (1 + len(columns)) + "|"]
    for count, gib in CARDS:
        cells = [best(model, memory[model.name], count, gib, LINKS[link]) for model, link in columns]
        lines.append(f"| {count} x {gib} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best(model: Model, memory: dict[str, Any], cards: int, gib: int, rate: float) -> str:
    """The layouts of shortest step and of most images per second, as settings."""
    possible = [one for one in layouts(model.heads, cards) if on_host(memory, one[0], gib) is not None]
    if not possible:
        return "does not fit"
    seconds = {one: model.step_seconds(one[0], one[1], rate) for one in possible}
    quickest = min(possible, key=lambda one: seconds[one])
    busiest = max(possible, key=lambda one: one[2] / seconds[one])

    def settings(layout: tuple[int, int, int]) -> str:
        tensor, sequence, replicas = layout
        text = f"tp {tensor}, sp {sequence}" + (f", {replicas} replicas" if replicas > 1 else "")
        return text + (", modulation_on_host" if on_host(memory, tensor, gib) else "")

    text = f"{settings(quickest)}: {seconds[quickest] * 1e3:.0f} ms"
    return text if busiest == quickest else f"{text}; most images: {settings(busiest)}"


def tables() -> str:
    """Both, as they stand in the document."""
    models = [described(name) for name in MODELS]
    return "\n\n".join(
        [
            "**A computed step by layout**, 1024x1024, one row, bfloat16, compiled",
            step_table(models[0]),
            "**The best layout for your cards** by the same arithmetic: the shortest step, and what makes most images "
            "of a full queue where that is another",
            best_table(models),
        ]
    )


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(put(document, "layouts", tables(), "benchmarks.links"), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
