"""When a group's ranks count as there; test_coordinator.py and test_replica.py have the watch at work."""

from __future__ import annotations

import asyncio

import pytest
import ray

from app.cluster.rank_watch import RankWatch


class Rank:
    """Stands for a rank's handle: answers when ``done`` is set, or fails once it is ``dead``."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.done.set()
        self.dead = False
        self.ping = self

    async def remote(self) -> None:
        if self.dead:
            raise ray.exceptions.ActorDiedError
        await self.done.wait()


async def test_ranks_that_were_never_asked_are_not_there() -> None:
    watch = RankWatch([Rank()])
    assert not watch.is_fresh
    await watch.check()
    assert watch.is_fresh


async def test_an_answer_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = RankWatch([Rank()])
    await watch.check()
    monkeypatch.setattr("app.cluster.rank_watch.FRESH_S", -1.0)
    assert not watch.is_fresh


async def test_a_busy_rank_is_late_and_not_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Rank(), Rank()]
    watch = RankWatch(ranks)
    monkeypatch.setattr("app.cluster.rank_watch.FRESH_S", -1.0)
    ranks[1].done.clear()
    check = asyncio.create_task(watch.check())
    await asyncio.sleep(0)
    assert watch.is_fresh
    ranks[1].done.set()
    await check
    assert not watch.is_fresh


async def test_one_dead_rank_is_enough() -> None:
    ranks = [Rank(), Rank()]
    watch = RankWatch(ranks)
    await watch.check()
    ranks[0].done.clear()  # busy, as a rank is that waits in a collective for the dead one
    ranks[1].dead = True
    with pytest.raises(ray.exceptions.ActorDiedError):
        await watch.check()
    assert not watch.is_fresh
