"""Stage layout: the double-stream blocks alone learn, from a caption and pure noise, what stands where.

Nothing of the picture is left in pure noise, so that every image token has to read its colour and shape from the
caption at its own place. Learned first and without pictures, this is cheap (a third of the blocks, no autoencoder), and
two objects no longer swap their colours; the flow loss alone had not taught that after a hundred thousand pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import loop, scenes
from .attention import fast_attention
from .latents import SHARES
from .text import Examples, Text, examples
from .transformer import (
    BATCH,
    GUIDANCE,
    WORKERS,
    Batch,
    LabelHead,
    Workers,
    build,
    image_ids,
    optimizers,
    predict,
    update,
)

CAPTIONS = 40000


@dataclass
class Captions:
    """Random batches of captions with their labels, each of one aspect ratio."""

    sets: list[Examples]
    generator: torch.Generator
    device: torch.device

    def draw(self) -> Batch:
        aspect = int(torch.multinomial(torch.tensor(SHARES), 1, generator=self.generator))
        part, (width, height) = self.sets[aspect], scenes.ASPECTS[aspect]
        pick = torch.randint(len(part.t5_ids), (BATCH,), generator=self.generator)
        noise = torch.randn(BATCH, part.cells.shape[1], 64, generator=self.generator)
        tensors = (
            noise,
            torch.zeros_like(noise),
            torch.ones(BATCH),
            part.cells[pick],
            part.t5_ids[pick],
            part.clip_ids[pick],
            image_ids(width, height),
        )
        return Batch(*(tensor.to(self.device) for tensor in tensors))


@fast_attention()
def train(work: Path, budget: loop.Budget, device: torch.device) -> None:
    path = work / "layout.pt"
    torch.manual_seed(loop.SEED + 5)
    model = build(single_blocks=0).to(device)
    head = LabelHead(model).to(device)
    steppers = optimizers(model, list(head.parameters()))
    checkpoint = loop.Checkpoint(path, budget, model=model, head=head, optimizers=steppers)
    checkpoint.resume(device)
    text = Text.load(work, device)
    count = CAPTIONS if budget.steps is None else 100
    sets = [
        examples(text, round(count * share), 13 + i, size)
        for i, (share, size) in enumerate(zip(SHARES, scenes.ASPECTS, strict=True))
    ]
    readers = [
        Captions(sets, torch.Generator().manual_seed(loop.SEED + 1000 * i + budget.step), device)
        for i in range(WORKERS)
    ]

    def gradients(reader: Captions) -> float:
        """A worker's share of a step: the label loss; its gradients are added to the parameters'."""
        batch = reader.draw()
        guidance = torch.empty(BATCH, device=device).uniform_(*GUIDANCE)
        with loop.autocast(device):
            with torch.no_grad():
                embeddings, pooled = text.embed(batch.t5_ids, batch.clip_ids)
            predict(model, batch, embeddings, pooled, guidance)
            named = head.loss(batch)
        (named / WORKERS).backward()
        return named.item()

    workers = Workers(device)
    running = 0.0
    parameters = [*model.parameters(), *head.parameters()]
    for step, bar in budget.run("layout", checkpoint.save):
        factor = min(1.0, (step + 1) / 50) * loop.flat_then_linear(budget.fraction, floor=0.2)
        named = sum(workers.map(gradients, readers)) / WORKERS
        update(workers, steppers, parameters, factor)
        running = named if not running else 0.98 * running + 0.02 * named
        if step % 20 == 0:
            bar.set_postfix(labels=f"{running:.4f}", step=step, refresh=False)
    print(f"layout: {budget.step} steps, label loss {running:.4f}")
