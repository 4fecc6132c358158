"""The coordinator and images with adapters, with a real rank in this process that loads when the test lets it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch

from app.cluster.coordinator import Coordinator
from app.cluster.rank import Rank
from app.control.admission import default_job
from app.errors import BusyError
from app.messages.loras import LoraUse
from tests.cluster.test_coordinator import LONG, SETTINGS, Group, Handle, Remote
from tests.local_group import random_conditioning
from tests.lora_files import weights_of, write_lora


class LoraGroup(Group):
    """A group whose rank loads adapters once `disk` is set."""

    def __init__(self, rank: Rank, thread: ThreadPoolExecutor, coordinator: Coordinator, adapter: LoraUse) -> None:
        super().__init__(rank, thread, coordinator, random_conditioning())
        self.adapter = adapter
        self.disk = Event()
        self.loads = 0
        loras = rank._engine.loras  # type: ignore[union-attr]
        assert loras is not None
        load = loras.load

        def slowly(name: str, digest: str = "") -> None:
            self.loads += 1
            self.disk.wait(60)
            load(name, digest)

        loras.load = slowly  # type: ignore[method-assign]


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[LoraGroup]:
    adapter = LoraUse("queries", 1.0, write_lora(tmp_path / "queries.safetensors", fill=0.3), weights_of(2) * 4)
    settings = SETTINGS.model_copy(update={"loras": str(tmp_path)})
    rank = Rank(settings, 0)
    rank.load(None)
    measured_times = rank.warm_up(default_job(settings))
    with ThreadPoolExecutor(1) as thread:
        handle = Handle(rank, thread)
        handle.load_lora = Remote(rank.load_lora, thread)
        handle.drop_lora = Remote(rank.drop_lora, thread)
        coordinator = Coordinator(settings)
        await coordinator.lead([handle], [measured_times], "native", "local", rebuilds=0)
        running = asyncio.create_task(coordinator.run())
        group = LoraGroup(rank, thread, coordinator, adapter)
        yield group
        group.disk.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until_it_loads(group: LoraGroup) -> None:
    async with asyncio.timeout(60):
        while not group.loads:  # noqa: ASYNC110  another thread counts
            await asyncio.sleep(0.001)


async def test_other_images_go_on_while_an_adapter_is_loaded(group: LoraGroup) -> None:
    adapted = group.start("a/0", steps=8, loras=(group.adapter,))
    await until_it_loads(group)
    plain = await group.start("b/0", steps=8)
    assert not adapted.done()
    group.disk.set()
    result = await adapted
    assert not torch.allclose(result.latents, plain.latents, atol=1e-3)


async def test_an_image_that_waits_for_its_adapter_is_cancelled_with_its_request(group: LoraGroup) -> None:
    waiting = group.start("a/0", loras=(group.adapter,))
    await until_it_loads(group)
    assert await group.coordinator.cancel_request("a", "another key") == (0, 1)
    await group.cancel("a", waiting)


async def test_a_full_queue_refuses_before_anything_is_loaded(group: LoraGroup) -> None:
    images = [group.start(f"a/{index}", steps=LONG) for index in range(5)]  # two run, three wait
    await group.wait_until("waiting", 3)
    with pytest.raises(BusyError):
        await group.start("b/0", loras=(group.adapter,))
    assert group.loads == 0
    await group.cancel("a", *images)
