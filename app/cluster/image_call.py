"""One image asked of the replicas, with its progress and its previews on the way when the client streams."""

import asyncio
import logging
import uuid
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

from ray.serve.handle import DeploymentHandle

from app.api.backend import Preview, StreamItem
from app.cluster.handles import answer_of_one, answers_of_all, items_of, result_of
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.messages.results import DenoiseResult, Latents, Progress

if TYPE_CHECKING:
    from app.components.vae import ImageDecoder

logger = logging.getLogger(__name__)

FileForm = tuple[int, int, str, int]
"""Width, height, format and compression of an image file, as `ImageDecoder` takes them."""
OnEvent = Callable[[StreamItem], None]


class ImageCall:
    """Denoises one image; a stream's previews are decoded meanwhile, and late ones are left out."""

    def __init__(
        self, replica: DeploymentHandle, decoder: "ImageDecoder", form: FileForm, emit: OnEvent | None, progress: bool
    ) -> None:
        """Without ``emit`` there are no events; ``progress`` has one for the steps as well."""
        self._replica = replica
        self._decoder = decoder
        self._form = form
        self._emit = emit
        self._progress = progress
        self._previews_made = 0  # since step 0, which comes again when the image is made again
        self._previews_taken = 0
        self._previews_begun = 0
        self._decoding: set[asyncio.Task[None]] = set()

    async def result(self, job: DenoiseJob, conditioning: Conditioning) -> DenoiseResult:
        """Have ``job`` denoised."""
        if self._emit is None:
            made: DenoiseResult = await result_of(self._replica.denoise.remote(job, conditioning))
            return made
        stream = self._replica.options(stream=True).stream_denoise
        result: DenoiseResult | None = None
        async with aclosing(items_of(stream.remote(job, conditioning, self._progress))) as items:
            async for item in items:
                if isinstance(item, DenoiseResult):
                    result = item
                else:
                    for event in item:
                        self._pass_on(event, self._emit)
        assert result is not None, "a replica's stream ends with the result or an error"
        return result

    async def joined(self, image: str) -> DenoiseResult | None:
        """The result of an image under way, or finished lately, of another request; None where no replica has it."""
        follower = uuid.uuid4().hex
        try:
            while isinstance(news := await answer_of_one(self._replica, "follow", image, follower), list):
                if self._emit is not None:
                    for event in news:
                        self._pass_on(event, self._emit)
        except asyncio.CancelledError:
            await asyncio.shield(answers_of_all(self._replica, "unfollow", image, follower))
            raise
        result: DenoiseResult | None = news
        return result

    def stop_previews(self) -> None:
        """Leave out the previews that are not decoded yet; called once the image is finished or has failed."""
        for task in self._decoding:
            task.cancel()

    def _pass_on(self, event: Progress, emit: OnEvent) -> None:
        emit(event)
        if event.step == 0:
            self._previews_made = 0
        if event.preview is None:
            return
        self._previews_made += 1
        if self._previews_made > self._previews_taken:
            self._previews_taken = self._previews_made
            task = asyncio.create_task(self._preview(event.index, event.preview, emit))
            self._decoding.add(task)
            task.add_done_callback(self._decoded)

    async def _preview(self, index: int, latents: Latents, emit: OnEvent) -> None:
        partial_index, self._previews_begun = self._previews_begun, self._previews_begun + 1
        data = await self._decoder.preview(latents, *self._form)
        emit(Preview(index, partial_index, data))

    def _decoded(self, task: asyncio.Task[None]) -> None:
        self._decoding.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("a preview could not be decoded and is left out: %s", task.exception())
