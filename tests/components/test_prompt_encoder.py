"""The prompt encoder gives what each model's own diffusers pipeline gives, wherever its encoders stay."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from app.components.prompt_encoder import PromptEncoder, TextEncoders, temporarily_on
from app.messages.conditioning import PromptEmbeddings
from app.settings import Settings
from benchmarks.make_checkpoint import make_checkpoint

PROMPT = "two green triangles on a white background"
POOLED_AND_TOKENS = {"flux.1-dev": 512, "flux.1-schnell": 256, "flux.1-kontext-dev": 512, "flux.2-klein-4b": 512}


@pytest.fixture(scope="module", params=POOLED_AND_TOKENS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("encoder") / request.param
    return request.param, make_checkpoint(request.param, "tiny", folder)


@pytest.mark.parametrize("offload", [False, True])
def test_it_encodes_as_the_models_own_pipeline(model: tuple[str, Path], offload: bool) -> None:
    name, folder = model
    length = POOLED_AND_TOKENS[name]
    encoders = TextEncoders(folder, length, torch.float32, "cpu", offload=offload)
    with encoders.on_device():
        got = encoders.encode(PROMPT)
        again, another = encoders.encode(PROMPT), encoders.encode("a red circle")
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        if "klein" in name:
            tokens, _ = pipeline.encode_prompt(PROMPT)
        else:
            tokens, pooled, _ = pipeline.encode_prompt(PROMPT, None, max_sequence_length=length)
            assert torch.equal(got.pooled, pooled[0])
    assert got.tokens.shape[0] == length
    assert torch.equal(got.tokens, tokens[0])
    assert (got.pooled is None) == ("klein" in name)
    assert not torch.equal(got.tokens, another.tokens)
    assert torch.equal(got.tokens, again.tokens)


def test_tokens_are_counted_as_the_pipeline_reads_them(model: tuple[str, Path]) -> None:
    name, folder = model
    length = POOLED_AND_TOKENS[name]
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=None, vae=None, text_encoder=None)
    encoders = TextEncoders(folder, length, torch.float32, "cpu", offload=False)
    short, long = encoders.encode(PROMPT).count, encoders.encode(PROMPT * 80).count
    if "klein" in name:
        chat = [{"role": "user", "content": PROMPT}]
        ids = pipeline.tokenizer.apply_chat_template(chat, add_generation_prompt=True, enable_thinking=False)
        assert short.given == len(ids["input_ids"])
        assert (long.clip_given, long.clip_read) == (0, 0)
    else:
        assert short.given == len(pipeline.tokenizer_2(PROMPT).input_ids)
        assert short.clip_given == len(pipeline.tokenizer(PROMPT).input_ids)
        assert long.clip_read == 77 < long.clip_given
    assert (short.read, short.clip_read) == (short.given, short.clip_given)
    assert long.read == length < long.given


def test_visitors_are_elsewhere_only_for_a_while_and_keep_their_own_copies() -> None:
    shared = torch.nn.Linear(3, 3)
    module = torch.nn.Sequential(shared, torch.nn.BatchNorm1d(3), shared)
    addresses = [tensor.data_ptr() for tensor in module.state_dict().values()]
    with temporarily_on([module], torch.device("meta")):
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        assert module[0].weight is module[2].weight
    with suppress(MemoryError), temporarily_on([module], torch.device("meta")):
        raise MemoryError
    assert [tensor.data_ptr() for tensor in module.state_dict().values()] == addresses
    assert module(torch.ones(2, 3)).shape == (2, 3)


async def test_equal_prompts_are_encoded_once() -> None:
    encoder = PromptEncoder(Settings(prompt_cache_entries=1))
    first, second = await asyncio.gather(encoder.encode(PROMPT), encoder.encode(PROMPT))
    assert first is second
    assert await encoder.encode(PROMPT) is first
    await encoder.encode("a red circle")
    again = await encoder.encode(PROMPT)  # one entry is kept: it was encoded again
    assert again is not first
    assert torch.equal(again.tokens, first.tokens)


async def waiting(encoder: PromptEncoder, prompts: list[str]) -> list[PromptEmbeddings | BaseException]:
    """The embeddings of prompts that all wait before the first of them is encoded."""
    busy = threading.Event()
    encoder._thread.submit(busy.wait)
    tasks = [asyncio.create_task(encoder.encode(prompt)) for prompt in prompts]
    await asyncio.sleep(0)
    busy.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


async def test_prompts_that_wait_together_share_one_copy_of_the_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(Settings())
    monkeypatch.setattr(encoder._encoders, "_offload", True)
    copies = []

    def counted(modules: list[torch.nn.Module], device: torch.device) -> AbstractContextManager[None]:
        copies.append(len(modules))
        return temporarily_on(modules, device)

    monkeypatch.setattr("app.components.prompt_encoder.temporarily_on", counted)
    prompts = [PROMPT, "a red circle", "a blue square"]
    together = await waiting(encoder, prompts)
    assert copies == [2]  # CLIP and T5
    for prompt, got in zip(prompts, together, strict=True):
        alone = await PromptEncoder(Settings()).encode(prompt)
        assert isinstance(got, PromptEmbeddings)
        assert torch.equal(got.tokens, alone.tokens)


async def test_a_copy_that_fails_fails_what_waits_and_nothing_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = PromptEncoder(Settings())

    def full() -> AbstractContextManager[None]:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(encoder._encoders, "on_device", full)
        failed = await asyncio.wait_for(waiting(encoder, [PROMPT, "a red circle"]), 60)
    assert [type(error) for error in failed] == [MemoryError, MemoryError]
    assert (await encoder.encode(PROMPT)).count.given > 0
