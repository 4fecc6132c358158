"""Every error that a client may get: the envelope, Retry-After where asking again may help, nothing of Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
import ray
from ray import cloudpickle
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

import app.errors
from app.api.app import create_app
from app.cluster.client_errors import public_reason, to_service_error
from app.errors import BusyError, DeadlineImpossibleError, GroupFailedError, InvalidRequestError, ServiceError
from app.settings import Settings
from magcache_core import ConfigError
from tests.api.fake_backend import FakeBackend

RAYS = "ray::FluxReplica.denoise() (pid=4242, ip=10.9.8.7, actor_id=0a1b2c3d, repr=<FluxReplica object at 0x7f>)"
TRACES = re.compile(r"4242|10\.9\.8\.7|0a1b2c3d|0x7f|ray::|FluxReplica|Traceback|[Aa]ctor")
FAILURES: list[Exception] = [
    ray.exceptions.ActorDiedError(),
    ray.exceptions.ActorUnavailableError(RAYS, b"0" * 16),
    ray.exceptions.RayActorError(None, RAYS),
    ray.exceptions.NodeDiedError(RAYS),
    ray.exceptions.WorkerCrashedError(),
    ray.exceptions.OutOfMemoryError(RAYS),
    ray.exceptions.ObjectLostError("0a1b2c3d", None, RAYS),
    ray.exceptions.RaySystemError(RAYS),
    ray.exceptions.GetTimeoutError(RAYS),
    ray.exceptions.TaskCancelledError(),
    RayServeException(RAYS),
    BackPressureError(num_queued_requests=1, max_queued_requests=1),
]


def _task_error(cause: Exception) -> Exception:
    error = ray.exceptions.RayTaskError("denoise", f"Traceback: {RAYS}", cause, pid=4242, ip="10.9.8.7")
    made: Exception = error.as_instanceof_cause()
    return made


def _service_errors() -> Iterator[ServiceError]:
    """One of each class of `app.errors`."""
    values = {"message": "text", "retry_after_s": 2.0, "soonest_s": 3.0}
    for kind in vars(app.errors).values():
        if isinstance(kind, type) and issubclass(kind, ServiceError):
            code = kind.__init__.__code__
            named = code.co_varnames[1 : code.co_argcount]
            yield kind(**{name: values[name] for name in named})


async def _reply(error: BaseException, stream: bool) -> httpx.Response:
    """What the API answers when its backend fails like that."""
    backend = FakeBackend()
    backend.error = error  # type: ignore[assignment]
    transport = httpx.ASGITransport(create_app(Settings(), lambda: backend))
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        return await client.post("/v1/images/generations", json={"prompt": "a red circle", "stream": stream})


def _check(reply: httpx.Response) -> None:
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert not TRACES.search(reply.text), reply.text
    if reply.status_code == 429 or reply.status_code >= 500:
        assert int(reply.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", list(_service_errors()), ids=lambda error: type(error).__name__)
async def test_each_of_our_errors(error: ServiceError, stream: bool) -> None:
    reply = await _reply(error, stream)
    assert reply.status_code == error.status
    _check(reply)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_each_of_rays_errors_is_a_503(error: Exception, wrapped: bool) -> None:
    reply = await _reply(to_service_error(ExceptionGroup("", [error]) if wrapped else error, 0.0), stream=False)
    assert reply.status_code == 503
    _check(reply)


async def test_what_a_part_raised_unforeseen_is_a_500() -> None:
    reply = await _reply(to_service_error(_task_error(KeyError(RAYS)), 0.0), stream=False)
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    _check(reply)


async def test_a_setting_of_the_request_that_a_part_refuses_is_its_own_fault() -> None:
    refused = _task_error(ConfigError("computed_steps", 1, "an integer from 7 to 28"))
    reply = await _reply(to_service_error(refused, 0.0), stream=False)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "magcache.computed_steps")
    _check(reply)


@pytest.mark.parametrize("error", [*FAILURES, GroupFailedError("a rank hangs"), _task_error(ValueError("is bad"))])
def test_a_groups_trouble_has_nothing_of_rays(error: Exception) -> None:
    assert not re.search(TRACES.pattern.replace("|[Aa]ctor", ""), public_reason(error))


def test_a_groups_trouble_is_what_the_part_said() -> None:
    assert public_reason(GroupFailedError("a rank hangs\nhere")) == "a rank hangs"
    assert public_reason(_task_error(ValueError("file x is bad"))) == "ValueError: file x is bad"
    assert public_reason(ray.exceptions.RayActorError(None, RAYS)) == "one of its processes died"
    assert public_reason(DeploymentUnavailableError("x")) == "DeploymentUnavailableError"


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
