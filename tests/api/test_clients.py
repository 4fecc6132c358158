"""Requests as other programs send them, under the names of OpenAI's models that they insist on.

The sources named at each were read for the fields, their types and the form of the body.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from PIL import Image

from app.api.app import create_app
from app.engine.families import FLUX2_KLEIN
from app.settings import Settings
from tests.api.edit_forms import RED, encoded, plain
from tests.api.fake_backend import FakeBackend

ALIASES = ["flux-tiny", "gpt-image-1", "gpt-image-1.5", "gpt-image-1-mini", "dall-e-2", "dall-e-3", "acme/flux"]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
BLUE = encoded(plain(colour="blue"))
BLOB = ("blob", BLUE, "image/png")


@pytest.fixture
def settings() -> Settings:
    sides = {"default_width": 128, "default_height": 128, "max_side": 1792, "max_pixels": 1792 * 1024}
    return Settings.model_validate({"served_model_name": ALIASES, "sampling": sides, "max_batch_tokens": 1 << 14})


def png(name: str, data: bytes = RED) -> tuple[str, tuple[str, bytes, str]]:
    return name, ("image.png", data, "image/png")


def form(fields: dict[str, str], *files: tuple[str, tuple[str, bytes, str]]) -> dict[str, Any]:
    return {"data": fields, "files": list(files)}


REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    # open-webui/open-webui backend/open_webui/routers/images.py, image_generations and image_edits
    "Open WebUI": (
        f"{GENERATIONS}?api-version=2025-04-01-preview",
        {"json": {"model": "dall-e-2", "prompt": "a", "n": 1, "size": "512x512", "response_format": "b64_json"}},
    ),
    "Open WebUI with the operator's parameters": (
        GENERATIONS,
        {"json": {"model": "gpt-image-1", "prompt": "a", "n": 2, "size": "auto", "quality": "high", "seed": 5}},
    ),
    "Open WebUI edits": (
        EDITS,
        form({"model": "gpt-image-1", "prompt": "a", "n": "1", "size": "512x512"}, png("image")),
    ),
    "Open WebUI edits of several": (
        EDITS,
        form({"model": "acme/flux", "prompt": "a", "response_format": "b64_json"}, png("image[]"), png("image[]", BLUE))
    ),
    # danny-avila/LibreChat api/app/clients/tools/structured/OpenAIImageTools.js
    "LibreChat": (
        GENERATIONS,
        {
            "json": {
                "model": "gpt-image-1", "prompt": "a", "n": 1, "background": "auto", "output_format": "webp",
                "output_compression": 100, "quality": "auto", "size": "auto",
            }
        },
    ),
    "LibreChat edits": (
        EDITS,
        form({"model": "gpt-image-1", "prompt": "a", "quality": "auto", "size": "1024x1536"}, png("image[]")),
    ),
    # BerriAI/litellm litellm/proxy/image_endpoints/endpoints.py: its own routes, whose path may name the model
    "LiteLLM": ("/images/generations", {"json": {"model": "flux-tiny", "prompt": "a", "n": 1, "user": "u"}}),
    "LiteLLM in Azure's form": (
        "/openai/deployments/acme/flux/images/generations?api-version=2024-02-01",
        {"json": {"prompt": "a", "n": 1, "size": "1024x1024"}},
    ),
    "LiteLLM edits in Azure's form": (
        "/openai/deployments/gpt-image-1/images/edits",
        form({"prompt": "a", "model": "azure/other"}, png("image[]")),
    ),
    "Azure's first version": ("/openai/v1/images/edits?api-version=preview", form({"prompt": "a"}, png("image"))),
    # vercel/ai packages/openai/src/image/openai-image-model.ts; undefined fields are left out of its JSON
    "Vercel's AI SDK": (
        GENERATIONS,
        {
            "json": {
                "model": "dall-e-3", "prompt": "a", "n": 1, "size": "1024x1024", "style": "vivid", "quality": "hd",
                "response_format": "b64_json",
            }
        },
    ),
    "Vercel's AI SDK edits": (
        EDITS,
        form({"model": "gpt-image-1", "prompt": "a", "n": "1", "size": "1024x1024"}, ("image", BLOB)),
    ),
    "Vercel's AI SDK edits of several": (
        EDITS,
        form({"model": "gpt-image-1", "prompt": "a"}, ("image[]", BLOB), ("image[]", BLOB)),
    ),
    # langchain-ai/langchain libs/community/langchain_community/utilities/dalle_image_generator.py
    "LangChain": (
        GENERATIONS,
        {"json": {"prompt": "a", "n": 1, "size": "1024x1024", "model": "dall-e-2", "quality": "standard"}},
    ),
    # n8n-io/n8n packages/@n8n/nodes-langchain/nodes/vendors/OpenAi/v2/actions/image/{generate,edit}.operation.ts
    "n8n": (
        GENERATIONS,
        {
            "json": {
                "prompt": "a", "model": "dall-e-3", "response_format": "url", "quality": "hd", "size": "1792x1024",
                "style": "natural",
            }
        },
    ),
    "n8n edits": (
        EDITS,
        form(
            {
                "prompt": "a", "model": "gpt-image-1.5", "n": "1", "size": "1024x1024", "user": "user-12345",
                "background": "opaque", "input_fidelity": "low", "output_format": "png", "output_compression": "100",
                "quality": "auto",
            },
            png("image[]"),
        ),
    ),
    # comfyanonymous/ComfyUI comfy_api_nodes/nodes_openai.py
    "ComfyUI's node of DALL-E 3": (
        GENERATIONS,
        {
            "json": {
                "model": "dall-e-3", "prompt": "a", "quality": "standard", "size": "1024x1792", "style": "natural",
                "seed": 0,
            }
        },
    ),
    "ComfyUI's node of GPT Image": (
        GENERATIONS,
        {
            "json": {
                "model": "gpt-image-1", "prompt": "a", "quality": "low", "background": "auto", "n": 1,
                "seed": 2**31 - 1, "size": "1536x1024", "moderation": "low",
            }
        },
    ),
    "ComfyUI's node of GPT Image with images": (
        EDITS,
        form(
            {
                "model": "gpt-image-1.5", "prompt": "a", "quality": "low", "background": "opaque", "n": "1",
                "seed": "0", "size": "auto", "moderation": "low",
            },
            ("image[]", ("image_0.png", RED, "image/png")),
            ("image[]", ("image_1.png", BLUE, "image/png")),
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_request_as_the_program_sends_it(client: httpx.AsyncClient, backend: FakeBackend, name: str) -> None:
    backend.kind = FLUX2_KLEIN
    path, body = REQUESTS[name]
    reply = await client.post(path, **body)
    assert reply.status_code == 200, reply.text
    sent = body.get("json") or body["data"]
    (job,) = backend.jobs
    size = sent.get("size", "auto")
    assert size == "auto" or f"{job.width}x{job.height}" == size
    assert job.n == int(sent.get("n", 1))
    assert len(job.sources) == len(body.get("files", ()))
    for item in reply.json()["data"]:
        # Each of these programs takes b64_json, or url first; LangChain takes url alone.
        content = item["b64_json"] or item["url"].partition(",")[2]
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (job.width, job.height)
        assert item["url"] or name != "LangChain"


async def test_dalles_clients_read_a_url_or_base64(client: httpx.AsyncClient) -> None:
    for model, given, has in (
        ("dall-e-3", None, {"b64_json", "url"}),
        ("dall-e-3", "b64_json", {"b64_json"}),
        ("dall-e-3", "url", {"url"}),
        ("gpt-image-1", None, {"b64_json"}),
    ):
        reply = await client.post(GENERATIONS, json={"prompt": "a", "model": model, "response_format": given})
        (item,) = reply.json()["data"]
        assert {name for name in ("b64_json", "url") if item[name]} == has


async def test_the_paths_model_is_checked(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    reply = await client.post(
        "/openai/deployments/other/images/generations", json={"prompt": "a", "model": "flux-tiny"}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    for path in ("/openai/deployments//images/generations", "/openai/images/variations", "/deployments/a/images/edits"):
        assert (await client.post(path, json={"prompt": "a"})).json()["error"]["code"] == "unknown_url"
    assert not backend.jobs
    metrics = (await client.get("/metrics")).text
    assert 'flux_requests_total{model="flux-tiny",outcome="invalid",process="api",status_class="4xx"} 1.0' in metrics


def test_azures_client(base_url: str, backend: FakeBackend) -> None:
    with openai.AzureOpenAI(
        azure_endpoint=base_url.removesuffix("/v1"), api_version="2025-04-01-preview", api_key="unused", max_retries=0
    ) as client:
        assert client.images.generate(model="flux-tiny", prompt="a").data
        assert client.images.edit(model="acme/flux", image=RED, prompt="a").data
        with pytest.raises(openai.NotFoundError):
            client.images.generate(model="another", prompt="a")
    assert [len(job.sources) for job in backend.jobs] == [0, 1]


async def test_azures_key(tmp_path: Any, backend: FakeBackend) -> None:
    (tmp_path / "keys").write_text("one secret-1\n")
    settings = Settings.model_validate({"http": {"api_keys_file": str(tmp_path / "keys")}})
    app: FastAPI = create_app(settings, lambda: backend)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:
        for headers, status in (
            ({"api-key": "secret-1"}, 200),
            ({"api-key": "secret-2"}, 401),
            ({"Authorization": "Bearer secret-2", "api-key": "secret-1"}, 401),
            ({}, 401),
        ):
            assert (await client.post(GENERATIONS, json={"prompt": "a"}, headers=headers)).status_code == status
    assert [job.key_name for job in backend.jobs] == ["one"]
