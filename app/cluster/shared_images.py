"""Images of one replica that several calls may wait for: a repetition of a request joins the image under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextvars import copy_context
from typing import Any

from app.control.progress import ProgressBuffer
from app.messages.jobs import DenoiseJob
from app.messages.repetitions import Reservation, Sharing
from app.messages.results import DenoiseResult, Progress

Emit = Callable[[list[Progress]], None]
Work = Callable[[Emit], Coroutine[Any, Any, DenoiseResult]]

KEPT_IMAGES = 256
KEPT_BYTES = 64 << 20
"""Finished latents that wait for a repetition, at most; about a byte for each pixel."""
RETURN_S = 10.0
"""How long an image goes on whose client left, when it may come again under its Idempotency-Key."""


class SharedImage:
    """One image: the work on it, those who wait for it, and the API process that serves it."""

    def __init__(self, job: DenoiseJob, task: asyncio.Task[DenoiseResult], sharing: Sharing | None) -> None:
        self.job = job
        self.sharing = sharing
        self.process = "" if sharing is None else sharing.process
        self.finished_s: float | None = None
        self._task = task
        self._buffers: dict[str, ProgressBuffer] = {}

    def emit(self, events: list[Progress]) -> None:
        """Pass ``events`` on to all who wait."""
        for buffer in self._buffers.values():
            for event in events:
                buffer.push(event)

    def close(self) -> None:
        """Mark the end of the work: all who wait get the result."""
        for buffer in self._buffers.values():
            buffer.close()

    async def next(self, follower: str) -> list[Progress] | DenoiseResult:
        """Events that ``follower`` has not had, or the result; from its first call on it counts as waiting."""
        buffer = self._buffers.setdefault(follower, ProgressBuffer())
        if self._task.done():
            buffer.close()
        return await buffer.read() or await asyncio.shield(self._task)

    async def items(self, follower: str) -> AsyncGenerator[list[Progress] | DenoiseResult, None]:
        """All that `next` gives; the last item is the result. Closed or cancelled, ``follower`` has left."""
        try:
            while isinstance(news := await self.next(follower), list):
                yield news
            yield news
        finally:
            self.leave(follower)

    def leave(self, follower: str) -> None:
        """``follower`` waits no longer; the work ends when there are no others, soon or at once."""
        self._buffers.pop(follower, None)
        if self.sharing is not None and self.sharing.keyed:
            asyncio.get_running_loop().call_later(RETURN_S, self._end_if_left)
        else:
            self._end_if_left()

    def _end_if_left(self) -> None:
        if not self._buffers:
            self._task.cancel()  # no effect on one that is done


class SharedImages:
    """The images of a replica, those under way and for ``keep_s`` the finished ones that may be asked for again."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._images: dict[str, SharedImage] = {}  # finished ones in the order of their ends
        # Work must outlive the call that began it, and Ray cancels with a call what was begun in its context.
        self._context = copy_context()

    def get(self, name: str) -> SharedImage | None:
        """The image of that name, see `Sharing.image`."""
        self._forget()
        return self._images.get(name)

    def join_or_start(self, job: DenoiseJob, work: Work) -> SharedImage:
        """The image that ``job`` asks for; ``work`` makes it where it is neither under way nor finished."""
        name = job.row_id if job.sharing is None else job.sharing.image(job.index)
        known = self.get(name)
        if known is not None:
            return known

        async def make() -> DenoiseResult:
            return await work(lambda events: image.emit(events))

        task = asyncio.get_running_loop().create_task(make(), context=self._context.copy())
        image = self._images[name] = SharedImage(job, task, job.sharing)
        task.add_done_callback(lambda done: self._ended(name, image, done))
        return image

    def tokens(self) -> set[str]:
        """Of the requests whose images are here."""
        return {image.sharing.token for image in self._images.values() if image.sharing is not None}

    def orphans(self, body: str, living: set[str]) -> list[Reservation]:
        """The requests with this body whose API process is not among the ``living``."""
        self._forget()
        lost = [one for _, one in self._without_process(living) if one.body == body]
        return [*dict.fromkeys(Reservation(one.token, one.body, one.seed, one.made_s) for one in lost)]

    def claim(self, token: str, living: set[str], process: str) -> bool:
        """Have ``process`` serve a request of `orphans`; False when another one does by now."""
        claimed = [image for image, one in self._without_process(living) if one.token == token]
        for image in claimed:
            image.process = process
        return bool(claimed)

    def _without_process(self, living: set[str]) -> Iterator[tuple[SharedImage, Sharing]]:
        """The images whose API process is not among the ``living``."""
        for image in self._images.values():
            if image.sharing is not None and image.process not in living:
                yield image, image.sharing

    def _ended(self, name: str, image: SharedImage, done: asyncio.Task[DenoiseResult]) -> None:
        del self._images[name]
        if not done.cancelled() and done.exception() is None and image.sharing is not None:
            image.finished_s = time.monotonic()
            self._images[name] = image
        image.close()

    def _forget(self) -> None:
        finished = [(name, image) for name, image in self._images.items() if image.finished_s is not None]
        nbytes = sum(image.job.width * image.job.height for _, image in finished)
        late_s, count = time.monotonic() - self._keep_s, len(finished)
        for name, image in finished:
            assert image.finished_s is not None
            if image.finished_s > late_s and nbytes <= KEPT_BYTES and count <= KEPT_IMAGES:
                break
            del self._images[name]
            nbytes, count = nbytes - image.job.width * image.job.height, count - 1
