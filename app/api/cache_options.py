"""How many steps compute: from a request's `quality` and `magcache` and the server's settings to the job's options."""

from __future__ import annotations

from app.api.schemas import MagCacheBody, Quality
from app.errors import InvalidRequestError
from app.messages.jobs import MagCacheOptions
from app.settings import Settings

_FIELDS = ("mag_threshold", "mag_max_skip_steps", "mag_retention_ratio", "computed_steps", "min_computed_steps")


def cache_options(
    asked: MagCacheBody, quality: Quality, settings: Settings, steps: int, warnings: list[str]
) -> MagCacheOptions:
    """The options of a job; what has no effect is added to ``warnings``.

    Args:
        steps: those that run; with ``strength`` fewer than the request names.

    Raises:
        InvalidRequestError: two fields contradict each other; ``param`` names one, the message both.
    """
    server = settings.magcache
    preset = quality != "auto"
    _check(asked, quality, steps)
    # A preset is a wish for reuse, also where the server computes every step unless asked.
    enabled = preset or (server.enabled if asked.enabled is None else asked.enabled)
    idle = [name for name in _FIELDS if getattr(asked, name) is not None]
    if idle and not enabled:
        warnings.append(f"magcache.{', magcache.'.join(idle)} without effect: magcache.enabled is false")
    skips = server.mag_max_skip_steps if asked.mag_max_skip_steps is None else asked.mag_max_skip_steps
    retention = server.mag_retention_ratio if asked.mag_retention_ratio is None else asked.mag_retention_ratio
    threshold = server.mag_threshold if asked.mag_threshold is None else asked.mag_threshold
    budget, floor = asked.computed_steps, asked.min_computed_steps
    if budget is not None and floor is not None and floor > budget:
        raise InvalidRequestError(
            f"magcache.min_computed_steps is {floor}, above the {budget} steps that magcache.computed_steps computes",
            param="magcache.min_computed_steps",
        )
    chosen = preset or budget is not None
    return MagCacheOptions(
        enabled=enabled,
        mag_threshold=None if chosen else threshold,
        mag_max_skip_steps=skips,
        mag_retention_ratio=retention,
        computed_steps=budget,
        # Which profile and how many steps that is are the coordinator's to say: it knows what it plans with.
        computed_share=getattr(settings.quality, quality) if preset else None,
        floor_db=getattr(settings.quality, f"{quality}_floor_db") if preset else None,
        client_chose=chosen or asked.mag_threshold is not None,
        min_computed_steps=floor,
    )


def _check(asked: MagCacheBody, quality: Quality, steps: int) -> None:
    for name in ("computed_steps", "min_computed_steps"):
        value = getattr(asked, name)
        if value is not None and value > steps:
            raise InvalidRequestError(
                f"magcache.{name} is {value}; of {steps} steps at most {steps} can be computed",
                param=f"magcache.{name}",
            )
    if asked.computed_steps is not None and asked.mag_threshold is not None:
        raise InvalidRequestError(
            "magcache.mag_threshold and magcache.computed_steps exclude each other: a threshold and a number of "
            "computed steps both decide the schedule",
            param="magcache.mag_threshold",
        )
    if quality == "auto":
        return
    if asked.enabled is False:
        raise InvalidRequestError(
            f"quality {quality!r} computes a share of the steps, and magcache.enabled false computes all; give one",
            param="quality",
        )
    for name in ("computed_steps", "mag_threshold"):
        if getattr(asked, name) is not None:
            raise InvalidRequestError(
                f"quality {quality!r} and magcache.{name} both decide the schedule; give one", param="quality"
            )
