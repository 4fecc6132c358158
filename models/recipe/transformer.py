"""Stage transformer: rectified flow on the cached latents, with the conventions of diffusers' FluxPipeline."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from . import loop, scenes
from .attention import fast_attention
from .latents import Latents
from .latents import load as load_latents
from .text import WIDTH, Text, soft_cross_entropy

BATCH = 32  # For each worker.
WORKERS = 2
DROP_CAPTION = 0.1
# Predicting each token's colour and shape from inside the network teaches the layout early: the alignment of REPA
# (arXiv 2410.06940), with exact labels in the place of another network's features.
LABEL_WEIGHT = 0.4
GUIDANCE = (1.0, 5.0)
MAX_ROWS = 10  # Of tokens, in any of the aspect ratios.


def build(single_blocks: int = 4) -> FluxTransformer2DModel:
    """6 heads, so that 2 and 3 tensor-parallel ranks both divide them."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=single_blocks,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


A = TypeVar("A")
R = TypeVar("R")


@dataclass
class Batch:
    """Scenes of one aspect ratio on the way from data (sigma 0) to noise (sigma 1)."""

    noisy: Tensor  # (n, tokens, 64)
    velocity: Tensor  # (n, tokens, 64): noise - data
    sigma: Tensor  # (n,)
    labels: Tensor  # (n, tokens, LABELS)
    t5_ids: Tensor  # (n, 32)
    clip_ids: Tensor  # (n, 24)
    image_ids: Tensor  # (tokens, 3)


class Sampler:
    """Random batches, each of one aspect ratio, in proportion to the scenes there are."""

    def __init__(self, sets: list[Latents], text: Text, device: torch.device, seed: int) -> None:
        self.sets, self.device = sets, device
        self.generator = torch.Generator().manual_seed(seed)
        self.shares = torch.tensor([float(len(part.tokens)) for part in sets])
        self.empty = text.tokenize([""])

    def sigmas(self, n: int) -> Tensor:
        """Half logit-normal; half near pure noise, where what goes where must be read from the caption alone."""
        normal = torch.sigmoid(torch.randn(n, generator=self.generator))
        noisy = 0.7 + 0.3 * torch.rand(n, generator=self.generator)
        return torch.where(torch.rand(n, generator=self.generator) < 0.5, noisy, normal)

    def draw(self, drop: float = DROP_CAPTION) -> Batch:
        part = self.sets[int(torch.multinomial(self.shares, 1, generator=self.generator))]
        pick = torch.randint(len(part.tokens), (BATCH,), generator=self.generator)
        dropped = torch.rand(BATCH, 1, generator=self.generator) < drop
        data = part.tokens[pick].float()
        noise = torch.randn(data.shape, generator=self.generator)
        sigma = self.sigmas(BATCH)
        tensors = (
            torch.lerp(data, noise, sigma[:, None, None]),
            noise - data,
            sigma,
            part.labels[pick].float() / 255,
            torch.where(dropped, self.empty[0], part.t5_ids[pick]),
            torch.where(dropped, self.empty[1], part.clip_ids[pick]),
            image_ids(part.width, part.height),
        )
        return Batch(*(tensor.to(self.device) for tensor in tensors))


def image_ids(width: int, height: int) -> Tensor:
    cpu = torch.device("cpu")
    return FluxPipeline._prepare_latent_image_ids(1, height // scenes.TOKEN, width // scenes.TOKEN, cpu, torch.float32)


def predict(model: nn.Module, batch: Batch, embeddings: Tensor, pooled: Tensor, guidance: Tensor) -> Tensor:
    """The velocity (n, tokens, 64), called as the pipeline calls it."""
    return model(
        hidden_states=batch.noisy,
        timestep=batch.sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=embeddings,
        txt_ids=torch.zeros(embeddings.shape[1], 3, device=embeddings.device),
        img_ids=batch.image_ids,
        return_dict=False,
    )[0]


def optimizers(
    model: FluxTransformer2DModel, others: list[nn.Parameter], scale: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for modulations, embeddings, biases and `others`."""
    blocks = [*model.transformer_blocks.named_parameters(), *model.single_transformer_blocks.named_parameters()]
    matrices = [p for name, p in blocks if p.ndim == 2 and "norm" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen] + others
    return [
        *(torch.optim.Muon(matrices[i::WORKERS], lr=0.02 * scale, weight_decay=0.01) for i in range(WORKERS)),
        torch.optim.AdamW(rest, lr=2e-3 * scale, weight_decay=0.01, betas=(0.9, 0.98), fused=True),
    ]


class LabelHead(nn.Module):
    """Throwaway: each image token names its row and column after the first block, its colour and shape after the last
    double-stream block.

    FLUX knows positions only as rotations between queries and keys. Two things' colours swap until every token has
    learned where it stands, which the flow loss alone teaches very slowly.
    """

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__()
        self.out = nn.Linear(model.inner_dim, scenes.LABELS)
        self.place = nn.Linear(model.inner_dim, 2 * MAX_ROWS)
        self.seen = threading.local()
        model.transformer_blocks[0].register_forward_hook(self._keep_first)
        model.transformer_blocks[-1].register_forward_hook(self._keep_last)

    def _keep_first(self, _block: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        self.seen.first = output[1]

    def _keep_last(self, _block: nn.Module, _args: Any, output: tuple[Tensor, Tensor]) -> None:
        self.seen.tokens = output[1]

    def loss(self, batch: Batch) -> Tensor:
        named = soft_cross_entropy(self.out(self.seen.tokens).float(), batch.labels)
        rows, columns = self.place(self.seen.first).float().transpose(1, 2).split(MAX_ROWS, dim=1)
        where = batch.image_ids.long().expand(len(batch.noisy), -1, -1)
        return named + 0.5 * (F.cross_entropy(rows, where[..., 1]) + F.cross_entropy(columns, where[..., 2]))


class Workers:
    """Threads that each work on a part of the batch on a core of their own.

    Where other programs take part of the machine, two threads that meet once a step lose less than two that meet in
    every operation. On an accelerator the parts follow one another.
    """

    def __init__(self, device: torch.device) -> None:
        threads = WORKERS if device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[A], R], parts: Iterable[A]) -> list[R]:
        return list(self.pool.map(function, parts))


def update(
    workers: Workers, steppers: list[torch.optim.Optimizer], parameters: list[nn.Parameter], factor: float
) -> None:
    """One step of all optimisers on the clipped gradients, side by side."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)

    def step(stepper: torch.optim.Optimizer) -> None:
        loop.set_lr(stepper, factor)
        stepper.step()
        stepper.zero_grad()

    workers.map(step, steppers)


@fast_attention()
def train(work: Path, budget: loop.Budget, device: torch.device) -> None:
    path = work / "transformer.pt"
    torch.manual_seed(loop.SEED + 2)
    model = build().to(device)
    head = LabelHead(model).to(device)
    if not path.exists():
        start = loop.load(work / "layout.pt", device)
        model.load_state_dict(start["model"], strict=False)  # The single-stream blocks begin here.
        head.load_state_dict(start["head"])
    steppers = optimizers(model, list(head.parameters()))
    average = loop.Average(model, 0.998)
    checkpoint = loop.Checkpoint(path, budget, model=model, head=head, optimizers=steppers, average=average)
    checkpoint.resume(device)
    text = Text.load(work, device)
    sets = load_latents(work)
    samplers = [Sampler(sets, text, device, seed=loop.SEED + 1000 * i + budget.step) for i in range(WORKERS)]
    parameters = [*model.parameters(), *head.parameters()]
    running = 0.0

    def gradients(sampler: Sampler) -> tuple[float, float]:
        """A worker's share of a step: the flow and label losses; their gradients are added to the parameters'."""
        batch = sampler.draw()
        guidance = torch.empty(BATCH, device=device).uniform_(*GUIDANCE)  # Meaningless until it is distilled.
        with loop.autocast(device):
            with torch.no_grad():
                embeddings, pooled = text.embed(batch.t5_ids, batch.clip_ids)
            velocity = predict(model, batch, embeddings, pooled, guidance)
            named = head.loss(batch)
        flow = F.mse_loss(velocity.float(), batch.velocity)
        ((flow + LABEL_WEIGHT * named) / WORKERS).backward()
        return flow.item(), named.item()

    workers = Workers(device)
    for step, bar in budget.run("transformer", checkpoint.save):
        factor = min(1.0, (step + 1) / 50) * loop.flat_then_linear(budget.fraction)
        losses = workers.map(gradients, samplers)
        update(workers, steppers, parameters, factor)
        flow, named = (sum(parts) / WORKERS for parts in zip(*losses, strict=True))
        average.update(step)
        running = flow if not running else 0.98 * running + 0.02 * flow
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}", labels=f"{named:.3f}", step=step, refresh=False)
    print(f"transformer: {budget.step} steps, flow loss {running:.4f}")


def averaged(work: Path, device: torch.device, stage: str = "transformer") -> FluxTransformer2DModel:
    """The averaged weights of a stage's latest checkpoint."""
    model = build().to(device)
    average = loop.Average(model, 0.0)
    average.load_state_dict(loop.load(work / f"{stage}.pt", device)["average"])
    average.copy_to(model)
    return model.eval()
