"""Maps errors of Ray and of the deployments to errors of the API."""

import logging

import ray
from ray.serve.exceptions import RayServeException

from app.errors import DeadlineImpossibleError, GroupFailedError, InvalidRequestError, ServiceError, UnavailableError
from magcache_core import ConfigError

logger = logging.getLogger(__name__)


def to_service_error(error: BaseException, other_phases_s: float) -> BaseException:
    """The error to raise in the ingress for one that a call to another part raised; ``error`` itself if unforeseen.

    Args:
        other_phases_s: what the request took before it was denoised, and will take afterwards.
    """
    cause = unwrap_ray_error(error)
    if isinstance(cause, DeadlineImpossibleError):
        # The coordinator was asked for its part only; the client asked for the whole.
        soonest_s = cause.soonest_s + other_phases_s
        return DeadlineImpossibleError(
            f"deadline_s is too short: with the fewest computed steps that client and server allow, the request needs "
            f"about {soonest_s:.3g} s. Give it more time, a smaller size, fewer steps or a lower "
            "magcache.min_computed_steps",
            soonest_s,
        )
    if isinstance(cause, ServiceError):
        return cause
    if isinstance(cause, ConfigError):
        return InvalidRequestError(
            f"magcache.computed_steps={cause.value!r} is not allowed here: it must be {cause.allowed}",
            param="magcache.computed_steps",
        )
    if isinstance(cause, (ray.exceptions.RayError, RayServeException)):
        logger.warning("a part of the service is restarting: %s", cause)
        return UnavailableError("a part of the service is restarting; ask again")
    return error


def public_reason(error: BaseException) -> str:
    """What went wrong, without what Ray's errors have of pids, addresses and stacks; the log has those."""
    cause = unwrap_ray_error(error)
    if isinstance(cause, ray.exceptions.RayActorError):
        return "one of its processes died"
    if isinstance(cause, (ray.exceptions.RayError, RayServeException)):
        return type(cause).__name__
    text = str(cause).strip().partition("\n")[0]
    return text if isinstance(cause, GroupFailedError) else f"{type(cause).__name__}: {text}"


def unwrap_ray_error(error: BaseException) -> BaseException:
    """The first error of a group, out of the wrappers with their stacks that Ray puts around it at each call."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, ray.exceptions.RayTaskError):
            error = error.cause
        else:
            return error
