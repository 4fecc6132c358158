"""Errors of other processes become errors that clients can read."""

from __future__ import annotations

import pytest
import ray
from ray import cloudpickle
from ray.serve.exceptions import DeploymentUnavailableError

from app.cluster.client_errors import to_service_error
from app.errors import BusyError, DeadlineImpossibleError, InvalidRequestError
from magcache_core import ConfigError


def wrapped(cause: Exception, times: int) -> Exception:
    """``cause`` as it comes out of so many calls, one on behalf of the other, between processes."""
    for _ in range(times):
        task_error = ray.exceptions.RayTaskError("call", "Traceback", cause, proctitle="p", pid=1, ip="127.0.0.1")
        cause = cloudpickle.loads(cloudpickle.dumps(task_error)).as_instanceof_cause()
    return cause


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_errors_come_out_of_rays_wrappers(times: int) -> None:
    busy = to_service_error(ExceptionGroup("", [wrapped(BusyError(7.5), times)]), 0.0)
    assert type(busy) is BusyError
    assert busy.headers["Retry-After"] == "8"
    wrong = to_service_error(wrapped(InvalidRequestError("no", param="n", status=413), times), 0.0)
    assert isinstance(wrong, InvalidRequestError)
    assert (wrong.status, wrong.param) == (413, "n")
    budget = to_service_error(wrapped(ConfigError("budget", 1, "an integer from 7 to 28"), times), 0.0)
    assert isinstance(budget, InvalidRequestError)
    assert budget.param == "magcache.computed_steps"
    assert "an integer from 7 to 28" in budget.message
    impossible = to_service_error(wrapped(DeadlineImpossibleError("too soon", soonest_s=1.5), times), 0.25)
    assert isinstance(impossible, DeadlineImpossibleError)
    assert impossible.soonest_s == 1.75
    assert "about 1.75 s" in impossible.message


def test_what_serve_and_ray_say_becomes_a_status() -> None:
    gone = to_service_error(DeploymentUnavailableError(None), 0.0)
    dead = to_service_error(ExceptionGroup("", [ray.exceptions.ActorDiedError()]), 0.0)
    assert [getattr(error, "status", None) for error in (gone, dead)] == [503, 503]
    # Addresses, pids and actors' names are for the log, not for clients.
    named = ray.exceptions.RayActorError(error_msg="pid=123, ip=10.0.0.7, actor flux-coordinator:abc")
    assert {str(to_service_error(error, 0.0)) for error in (named, dead, gone)} == {str(gone)}
    unforeseen = ExceptionGroup("", [KeyError("x")])
    assert to_service_error(unforeseen, 0.0) is unforeseen
