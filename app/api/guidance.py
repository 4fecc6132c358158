"""How strongly a request is held to its prompt: distilled guidance, and true CFG where the model has it."""

from __future__ import annotations

from typing import Protocol

from app.api.schemas import ImagesRequest
from app.engine.families import Family
from app.errors import InvalidRequestError
from app.settings import SamplingSettings

# FLUX is distilled with guidance already inside; a mild scale on top steers away from the negative prompt and leaves
# the colours alone.
DEFAULT_TRUE_CFG_SCALE = 2.0


def guidance_scale(request: ImagesRequest, family: Family, sampling: SamplingSettings, warnings: list[str]) -> float:
    """The distilled guidance; a model without an embedding for it gets the server's value and does not look at it."""
    if request.guidance_scale is None:
        return sampling.guidance_scale
    if family.guidance_scale is None:
        warnings.append(f"guidance_scale is ignored: {family.name} has no guidance embedding")
    return request.guidance_scale


class AsksForCfg(Protocol):
    """A request's own fields of true CFG; null where it leaves them out."""

    negative_prompt: str | None
    true_cfg_scale: float | None


def true_cfg(request: AsksForCfg, family: Family, warnings: list[str]) -> tuple[str | None, float]:
    """The negative prompt and its scale; (None, 1) when true CFG does not run.

    It runs when a negative prompt is given and the scale is above 1, as in diffusers. A model that was not distilled
    with guidance always needs it, against the empty prompt when there is no other.

    Raises:
        InvalidRequestError: the model has no true CFG, and a negative prompt is given.
    """
    negative, scale = request.negative_prompt, request.true_cfg_scale
    if not family.true_cfg:
        return _without_cfg(negative, scale, family, warnings)
    if negative is None and family.true_cfg_scale > 1:
        scale = family.true_cfg_scale if scale is None else scale
        return ("", scale) if scale > 1 else (None, 1.0)
    if negative is None:
        if scale is not None and scale != 1:
            warnings.append("true_cfg_scale is ignored without a negative_prompt")
        return None, 1.0
    if scale is None:
        # An empty field of a form is no wish; with an explicit scale it is one: CFG against the empty prompt.
        default = max(family.true_cfg_scale, DEFAULT_TRUE_CFG_SCALE)
        return (negative, default) if negative.strip() or family.true_cfg_scale > 1 else (None, 1.0)
    if scale <= 1:
        warnings.append("negative_prompt is ignored: it takes effect with a true_cfg_scale above 1")
        return None, 1.0
    return negative, scale


def _without_cfg(
    negative: str | None, scale: float | None, family: Family, warnings: list[str]
) -> tuple[str | None, float]:
    if negative is not None and negative.strip():
        raise InvalidRequestError(
            f"negative_prompt: {family.name} is distilled to run without one; say in the prompt what you want to see",
            param="negative_prompt",
        )
    if scale is not None and scale != 1:
        warnings.append(f"true_cfg_scale is ignored: {family.name} is distilled to run without it")
    return None, 1.0
