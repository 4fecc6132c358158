"""What a stream gets of one image: events as they come, each preview once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch

from app.api.backend import Preview, StreamItem
from app.cluster import image_call
from app.cluster.image_call import ImageCall
from app.messages.results import DenoiseReport, DenoiseResult, Progress
from tests.local_group import job

RESULT = DenoiseResult(torch.zeros(1), DenoiseReport("C", 1, 0, 0.0, None, 0.0, 0.0))


class Replica:
    """Stands for the replicas' handle; its calls yield what they are to, one stream after the other."""

    def __init__(self, *streams: list[Any]) -> None:
        self._streams = iter(streams)
        self.stream_denoise = self

    def options(self, *, stream: bool) -> Replica:
        return self

    async def remote(self, *_: Any) -> AsyncGenerator[Any, None]:
        for item in next(self._streams):
            await asyncio.sleep(0)
            yield item


class Decoder:
    """Stands for the image decoder: a preview's file is its number."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()

    async def preview(self, latents: torch.Tensor, *form: Any) -> bytes:
        await self.open.wait()
        if latents < 0:
            raise ValueError("broken")
        return str(int(latents)).encode()


@pytest.fixture(autouse=True)
def _plain_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_call, "items_of", lambda response: response)


def event(step: int, preview: int | None = None) -> Progress:
    return Progress(0, step, 8, "C", 1.0, 0, None if preview is None else torch.tensor(preview))


def previews(items: list[StreamItem]) -> list[tuple[int, bytes]]:
    return [(item.partial_index, item.data) for item in items if isinstance(item, Preview)]


FIRST = [[event(0)], [event(1, 0), event(2)], [event(3, 1)]]
AGAIN = [[event(0), event(1, 0)], [event(3, 1), event(5, 2), event(8)]]


@pytest.mark.parametrize("streams", [[[*FIRST, *AGAIN, RESULT]], [[*FIRST, RESULT], [*AGAIN, RESULT]]])
async def test_an_image_made_again_sends_no_preview_twice(streams: list[list[Any]]) -> None:
    """Whether its replica makes it again, or the backend asks once more."""
    items: list[StreamItem] = []
    call = ImageCall(Replica(*streams), Decoder(), (8, 8, "png", 100), items.append, progress=True)
    for _ in streams:
        assert await call.result(job("a/0"), None) is RESULT
    await asyncio.gather(*call._decoding)
    assert previews(items) == [(0, b"0"), (1, b"1"), (2, b"2")]
    assert [item.step for item in items if isinstance(item, Progress)] == [0, 1, 2, 3, 0, 1, 3, 5, 8]


async def test_a_broken_preview_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    items: list[StreamItem] = []
    replica = Replica([[event(0)], [event(1, -1)], [event(2, 0)], RESULT])
    call = ImageCall(replica, Decoder(), (8, 8, "png", 100), items.append, progress=False)
    await call.result(job("a/0"), None)
    await asyncio.wait({*call._decoding})
    assert previews(items) == [(1, b"0")]
    assert "left out: broken" in caplog.text


async def test_late_previews_are_left_out() -> None:
    items: list[StreamItem] = []
    decoder = Decoder()
    decoder.open.clear()
    replica = Replica([[event(0)], [event(1, 0)], [event(2, 1)], RESULT])
    call = ImageCall(replica, decoder, (8, 8, "png", 100), items.append, progress=False)
    await call.result(job("a/0"), None)
    late = {*call._decoding}
    assert len(late) == 2
    call.stop_previews()
    decoder.open.set()
    await asyncio.wait(late)
    assert previews(items) == []
    assert all(task.cancelled() for task in late)
