"""Calibrations that the service begins by itself, or goes on with; they run while no client's image is there."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from app.api.calibrations import FEWEST_STEPS, CalibrationRequest, resolve_calibration
from app.cluster.calibrator import Calibrator
from app.control.demand import CalibrationDemand, Measurable
from app.engine.families import Family
from app.errors import ServiceError
from app.messages.calibration import CalibrationJob
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
    """Go on with what was interrupted, and calibrate what ``demand`` names where the settings say so, for ever.

    One calibration follows another, and none begins but while it ``may_begin``.
    """
    while True:
        await asyncio.sleep(look_s)
        if not may_begin() or calibrator.busy:
            continue
        try:
            job = await asyncio.to_thread(calibrator.interrupted)
            kind = None
            if job is None and settings.magcache.calibrate == "idle":
                family = await family_of()
                profiles = await asyncio.to_thread(_profiles, settings)
                kind = demand.next(profiles, FEWEST_STEPS, family.true_cfg_scale)
                job = None if kind is None else _job_for(kind, settings, family)
        except ServiceError:  # no replica yet
            continue
        except OSError as error:
            logger.error("magcache.profile_dir cannot be read: %s", error)
            continue
        if job is None or calibrator.busy:
            continue
        status = calibrator.start(job)
        if kind is None:
            logger.info("calibration %s was interrupted and goes on", status.id)
        else:
            logger.info("calibration %s begins in idle time: no profile was measured for %s", status.id, kind)
        await calibrator.join()
        if kind is not None and calibrator.status(status.id).state != "done":
            demand.give_up(kind)


def _job_for(kind: Measurable, settings: Settings, family: Family) -> CalibrationJob:
    guided = kind.true_cfg_scale > 1
    asked = CalibrationRequest(
        size=f"{kind.width}x{kind.height}",
        num_inference_steps=kind.steps,
        guidance_scale=kind.guidance_scale,
        # What clients do not want differs from one to the next; the empty prompt stands for all of it.
        negative_prompt="" if guided else None,
        true_cfg_scale=kind.true_cfg_scale if guided else None,
    )
    return resolve_calibration(asked, settings, family)


def _profiles(settings: Settings) -> list[Profile]:
    """The service's own ones, and the one that it names or those that ship."""
    folder, named = settings.magcache.profile_folder, settings.magcache.profile
    own = [] if folder is None else stored_profiles(folder)
    return [*own, *map(load_profile, profile_names() if named is None else [named])]
