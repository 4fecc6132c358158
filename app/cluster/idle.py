"""Calibrations that the service begins by itself; they run while no client's image is there, as any do."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.api.calibrations import FEWEST_STEPS, CalibrationRequest, resolve_calibration
from app.cluster.calibrator import Calibrator
from app.control.demand import CalibrationDemand
from app.engine.families import Family
from app.errors import ServiceError
from app.settings import Settings
from magcache_core import Profile, load_profile, profile_names, stored_profiles

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""Time between two looks at whether there is something to calibrate."""


async def calibrate_when_idle(
    settings: Settings,
    calibrator: Calibrator,
    demand: CalibrationDemand,
    family_of: Callable[[], Awaitable[Family]],
    may_begin: Callable[[], bool] = lambda: True,
    look_s: float = LOOK_S,
) -> None:
    """Calibrate what ``demand`` names, one kind of image after another, for ever, while it ``may_begin``."""
    while True:
        await asyncio.sleep(look_s)
        if not may_begin():
            continue
        try:
            family = await family_of()
            kind = demand.next(await asyncio.to_thread(_profiles, settings), FEWEST_STEPS, family.true_cfg_scale)
        except ServiceError:  # no replica yet
            continue
        except OSError as error:
            logger.error("magcache.profile_dir cannot be read: %s", error)
            continue
        if kind is None or calibrator.busy:
            continue
        asked = CalibrationRequest(
            size=f"{kind.width}x{kind.height}",
            num_inference_steps=kind.steps,
            guidance_scale=kind.guidance_scale,
            # What clients do not want differs from one to the next; the empty prompt stands for all of it.
            negative_prompt="" if kind.true_cfg_scale > 1 else None,
            true_cfg_scale=kind.true_cfg_scale if kind.true_cfg_scale > 1 else None,
        )
        status = calibrator.start(resolve_calibration(asked, settings, family))
        logger.info("calibration %s begins in idle time: no profile was measured for %s", status.id, kind)
        await calibrator.join()
        if calibrator.status(status.id).state != "done":
            demand.give_up(kind)


def _profiles(settings: Settings) -> list[Profile]:
    """The service's own ones, and the one that it names or those that ship."""
    folder, named = settings.magcache.profile_folder, settings.magcache.profile
    own = [] if folder is None else stored_profiles(folder)
    return [*own, *map(load_profile, profile_names() if named is None else [named])]
