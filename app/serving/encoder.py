"""The prompt encoder: CLIP and T5 as diffusers' FluxPipeline runs them, with the last prompts' results kept."""

import asyncio
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch
from diffusers import FluxPipeline

from app.engine.messages import PromptEmbeddings
from app.serving.logs import configure_logging
from app.serving.model_files import local_model
from app.settings import Settings


class PromptEncoder:
    """Encodes one prompt at a time, off the event loop; equal prompts that arrive together are encoded once."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.log_level)
        self._settings = settings
        self._pipeline = FluxPipeline.from_pretrained(
            local_model(settings.model), transformer=None, vae=None, dtype=getattr(torch, settings.dtype)
        ).to(settings.encoder_runs_on)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._cache: OrderedDict[str, PromptEmbeddings] = OrderedDict()
        self._under_way: dict[str, asyncio.Future[PromptEmbeddings]] = {}

    async def encode(self, prompt: str) -> PromptEmbeddings:
        """The embeddings of ``prompt``, on the CPU, in the model's dtype."""
        cached = self._cache.get(prompt)
        if cached is not None:
            self._cache.move_to_end(prompt)
            return cached
        under_way = self._under_way.get(prompt)
        if under_way is None:
            under_way = asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt)
            self._under_way[prompt] = under_way
            under_way.add_done_callback(lambda done: self._keep(prompt, done))
        # One client's disconnect must not take the result from another who waits for the same prompt.
        return await asyncio.shield(under_way)

    async def ping(self) -> None:
        """Answer when this deployment is up."""

    @torch.inference_mode()
    def _encode(self, prompt: str) -> PromptEmbeddings:
        tokens, pooled, _ = self._pipeline.encode_prompt(
            prompt, prompt_2=None, max_sequence_length=self._settings.sampling.max_sequence_length
        )
        return PromptEmbeddings(tokens[0].cpu(), pooled[0].cpu())

    def _keep(self, prompt: str, done: "asyncio.Future[PromptEmbeddings]") -> None:
        del self._under_way[prompt]
        if done.cancelled() or done.exception() is not None:
            return
        self._cache[prompt] = done.result()
        while len(self._cache) > self._settings.prompt_cache_entries:
            self._cache.popitem(last=False)
