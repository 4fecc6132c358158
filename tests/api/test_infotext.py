"""The settings of an image as text: three parts, as AUTOMATIC1111's web interface splits them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import httpx
from fastapi import FastAPI

from app.api.app import create_app
from app.api.backend import ImagesJob
from app.api.infotext import infotext
from app.messages.jobs import MagCacheOptions
from app.messages.results import DenoiseReport
from app.settings import Settings
from tests.api.fake_backend import FakeBackend

PROMPT = "a red circle,\non blue"
JOB = ImagesJob("a", PROMPT, "green: no", 3, 128, 96, 28, 3.5, 2.0, 2**60, MagCacheOptions(), "png", 100)
REPORT = DenoiseReport("CC..C", 3, 2, 0.1, "C...C", 0.0, 1.0)


def read(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings: the last line, and what follows the words ``Negative prompt:``."""
    *above, last = text.split("\n")
    prompt, _, negative = "\n".join(above).partition("\nNegative prompt: ")
    pairs = re.findall(r'(\w[\w ]*): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)', last)
    assert ", ".join(f"{name}: {value}" for name, value in pairs) == last
    return prompt, negative, {name: json.loads(value) if value[0] == '"' else value for name, value in pairs}


def test_all_settings_are_read_back() -> None:
    prompt, negative, settings = read(infotext(JOB, 2, REPORT, 'acme/flux: "dev", 1'))
    assert (prompt, negative) == (PROMPT, "green: no")
    assert settings == {
        "Steps": "28", "Sampler": "Euler", "Schedule type": "Simple", "CFG scale": "2", "Distilled CFG Scale": "3.5",
        "Seed": str(2**60 + 2), "Size": "128x96", "Model": 'acme/flux: "dev", 1', "MagCache schedule": "CC..C",
        "MagCache negative schedule": "C...C", "Version": "flux-magcache-serve",
    }  # fmt: skip


def test_what_is_not_there_is_left_out() -> None:
    job = replace(JOB, negative_prompt=None, strength=0.55, prompt="🔴" * 32000)
    text = infotext(job, 0, replace(REPORT, negative_schedule=None), "flux-tiny")
    prompt, negative, settings = read(text)
    assert (prompt, negative) == ("🔴" * 6000, "")
    assert (settings["CFG scale"], settings["Denoising strength"]) == ("1", "0.55")
    assert "MagCache negative schedule" not in settings
    long = infotext(replace(job, negative_prompt="🔴" * 32000), 0, REPORT, "flux-tiny")
    assert len(long.encode("utf-16-be")) < 60000


async def test_the_request_decides_and_else_the_setting(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    app: FastAPI = create_app(Settings.model_validate({"http": {"metadata": True}}), lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as other:
        for asked in (None, False, True):
            for one in (client, other):
                reply = await one.post("/v1/images/generations", json={"prompt": "a", "metadata": asked})
                assert reply.status_code == 200
    assert [job.metadata for job in backend.jobs] == [False, True, False, False, True, True]
