"""The coordinator with a real rank in this process, in place of actors: what it tells of images and how it ends them.

tests/cluster/test_group.py and test_service.py have the same parts on Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
import torch

from app.cluster.coordinator import Coordinator
from app.cluster.rank import Rank
from app.control.admission import default_job
from app.errors import BusyError, DeadlineImpossibleError, DeadlinePassedError, GroupFailedError, RequestCancelledError
from app.messages.conditioning import Conditioning
from app.messages.jobs import MagCacheOptions
from app.messages.results import DenoiseResult
from app.settings import MagCacheSettings, Settings
from magcache_core import ConfigError
from tests.local_group import job, random_conditioning

SETTINGS = Settings(
    threads_per_rank=1, magcache=MagCacheSettings(profile="flux-tiny"), max_batch_rows=2, max_waiting_pictures=3
)
LONG = 400
"""Steps of an image that is still under way when it is ended."""


class Remote:
    """A method that is called as an actor's is: calls run one after another, off the event loop."""

    def __init__(self, method: Callable[..., Any], thread: ThreadPoolExecutor) -> None:
        self._method, self._thread = method, thread

    def remote(self, *arguments: Any) -> asyncio.Future[Any]:
        result = asyncio.get_running_loop().run_in_executor(self._thread, self._method, *arguments)
        # Unlike a reference of Ray's, a future complains when it is dropped with its error.
        result.add_done_callback(lambda done: done.cancelled() or done.exception())
        return result


class Handle:
    """Stands for a rank's actor handle."""

    def __init__(self, rank: Rank, thread: ThreadPoolExecutor) -> None:
        self.execute = Remote(rank.execute, thread)
        self.ping = Remote(rank.ping, thread)


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    return random_conditioning()


class Group:
    """A running coordinator, its rank, and images for it."""

    def __init__(
        self, rank: Rank, thread: ThreadPoolExecutor, coordinator: Coordinator, conditioning: Conditioning
    ) -> None:
        self.rank, self.thread, self.coordinator = rank, thread, coordinator
        self._conditioning = conditioning

    def start(self, row_id: str, **options: Any) -> asyncio.Task[DenoiseResult]:
        """Begin an image."""
        return asyncio.create_task(self.coordinator.denoise(job(row_id, **options), [self._conditioning]))

    def stream(self, row_id: str, *, progress: bool = True, **options: Any) -> AsyncGenerator[Any, None]:
        """An image's events, then its result."""
        return self.coordinator.stream(job(row_id, **options), [self._conditioning], progress)

    async def wait_until(self, name: str, images: int) -> None:
        """Wait until so many are ``running`` or ``waiting``."""
        async with asyncio.timeout(60):
            while (await self.coordinator.load())[name] != images:  # noqa: ASYNC110  it has no event for tests
                await asyncio.sleep(0)

    async def cancel(self, request_id: str, *calls: asyncio.Task[DenoiseResult]) -> None:
        """Cancel a request, and see that all of its images and nothing else is over."""
        assert await self.coordinator.cancel_request(request_id) == (len(calls), 0)
        for call in calls:
            with pytest.raises(RequestCancelledError):
                await call


@pytest.fixture
async def group(conditioning: Conditioning) -> AsyncIterator[Group]:
    rank = Rank(SETTINGS, 0)
    rank.load(None)
    measured_times = rank.warm_up(default_job(SETTINGS))
    with ThreadPoolExecutor(1) as thread:
        coordinator = Coordinator(SETTINGS)
        await coordinator.lead([Handle(rank, thread)], [measured_times], "native", "local", rebuilds=0)
        running = asyncio.create_task(coordinator.run())
        yield Group(rank, thread, coordinator, conditioning)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_stream_has_the_progress_of_its_image(group: Group) -> None:
    *batches, result = [item async for item in group.stream("a/0", partial_images=3, magcache=MagCacheOptions())]
    events = [event for batch in batches for event in batch]
    previews = [event for event in events if event.preview is not None]
    assert [event.step for event in previews] == [8, 15, 22]
    assert all(event.preview.shape == (64, 64) and event.preview.isfinite().all() for event in previews)
    assert [event.step for event in events] == sorted(event.step for event in events)
    assert (events[0].step, events[0].decision) == (0, "")
    assert events[-1].step == 28, "after the last step, whatever the pace"
    assert all(event.decision == result.report.schedule[event.step - 1] for event in events if event.step)
    assert all(event.steps == 28 for event in events)
    assert {event.schedule for event in events} == {result.report.schedule}, "known before the first step"
    assert {event.predicted_error for event in events} == {result.report.predicted_error}
    assert events[0].eta_s == result.report.eta_seconds > 0
    assert events[-1].eta_s < events[0].eta_s


async def test_a_stream_without_progress_begins_and_has_previews(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.control.progress.PACE_S", 0.0)
    *batches, result = [item async for item in group.stream("a/0", progress=False, partial_images=3)]
    assert [event.step for batch in batches for event in batch] == [0, 8, 15, 22]
    assert result.report.schedule == 28 * "C"


class Sealed:
    """Stands for a reference to a tensor, which must not be opened."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __await__(self) -> Any:
        raise AssertionError("opened")


async def test_latents_pass_unopened(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cluster.rank.by_reference", Sealed)
    *batches, result = [item async for item in group.stream("a/0", steps=4, partial_images=1)]
    assert isinstance(result.latents, Sealed)
    assert result.latents.tensor.shape == (64, 64)
    events = [event for batch in batches for event in batch]
    assert [type(event.preview) for event in events if event.preview is not None] == [Sealed]


async def test_a_waiting_stream_has_its_place_in_the_queue(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.cluster.coordinator.QUEUE_PROGRESS_S", 0.01)
    running = [group.start(f"a/{i}", steps=LONG) for i in range(2)]
    await group.wait_until("running", 2)
    first = group.start("b/0", steps=1)
    await group.wait_until("waiting", 1)
    stream = group.stream("b/1", steps=1)
    (event,) = await anext(stream)
    assert (event.step, event.queue_position, event.decision) == (0, 2, "")
    await group.coordinator.cancel("b/0")
    with pytest.raises(asyncio.CancelledError):
        await first
    async with asyncio.timeout(60):
        while event.queue_position != 1:
            (event,) = await anext(stream)
    await group.cancel("a", *running)
    *_, result = [item async for item in stream]
    assert result.report.queue_position == 2


async def test_a_stream_that_is_closed_ends_its_image(group: Group) -> None:
    stream = group.stream("a/0", steps=LONG)
    assert await anext(stream)
    await stream.aclose()
    await group.wait_until("running", 0)
    assert await group.coordinator.cancel_request("a") == (0, 0)
    assert (await group.start("b/0", steps=2)).report.schedule == "CC"
    assert not group.rank._engine.rows


async def exhausted(stream: AsyncGenerator[Any, None]) -> None:
    async for _ in stream:
        pass


async def test_a_streams_request_is_cancelled(group: Group) -> None:
    stream = group.stream("a/0", steps=LONG)
    assert await anext(stream)
    assert await group.coordinator.cancel_request("a") == (1, 0)
    with pytest.raises(RequestCancelledError):
        await asyncio.wait_for(exhausted(stream), 60)


async def test_only_the_key_that_made_a_request_ends_it(group: Group) -> None:
    calls = {key: group.start(f"a/{key}", steps=LONG, key_name=key) for key in ("alice", "bob")}
    await group.wait_until("running", 2)
    assert await group.coordinator.cancel_request("a", "eve") == (0, 2)
    assert await group.coordinator.cancel_request("a", "bob") == (1, 1)
    with pytest.raises(RequestCancelledError):
        await calls["bob"]
    assert await group.coordinator.cancel_request("a", "alice") == (1, 0)
    with pytest.raises(RequestCancelledError):
        await calls["alice"]


async def test_a_request_is_ended_whole_and_leaves_nothing_on_the_rank(group: Group) -> None:
    calls = [group.start(f"a/{i}", steps=LONG, magcache=MagCacheOptions()) for i in range(3)]
    await group.wait_until("running", 2)
    other = group.start("ab/0", steps=3)
    await group.cancel("a", *calls)
    assert (await other).report.schedule == "CCC"
    assert await group.coordinator.cancel_request("a") == (0, 0)
    assert await group.coordinator.load() == {**await group.coordinator.load(), "running": 0, "waiting": 0}
    assert not group.rank._engine.rows
    assert group.coordinator.counts.cancelled == 3


async def test_a_deadline_is_refused_at_once_or_ends_the_image_when_it_passes(group: Group) -> None:
    with pytest.raises(DeadlineImpossibleError) as caught:
        await group.start("a/0", steps=100, deadline_s=0.001)
    assert caught.value.soonest_s > 0.001
    # An estimate can't know of urgent images that come later.
    late = group.start("late/0", steps=100, deadline_s=1.5 * caught.value.soonest_s)
    urgent = [group.start(f"urgent/{i}", steps=LONG, priority=9) for i in range(4)]
    with pytest.raises(DeadlinePassedError, match=r"passed after \d+ of 100 steps"):
        await late
    await group.cancel("urgent", *urgent)
    assert group.coordinator.counts.deadline_passed == group.coordinator.counts.deadline_impossible == 1


async def test_a_full_queue_and_impossible_wishes_are_refused(group: Group) -> None:
    calls = [group.start(f"a/{i}", steps=LONG) for i in range(2)]
    await group.wait_until("running", 2)
    calls += [group.start(f"a/{i}", steps=LONG) for i in range(2, 5)]
    await group.wait_until("waiting", 3)
    with pytest.raises(BusyError) as caught:
        await group.start("b/0")
    assert caught.value.retry_after_s > 0
    await group.cancel("a", *calls)
    with pytest.raises(ConfigError, match="budget=1 is not allowed"):
        await group.start("c/0", magcache=MagCacheOptions(computed_steps=1))


async def test_plans_travel_together(group: Group) -> None:
    before = group.coordinator.counts.messages, group.coordinator.counts.plans
    report = (await group.start("a/0", magcache=MagCacheOptions())).report
    counts = group.coordinator.counts
    assert counts.plans - before[1] == 28
    # How many computed steps share a message depends on the time that they take; reused ones never have their own.
    assert 1 <= counts.messages - before[0] <= report.computed + report.schedule.endswith(".")
    assert min(counts.computed_seconds, counts.reused_seconds) > 0
    assert counts.rank_seconds == [pytest.approx(counts.computed_seconds + counts.reused_seconds)]


async def test_a_rank_of_another_history_fails_all_images(group: Group) -> None:
    calls = [group.start(f"a/{i}", steps=LONG) for i in range(3)]
    await group.wait_until("running", 2)
    # Between two messages: one that runs would write its own digest over this.
    await Remote(setattr, group.thread).remote(group.rank._engine, "_digest", "another")
    for call in calls:
        with pytest.raises(GroupFailedError, match="PlanMismatchError"):
            await call
    with pytest.raises(GroupFailedError):
        await group.coordinator.ping()
    assert not await group.coordinator.ready()


async def test_a_group_is_ready_when_its_ranks_have_answered(group: Group) -> None:
    assert not await group.coordinator.ready()
    await group.coordinator.ping()
    assert await group.coordinator.ready()


async def test_a_dead_rank_fails_the_group_at_the_next_look(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    await group.coordinator.ping()

    def killed() -> None:
        raise ray.exceptions.ActorDiedError

    (handle,) = group.coordinator._ranks
    monkeypatch.setattr(handle.ping, "_method", killed)
    with pytest.raises(GroupFailedError, match="one of its processes died"):
        await group.coordinator.ping()
    assert not await group.coordinator.ready()
    with pytest.raises(GroupFailedError, match="one of its processes died"):
        await group.start("a/0")
