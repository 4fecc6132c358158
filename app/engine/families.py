"""One table of the served model families: their inputs, sampling defaults, and use of source images.

Whatever a checkpoint says about itself (head counts, guidance embedding, the scheduler's settings) is read from the
checkpoint; this table has what only the model's pipeline class in diffusers knows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from app.engine.checkpoint_files import CheckpointError, read_json
from app.engine.layouts import Flux1Layout, Flux2Layout, Layout

FEW_STEPS = 8
"""Models distilled to this many steps or fewer have no steps similar enough to reuse."""


class Edits(Enum):
    """What a model does with a source image."""

    NONE = "none"
    STRENGTH = "strength"
    """Sampling starts from the image with noise on top (image-to-image)."""
    REFERENCES = "references"
    """The image is further tokens beside those of the new image."""


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: for messages.
        layout: tokens, noise, position ids and the way to and from the VAE.
        steps, guidance_scale, text_tokens: defaults; ``guidance_scale`` is None where the model has no guidance
            embedding.
        true_cfg: whether a negative prompt has an effect.
        true_cfg_scale: default strength of true CFG; 1 (none) for guidance-distilled models.
        edits: what the model does with source images.
        max_sources: how many of them it takes at once.
        trained_sizes: (width, height) of reference images in training; a reference is resized to the one nearest in
            shape. Empty when any size will do.
    """

    name: str
    layout: Layout
    steps: int
    guidance_scale: float | None
    text_tokens: int
    true_cfg: bool
    edits: Edits
    max_sources: int
    trained_sizes: tuple[tuple[int, int], ...] = ()
    true_cfg_scale: float = 1.0

    @property
    def inpaints(self) -> bool:
        """Whether a mask may say which parts of the source are painted, and which stay."""
        return self.edits is Edits.STRENGTH

    @property
    def uncached_reason(self) -> str:
        """Why a request for reuse computes every step when there is no MagCache profile for the model."""
        if self.steps <= FEW_STEPS:
            return (
                f"{self.name} is made for {self.steps} steps: at {FEW_STEPS} or fewer every step is computed, "
                "unless magcache.profile names a profile that was calibrated for the model"
            )
        return "there is no MagCache profile for this model: calibrate one and name it in magcache.profile"


FLUX_DEV = Family(
    name="FLUX.1-dev",
    layout=Flux1Layout(),
    steps=28,
    guidance_scale=3.5,
    text_tokens=512,
    true_cfg=True,
    edits=Edits.STRENGTH,
    max_sources=1,
)
FLUX_SCHNELL = replace(
    FLUX_DEV, name="FLUX.1-schnell", steps=4, guidance_scale=None, text_tokens=256, edits=Edits.NONE, max_sources=0
)
_UPRIGHT = ((672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104))
FLUX_KONTEXT = replace(
    FLUX_DEV,
    name="FLUX.1-Kontext",
    guidance_scale=2.5,  # the authors' setting; the pipeline keeps 3.5, dev's
    edits=Edits.REFERENCES,
    trained_sizes=(*_UPRIGHT, (1024, 1024), *((height, width) for width, height in reversed(_UPRIGHT))),
)
FLUX2_KLEIN = Family(
    name="FLUX.2-klein",
    layout=Flux2Layout(),
    steps=4,
    guidance_scale=None,
    text_tokens=512,
    true_cfg=False,
    edits=Edits.REFERENCES,
    # The pipeline has no limit of its own; four images of a megapixel are 16384 tokens beside the image's 4096.
    max_sources=4,
)
FLUX2_KLEIN_BASE = replace(FLUX2_KLEIN, name="FLUX.2-klein-base", steps=50, true_cfg=True, true_cfg_scale=4.0)
FAMILIES = (FLUX_DEV, FLUX_SCHNELL, FLUX_KONTEXT, FLUX2_KLEIN, FLUX2_KLEIN_BASE)


def family_of(model: Path) -> Family:
    """The family of a checkpoint, by its pipeline class and what its configuration says about distillation.

    Args:
        model: a folder in diffusers layout.

    Raises:
        CheckpointError: a configuration file is missing or damaged, or the pipeline is none that is served.
    """
    index = read_json(model / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline == "FluxPipeline":
        guided = read_json(model / "transformer" / "config.json").get("guidance_embeds", False)
        return FLUX_DEV if guided else FLUX_SCHNELL
    if pipeline == "FluxKontextPipeline":
        return FLUX_KONTEXT
    if pipeline == "Flux2KleinPipeline":
        return FLUX2_KLEIN if index.get("is_distilled", False) else FLUX2_KLEIN_BASE
    raise CheckpointError(
        f"{model / 'model_index.json'} names the pipeline {pipeline!r}; served are FluxPipeline, FluxKontextPipeline "
        "and Flux2KleinPipeline"
    )
