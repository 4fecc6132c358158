"""Stage text: a T5 encoder and a CLIP text model, taught on captions alone what the words mean on the canvas.

Both are trained with throwaway heads to draw the scene's labels (T5, token by token) or to list its attributes (CLIP's
pooled vector). Text is tiny, so they see millions of captions in minutes, and the transformer starts from embeddings
that already tell which colour belongs to which object.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from . import loop, scenes, tokens

WIDTH, LAYERS, HEADS, BATCH = 128, 2, 4, 64
CLIP_CUT = 24  # Captions are shorter.
GRID = 8  # Cells along each side of the 128x128 canvas.


@dataclass
class Text:
    """Both encoders and their tokenizers."""

    t5: T5EncoderModel
    clip: CLIPTextModel
    t5_tokenizer: T5Tokenizer
    clip_tokenizer: CLIPTokenizer

    @staticmethod
    def load(work: Path, device: torch.device) -> "Text":
        folder = work / "text"
        return Text(
            T5EncoderModel.from_pretrained(folder / "text_encoder_2").to(device).eval(),
            CLIPTextModel.from_pretrained(folder / "text_encoder").to(device).eval(),
            T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        )

    def save(self, folder: Path) -> None:
        self.t5.save_pretrained(folder / "text_encoder_2")
        self.clip.save_pretrained(folder / "text_encoder")
        self.t5_tokenizer.save_pretrained(folder / "tokenizer_2")
        self.clip_tokenizer.save_pretrained(folder / "tokenizer")

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(n, 32) and (n, 24) ids. CLIP is causal and pools at its first end token, so its padding may be cut."""
        t5, clip = (
            tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for tokenizer, length in ((self.t5_tokenizer, tokens.T5_LENGTH), (self.clip_tokenizer, CLIP_CUT))
        )
        return t5, clip

    def embed(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 32, WIDTH) token embeddings and (n, WIDTH) pooled embeddings, without masks, as the pipeline does."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output


def build(t5_tokenizer: T5Tokenizer, clip_tokenizer: CLIPTokenizer) -> Text:
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=WIDTH,
            d_kv=WIDTH // HEADS,
            d_ff=2 * WIDTH,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
            decoder_start_token_id=t5_tokenizer.pad_token_id,
        )
    )
    # Positions enter T5 through this table alone. Started near zero, as transformers does, it had not learned which
    # word stands next to which after 500 steps; started wide, every head looks at some neighbour from the first.
    torch.nn.init.normal_(t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=tokens.CLIP_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    return Text(t5, clip, t5_tokenizer, clip_tokenizer)


class Canvas(nn.Module):
    """Throwaway: position queries attend to the T5 tokens and name each cell's colour and shape."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(GRID * GRID, WIDTH) * 0.5)
        self.attention = nn.MultiheadAttention(WIDTH, 8, batch_first=True)
        self.out = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, scenes.LABELS)
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, 32, WIDTH) to (n, GRID * GRID, LABELS) logits."""
        queries = self.queries.expand(len(embeddings), -1, -1)
        return self.out(queries + self.attention(queries, embeddings, embeddings, need_weights=False)[0])


def soft_cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of the colour logits and of the shape logits against soft labels (..., LABELS), summed."""
    colours = len(scenes.COLOURS)
    parts = (
        -(shares[..., a:b] * logits[..., a:b].log_softmax(-1)).sum(-1).mean()
        for a, b in ((0, colours), (colours, scenes.LABELS))
    )
    return torch.stack(list(parts)).sum()


# Classes in the order of `attributes`: background, relation, then colour, shape and size of each thing.
ATTRIBUTES = (8, 5, 8, 6, 4, 9, 7, 4)


def attributes(scene: scenes.Scene) -> list[int]:
    """The scene as class numbers; a thing that isn't there has the last colour and shape class."""
    colours = list(scenes.COLOURS)
    first, second = scene.things[0], scene.things[1] if scene.relation else None
    relation = scenes.RELATIONS.index(scene.relation) if scene.relation else len(scenes.RELATIONS)
    row = [colours.index(scene.background), relation]
    sizes = (*scenes.SIZES, None)
    row += [colours.index(first.colour), scenes.SHAPES.index(first.shape), sizes.index(first.size)]
    if second is None:
        return [*row, len(colours), len(scenes.SHAPES), sizes.index(None)]
    return [*row, colours.index(second.colour), scenes.SHAPES.index(second.shape), sizes.index(second.size)]


@dataclass
class Examples:
    """Captions' tokens beside what they mean."""

    t5_ids: Tensor  # (n, 32)
    clip_ids: Tensor  # (n, 24)
    cells: Tensor  # (n, cells, LABELS)
    attributes: Tensor  # (n, len(ATTRIBUTES))


def examples(
    text: Text, count: int, seed: int, size: tuple[int, int] = (128, 128), *, held_out: bool = False
) -> Examples:
    width, height = size
    grid = (width // scenes.TOKEN) * (height // scenes.TOKEN)
    rng = np.random.default_rng([loop.SEED, seed])
    captions, cells, rows = [], np.empty((count, grid, scenes.LABELS), np.float32), []
    for index in range(count):
        scene = scenes.sample(rng, held_out=held_out)
        captions.append(scenes.caption(scene, rng))
        placed = scenes.place(scene, width, height, rng)
        cells[index] = scenes.labels(scene.background, placed, width, height).reshape(grid, -1)
        rows.append(attributes(scene))
    return Examples(*text.tokenize(captions), torch.from_numpy(cells), torch.tensor(rows))


def optimizers(modules: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, heads and biases."""
    named = list(modules.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and (".layer" in name or ".block." in name)]
    matrices = [p for p in matrices if min(p.shape) >= WIDTH]  # T5's table of relative positions is no matrix.
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def train(work: Path, budget: loop.Budget, device: torch.device) -> None:
    path = work / "text.pt"
    torch.manual_seed(loop.SEED + 1)
    quick = budget.steps is not None
    folder = work / "text"
    if not folder.exists():
        captions = tokens.corpus(1500 if quick else 8000)
        tokens.train_t5(captions).save_pretrained(folder / "tokenizer_2")
        tokens.train_clip(captions).save_pretrained(folder / "tokenizer")
    # From the files even at first: ids differ a little between trainings, and a resumed run must have the same.
    text = build(
        T5Tokenizer.from_pretrained(folder / "tokenizer_2"), CLIPTokenizer.from_pretrained(folder / "tokenizer")
    )
    canvas, listing = Canvas(), nn.Linear(WIDTH, sum(ATTRIBUTES))
    modules = nn.ModuleList([text.t5, text.clip, canvas, listing]).to(device)
    steppers = optimizers(modules)
    checkpoint = loop.Checkpoint(path, budget, modules=modules, optimizers=steppers)
    checkpoint.resume(device)
    data = examples(text, 256 if quick else 30000, seed=11)

    for step, bar in budget.run("text", checkpoint.save):
        factor = min(1.0, (step + 1) / 30) * loop.flat_then_linear(budget.fraction)
        pick = torch.randint(len(data.t5_ids), (BATCH,))
        with loop.autocast(device):
            embeddings, pooled = text.embed(data.t5_ids[pick].to(device), data.clip_ids[pick].to(device))
            cells = canvas(embeddings)
            listed = listing(pooled)
        drawn = soft_cross_entropy(cells.float(), data.cells[pick].to(device))
        named = attribute_loss(listed.float(), data.attributes[pick].to(device))
        loss = drawn + 0.2 * named
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        for stepper in steppers:
            loop.set_lr(stepper, factor)
            stepper.step()
            stepper.zero_grad()
        if step % 25 == 0:
            bar.set_postfix(cells=f"{drawn.item():.4f}", attributes=f"{named.item():.4f}", step=step, refresh=False)
    text.save(folder)
    report(text, canvas, listing, examples(text, 64 if quick else 1000, seed=12, held_out=True), budget.step, device)


def attribute_loss(logits: Tensor, classes: Tensor) -> Tensor:
    parts = [F.cross_entropy(part, classes[:, i]) for i, part in enumerate(logits.split(ATTRIBUTES, dim=-1))]
    return torch.stack(parts).sum()


@torch.inference_mode()
def report(text: Text, canvas: Canvas, listing: nn.Linear, unseen: Examples, steps: int, device: torch.device) -> None:
    """How well the throwaway heads read captions that were never trained on."""
    embeddings, pooled = text.embed(unseen.t5_ids.to(device), unseen.clip_ids.to(device))
    colours = len(scenes.COLOURS)
    cells, truth = canvas(embeddings).cpu(), unseen.cells
    right = (cells[..., :colours].argmax(-1) == truth[..., :colours].argmax(-1)).float().mean()
    shape = (cells[..., colours:].argmax(-1) == truth[..., colours:].argmax(-1)).float().mean()
    rows = listing(pooled).cpu().split(ATTRIBUTES, dim=-1)
    named = torch.stack([part.argmax(-1) == unseen.attributes[:, i] for i, part in enumerate(rows)])
    print(
        f"text: {steps} steps; on unseen captions the right colour in {right:.2%} and the right shape in {shape:.2%} of"
        f" the cells, all attributes right in {named.all(0).float().mean():.2%}"
    )
