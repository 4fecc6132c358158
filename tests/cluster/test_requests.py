"""The ingress's parts that need no cluster: requests ended by id, errors told, and news that end with their image."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import ray
import torch
from ray import cloudpickle
from ray.serve.exceptions import DeploymentUnavailableError

from app.api.backend import GeneratedImage
from app.cluster.client_errors import to_service_error
from app.cluster.progress_stream import ProgressFilter, poll_progress, result_or_none
from app.cluster.request_tasks import RequestRegistry
from app.errors import BusyError, DeadlineImpossibleError, GroupFailedError, InvalidRequestError, RequestCancelledError
from app.messages import Progress
from magcache_core import ConfigError


async def forever() -> list[GeneratedImage]:
    await asyncio.Event().wait()
    return []


async def test_a_flight_is_ended_by_its_id() -> None:
    tasks = RequestRegistry()
    mine = [tasks.start("mine", images, forever()) for images in (2, 1)]
    others = tasks.start("others", 1, forever())
    assert tasks.cancel("nobody") == 0
    assert tasks.cancel("mine") == 3
    for task in mine:
        with pytest.raises(RequestCancelledError):
            await task.result()
    assert tasks.cancel("mine") == 0
    assert not others.task.done()
    await others.cancel_and_wait()
    assert tasks._by_id == {}


async def test_a_waiter_that_is_cancelled_itself_takes_the_flight_along() -> None:
    tasks = RequestRegistry()
    task = tasks.start("mine", 1, forever())
    waiter = asyncio.create_task(task.result())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert task.task.cancelled()


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
    unforeseen = ExceptionGroup("", [KeyError("x")])
    assert to_service_error(unforeseen, 0.0) is unforeseen


class Coordinator:
    """Stands for the handle of one: answers as told, then not any more."""

    def __init__(self, *answers: tuple[list[Progress], int] | Exception) -> None:
        self._answers = iter(answers)
        self.asked: list[int] = []
        self.events = self

    async def remote(self, row_id: str, seen: int) -> tuple[list[Progress], int]:
        self.asked.append(seen)
        answer = next(self._answers, None)
        if answer is None:
            await asyncio.Event().wait()
        elif isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, tuple)
        return answer


def event(step: int, preview: torch.Tensor | None = None) -> Progress:
    return Progress(0, step, 8, "C", 1.0, 0, preview)


@pytest.mark.parametrize("progress", [False, True])
def test_a_image_made_again_sends_no_preview_twice(progress: bool) -> None:
    first, second, third = (torch.full((1, 1), float(number)) for number in range(3))
    selection = ProgressFilter(progress)
    selection.begin()
    passed = [*selection.of([event(0)]), *selection.of([event(1, first), event(2)]), *selection.of([event(3, second)])]
    selection.begin()
    again = [*selection.of([event(0), event(1, first)]), *selection.of([event(3, second), event(5, third), event(8)])]
    shown = [int(one.preview) for one in (*passed, *again) if one.preview is not None]
    assert shown == [0, 1, 2]
    steps = [one.step for one in (*passed, *again)]
    assert steps == ([0, 1, 2, 3, 0, 1, 3, 5, 8] if progress else [0, 1, 3, 5])


async def collect(news: AsyncGenerator[list[Progress], None]) -> list[int]:
    return [event.step async for batch in news for event in batch]


async def test_news_are_asked_for_until_the_row_is_over() -> None:
    image: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    coordinator = Coordinator(([event(0)], 1), ([], 1), ([event(1), event(2)], 3), ([], -1))
    assert await collect(poll_progress(coordinator, "a/0", image)) == [0, 1, 2]
    assert coordinator.asked == [0, 1, 1, 3]


@pytest.mark.parametrize("error", [GroupFailedError("a rank died"), ray.exceptions.ActorDiedError()])
async def test_news_end_with_their_group(error: Exception) -> None:
    image: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    assert await collect(poll_progress(Coordinator(([event(0)], 1), error), "a/0", image)) == [0]


async def test_news_end_with_their_image() -> None:
    image: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    steps = asyncio.create_task(collect(poll_progress(Coordinator(([event(0)], 1)), "a/0", image)))
    await asyncio.sleep(0.01)
    assert not steps.done()
    image.set_result(None)
    assert await asyncio.wait_for(steps, 10) == [0]


async def test_what_came_is_taken_even_when_the_end_came_too() -> None:
    loop = asyncio.get_running_loop()
    end, result = loop.create_future(), loop.create_future()
    end.set_result(None)
    result.set_result(7)
    assert await result_or_none(end, result) in (7, None)  # both are there: either is right, and neither waits
    assert await result_or_none(end, loop.create_future()) is None
