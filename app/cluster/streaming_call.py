"""One image followed from the ingress while a replica denoises it: progress, previews, and the result."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

from ray.serve.handle import DeploymentHandle

from app.api.backend import Preview, StreamItem
from app.cluster.handles import items_of
from app.components.vae import ImageDecoder
from app.messages import Conditioning, DenoiseJob, DenoiseResult, Latents, Progress

logger = logging.getLogger(__name__)

FileForm = tuple[int, int, str, int]
"""Width, height, format and compression of an image file, as `ImageDecoder` takes them."""


class StreamingCall:
    """Tells of one image. Previews are decoded beside it: a late one is left out and holds nothing up."""

    def __init__(
        self,
        replica: DeploymentHandle,
        decoder: ImageDecoder,
        form: FileForm,
        emit: Callable[[StreamItem], None],
        progress: bool,
    ) -> None:
        """With ``progress`` emit all news, else the beginning and the previews only."""
        self._replica = replica.options(stream=True)
        self._decoder = decoder
        self._form = form
        self._emit = emit
        self._progress = progress
        self._previews = 0
        self._decoding: set[asyncio.Task[None]] = set()

    async def result(self, job: DenoiseJob, conditioning: Conditioning) -> DenoiseResult:
        """Have ``job`` denoised."""
        result: DenoiseResult | None = None
        async with aclosing(items_of(self._replica.stream_denoise.remote(job, conditioning, self._progress))) as items:
            async for item in items:
                if isinstance(item, DenoiseResult):
                    result = item
                else:
                    self._pass_on(item)
        assert result is not None, "a replica's stream ends with the result or an error"
        return result

    def stop_previews(self) -> None:
        """Leave out the previews that are not decoded yet; called when the image is there, or never will be."""
        for task in self._decoding:
            task.cancel()

    def _pass_on(self, events: tuple[Progress, ...]) -> None:
        for event in events:
            self._emit(event)
            if event.preview is not None:
                task = asyncio.create_task(self._preview(event.index, event.preview))
                self._decoding.add(task)
                task.add_done_callback(self._decoded)

    async def _preview(self, index: int, latents: Latents) -> None:
        partial_index, self._previews = self._previews, self._previews + 1
        data = await self._decoder.preview(latents, *self._form)
        self._emit(Preview(index, partial_index, data))

    def _decoded(self, task: asyncio.Task[None]) -> None:
        self._decoding.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a preview could not be decoded and is left out: %s", task.exception())
