"""The prompt encoder: a checkpoint's text encoders, run as in its diffusers pipeline, with an LRU cache of results."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from torch import nn

from app.engine.finite import check_finite
from app.engine.weight_files import encoder_variant
from app.logs import configure_logging
from app.messages.conditioning import PromptEmbeddings, TokenCount
from app.metrics import EncoderMetrics
from app.model_files import model_folder
from app.settings import Settings


class TextEncoders:
    """CLIP and T5, or Qwen3, with their tokenizers."""

    def __init__(
        self, model: Path, max_sequence_length: int, dtype: torch.dtype, device: torch.device | str, *, offload: bool
    ) -> None:
        """Load them from the folder ``model``; with ``offload`` they are on ``device`` only while encoding."""
        # The checkpoint's pipeline class knows its encoders; its other parts are not loaded.
        self._pipeline = DiffusionPipeline.from_pretrained(
            model,
            transformer=None,
            vae=None,
            variant=encoder_variant(model),
            dtype=dtype,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # True needs another package, and weights are memory-mapped anyway
        )
        parts = {name: part for name, part in self._pipeline.components.items() if isinstance(part, nn.Module)}
        self._modules = list(parts.values())
        self._max_sequence_length = max_sequence_length
        self._device = torch.device(device)
        self._offload = offload
        if not offload:
            self._pipeline.to(self._device)
        for name, part in parts.items():
            check_finite(model / name, part.named_parameters())

    def on_device(self) -> AbstractContextManager[None]:
        """In here they are on their device; with ``offload`` they are copied to it, once for all prompts in here."""
        return temporarily_on(self._modules, self._device) if self._offload else nullcontext()

    @torch.inference_mode()
    def encode(self, prompt: str) -> PromptEmbeddings:
        """The embeddings of ``prompt``, on the CPU; called in `on_device`.

        Each prompt has a pass of its own: its hundreds of padded tokens fill a GPU, and so its embeddings do not depend
        on the prompts that came with it.
        """
        options = {"device": self._device, "max_sequence_length": self._max_sequence_length}
        if isinstance(self._pipeline, Flux2KleinPipeline):
            tokens, _ = self._pipeline.encode_prompt(prompt, **options)
            return PromptEmbeddings(tokens[0].cpu(), count=self._count(prompt))
        tokens, pooled, _ = self._pipeline.encode_prompt(prompt, prompt_2=None, **options)
        return PromptEmbeddings(tokens[0].cpu(), pooled[0].cpu(), self._count(prompt))

    def _count(self, prompt: str) -> TokenCount:
        """The prompt's tokens, with what the tokenizers add to them; padding does not count."""
        pipeline, longest = self._pipeline, self._max_sequence_length
        if isinstance(pipeline, Flux2KleinPipeline):
            messages = [{"role": "user", "content": prompt}]
            text = pipeline.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            given = _tokens(pipeline.tokenizer, text)
            return TokenCount(given, min(given, longest))
        given, clip = _tokens(pipeline.tokenizer_2, prompt), _tokens(pipeline.tokenizer, prompt)
        return TokenCount(given, min(given, longest), clip, min(clip, pipeline.tokenizer_max_length))


def _tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False).input_ids)


class PromptEncoder:
    """Encodes one prompt at a time, off the event loop; equal prompts that arrive together are encoded once.

    Prompts that wait together share one copy of the encoders to their device, where that is needed.
    """

    def __init__(self, settings: Settings, process: str | None = None) -> None:
        """``process`` is what its metrics call the process that it is in, None for a name of its own."""
        configure_logging(settings)
        self._encoders = TextEncoders(
            model_folder(settings),
            settings.sampling.max_sequence_length,
            getattr(torch, settings.dtype),
            settings.encoder_runs_on,
            offload=settings.text_encoder.placement == "offload",
        )
        self._entries = settings.prompt_cache_entries
        self._registry = CollectorRegistry()
        self._metrics = EncoderMetrics(self._registry, settings.model_name, process or f"encoder-{uuid4().hex[:8]}")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._cache: OrderedDict[str, PromptEmbeddings] = OrderedDict()
        self._under_way: dict[str, asyncio.Future[PromptEmbeddings]] = {}
        self._waiting: deque[tuple[str, Future[PromptEmbeddings]]] = deque()

    async def encode(self, prompt: str) -> PromptEmbeddings:
        """The embeddings of ``prompt``, on the CPU, in the model's dtype."""
        cached = self._cache.get(prompt)
        if cached is not None:
            self._cache.move_to_end(prompt)
            self._metrics.looked_up("hit")
            return cached
        under_way = self._under_way.get(prompt)
        self._metrics.looked_up("miss" if under_way is None else "shared")
        if under_way is None:
            encoded: Future[PromptEmbeddings] = Future()
            self._waiting.append((prompt, encoded))
            self._thread.submit(self._encode_waiting)
            under_way = asyncio.wrap_future(encoded)
            self._under_way[prompt] = under_way
            under_way.add_done_callback(lambda done: self._keep(prompt, done))
        # Shielded: other requests may await the same encoding when this one is cancelled.
        return await asyncio.shield(under_way)

    def _encode_waiting(self) -> None:
        """Encode what waits, and what comes meanwhile."""
        if not self._waiting:  # an earlier call encoded it
            return
        try:
            with self._encoders.on_device():
                while self._waiting:
                    prompt, encoded = self._waiting.popleft()
                    try:
                        encoded.set_result(self._encoders.encode(prompt))
                    except Exception as error:
                        encoded.set_exception(error)
        except Exception as error:  # the device has no room for them
            while self._waiting:
                self._waiting.popleft()[1].set_exception(error)

    async def ping(self) -> None:
        """Return once it is up."""

    async def metric_families(self) -> list[Metric]:
        """The encoder's metrics, for the service's ``/metrics``."""
        return list(self._registry.collect())

    def _keep(self, prompt: str, done: "asyncio.Future[PromptEmbeddings]") -> None:
        del self._under_way[prompt]
        if done.cancelled() or done.exception() is not None:
            return
        self._cache[prompt] = done.result()
        while len(self._cache) > self._entries:
            self._cache.popitem(last=False)


@contextmanager
def temporarily_on(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Temporarily point the ``modules`` at copies on ``device``; the originals are kept, so nothing is copied back."""
    originals = [
        (part, name, tensor)
        for module in modules
        for part in module.modules()
        for name, tensor in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
    ]
    copies: dict[torch.Tensor, torch.Tensor] = {}  # tied weights are copied once
    try:
        for part, name, tensor in originals:
            if tensor not in copies:
                moved = tensor.detach().to(device, non_blocking=True)
                copies[tensor] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
            setattr(part, name, copies[tensor])
        yield
    finally:
        for part, name, tensor in originals:
            setattr(part, name, tensor)
