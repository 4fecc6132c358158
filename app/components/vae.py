"""The VAE: decodes latents into image files, and encodes source images into latents."""

import asyncio
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from diffusers import AutoModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from app.components.compiled_vae import compile_decoder
from app.components.image_file import image_file
from app.components.source_encoder import SourceEncoder
from app.engine.families import family_of
from app.engine.finite import check_finite
from app.engine.geometry import TOKEN_PIXELS, Geometry
from app.engine.tuning import use_compile_cache
from app.engine.weight_files import weight_variant
from app.errors import GenerationError
from app.logs import configure_logging
from app.messages.conditioning import SourceImage
from app.messages.results import Latents
from app.model_files import compile_cache, model_folder
from app.settings import Settings


class ImageDecoder:
    """Decodes and encodes one image at a time, off the event loop; finished images go before previews.

    The VAE has a thread to itself: while one image is compressed into its file, the next is decoded.
    """

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings)
        self._device = torch.device(settings.decoder_runs_on)
        model = model_folder(settings)
        self._family = family_of(model)
        self._vae = (
            AutoModel.from_pretrained(
                str(model),
                subfolder="vae",
                variant=weight_variant(model / "vae"),
                dtype=getattr(torch, settings.dtype),
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
            .to(self._device, memory_format=torch.channels_last)  # fastest for its convolutions
            .eval()
        )
        check_finite(model / "vae", self._vae.named_parameters())
        if settings.vae.tiling:
            self._vae.enable_tiling()
        self._sources = SourceEncoder(self._vae, self._family, settings.sampling.max_pixels)
        self._processor = VaeImageProcessor(vae_scale_factor=TOKEN_PIXELS)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._finished = 0  # finished images (no previews) that are in the thread or wait for it
        self._changed = asyncio.Condition()
        self._one_preview = asyncio.Lock()
        if settings.decoder_is_compiled:
            use_compile_cache(compile_cache(settings), "vae")
            usual = settings.sampling.default_width, settings.sampling.default_height
            # In the thread that decodes: torch checks that compiled code meets the settings that it was compiled with.
            self._thread.submit(compile_decoder, self._vae, *usual).result()

    async def decode(
        self,
        latents: Latents,
        width: int,
        height: int,
        output_format: str,
        compression: int,
        parameters: str | None = None,
    ) -> bytes:
        """Decode latents into an image file.

        Args:
            latents: opened here, when they come by reference.
            width, height: pixels.
            output_format: png, jpeg or webp.
            compression: quality of jpeg and webp, 0 to 100.
            parameters: text to write into the file.

        Raises:
            GenerationError: the latents are not finite; a black image would hide it.
        """
        self._finished += 1
        try:
            image = await self._in_thread(latents, width, height)
        finally:
            self._finished -= 1
            async with self._changed:
                self._changed.notify_all()
        return await asyncio.to_thread(image_file, image, output_format, compression, parameters)

    async def preview(self, latents: Latents, width: int, height: int, output_format: str, compression: int) -> bytes:
        """Like `decode`, but only while no finished image waits: previews delay one by at most a single decode."""
        async with self._one_preview:
            async with self._changed:
                await self._changed.wait_for(lambda: self._finished == 0)
            image = await self._in_thread(latents, width, height)
        return await asyncio.to_thread(image_file, image, output_format, compression)

    async def _in_thread(self, latents: Latents, width: int, height: int) -> Image.Image:
        tensor = await latents if isinstance(latents, Awaitable) else latents
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._thread, self._decode, tensor, Geometry.of(width, height))

    async def encode(self, pixels: np.ndarray, width: int, height: int, mask: np.ndarray | None) -> SourceImage:
        """Encode a source image into tokens; see `SourceEncoder.encode`."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._thread, self._sources.encode, pixels, width, height, mask)

    async def ping(self) -> None:
        """Return once it is up."""

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor, geometry: Geometry) -> Image.Image:
        if not torch.isfinite(latents).all():
            raise GenerationError(
                "the model made latents that are not finite, so there is no image: try another seed or a lower "
                "guidance_scale or true_cfg_scale; if every request ends so, the weights are damaged"
            )
        scaled = self._family.layout.to_vae(self._vae, latents[None].to(self._device, self._vae.dtype), geometry)
        pixels = self._vae.decode(scaled, return_dict=False)[0]
        image: Image.Image
        (image,) = self._processor.postprocess(pixels, output_type="pil")
        return image
