"""Images that several calls wait for, without a cluster: who gets what, and when the work ends."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch

from app.cluster import shared_images as module
from app.cluster.shared_images import Emit, SharedImages
from app.messages.jobs import DenoiseJob
from app.messages.repetitions import Reservation, Sharing
from app.messages.results import DenoiseReport, DenoiseResult, Progress
from tests.local_group import job

SHARING = Sharing("token", "body", 7, 1.0, "api-1", keyed=False)
REPORT = DenoiseReport("C", 1, 0, 0.0, None, 0.0, 0.1)


class Maker:
    """Work that ends when it is told to."""

    def __init__(self) -> None:
        self.begun = 0
        self.cancelled = 0
        self.emit: Emit = lambda events: None
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, emit: Emit) -> DenoiseResult:
        self.begun += 1
        self.emit = emit
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return DenoiseResult(torch.zeros(1), REPORT)


def shared(index: int = 0, **changes: Any) -> DenoiseJob:
    return replace(job(f"row-{index}"), index=index, sharing=replace(SHARING, **changes))


async def all_of(images: SharedImages, one: DenoiseJob, work: Maker, follower: str) -> list[Any]:
    return [item async for item in images.join_or_start(one, work).items(follower)]


async def begun(*tasks: asyncio.Task[Any]) -> None:
    for _ in range(5 + len(tasks)):
        await asyncio.sleep(0)


async def test_two_calls_share_one_image_and_its_progress_from_then_on() -> None:
    images, work = SharedImages(10), Maker()
    first = asyncio.create_task(all_of(images, shared(), work, "a"))
    await begun(first)
    step = Progress(0, 1, 2, "C", 0.5, 0)
    work.emit([step])
    second = asyncio.create_task(all_of(images, shared(), work, "b"))
    await begun(second)
    work.emit([replace(step, step=2)])
    work.may_end.set()
    *events, result = await first
    assert (work.begun, await second) == (1, [[replace(step, step=2)], result])
    assert [event.step for each in events for event in each] == [1, 2]
    assert await all_of(images, shared(), work, "c") == [result], "a finished one is there at once"
    assert work.begun == 1


async def test_the_work_ends_with_the_last_who_waits() -> None:
    images, work = SharedImages(10), Maker()
    first, second = (asyncio.create_task(all_of(images, shared(), work, name)) for name in "ab")
    await begun(first, second)
    first.cancel()
    await asyncio.wait({first})
    await begun()
    assert work.cancelled == 0
    second.cancel()
    await asyncio.wait({second})
    await begun()
    assert work.cancelled == 1
    assert images.get(SHARING.image(0)) is None


async def test_a_client_with_a_key_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETURN_S", 0.05)
    images, work = SharedImages(10), Maker()
    for name in "ab":
        call = asyncio.create_task(all_of(images, shared(keyed=True), work, name))
        await begun(call)
        call.cancel()
        await asyncio.wait({call})
        assert (work.begun, work.cancelled) == (1, 0)
    async with asyncio.timeout(60):
        while not work.cancelled:  # noqa: ASYNC110  it has no event for tests
            await asyncio.sleep(0.01)


async def test_what_failed_is_made_again() -> None:
    images, work = SharedImages(10), Maker()
    work.error = RuntimeError("no")
    work.may_end.set()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await all_of(images, shared(), work, "a")
    assert work.begun == 2


async def test_an_image_that_none_may_share_is_not_kept() -> None:
    images, work = SharedImages(10), Maker()
    work.may_end.set()
    for _ in range(2):
        await all_of(images, job("row"), work, "a")
    assert work.begun == 2


async def test_one_retry_takes_over_what_a_dead_process_left() -> None:
    images, work = SharedImages(10), Maker()
    for index in range(2):
        images.join_or_start(shared(index), work)
    images.join_or_start(shared(token="other", body="another"), work)
    assert images.orphans("body", {"api-1", "api-2"}) == [], "it is served"
    assert images.orphans("body", {"api-2"}) == [Reservation("token", "body", 7, 1.0)]
    assert images.claim("token", {"api-2"}, "api-2")
    assert not images.claim("token", {"api-2"}, "api-2"), "another retry, which has the same body"
    assert images.orphans("body", {"api-2"}) == []
    assert images.claim("token", {"api-3"}, "api-3"), "that one's process died as well"
    work.may_end.set()


@pytest.mark.parametrize(("bound", "value"), [("KEPT_IMAGES", 2), ("KEPT_BYTES", 2 * 128 * 128)])
async def test_finished_images_are_bounded(monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    monkeypatch.setattr(module, bound, value)
    images, work = SharedImages(10), Maker()
    work.may_end.set()
    for index in range(3):
        await all_of(images, shared(index), work, "a")
    assert [images.get(SHARING.image(index)) is not None for index in range(3)] == [False, True, True]


async def test_they_are_forgotten_after_a_time() -> None:
    images, work = SharedImages(0.0), Maker()
    work.may_end.set()
    await all_of(images, shared(), work, "a")
    assert images.get(SHARING.image(0)) is None
