"""`lora` in requests."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from PIL import Image

from app.api.app import create_app
from app.api.loras import may_name_loras, resolve_loras
from app.api.schemas import LoraBody
from app.errors import InvalidRequestError
from app.messages.loras import LoraFile, LoraListing, LoraUse
from app.settings import Settings
from tests.api.fake_backend import FakeBackend
from tests.api.scrape import samples_of

STYLE = LoraFile("styles/watercolour", "0123456789ab", 8, 4000)
SHAPE = LoraFile("star", "ba9876543210", 4, 3000)
LISTING = LoraListing({one.name: one for one in (STYLE, SHAPE)}, {"broken": "it has no matrices"})
URL = "/v1/images/generations"


@pytest.fixture
def settings() -> Settings:
    return Settings(loras="adapters", max_loras=2, max_lora_scale=2.0, loras_bytes=6000)


@pytest.fixture
def backend() -> FakeBackend:
    backend = FakeBackend()
    backend.listing = backend.folder = LISTING
    return backend


def body(*lora: Any, **fields: Any) -> dict[str, Any]:
    return {"prompt": "a circle", "seed": 7, "lora": list(lora), **fields}


async def test_a_request_names_adapters(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    reply = await client.post(URL, json=body({"name": "styles/watercolour", "scale": -0.5}))
    assert reply.status_code == 200, reply.text
    assert backend.jobs[0].loras == (LoraUse("styles/watercolour", -0.5, "0123456789ab", 4000),)
    assert reply.json()["data"][0]["lora"] == [{"name": "styles/watercolour", "scale": -0.5, "digest": "0123456789ab"}]
    assert reply.headers["X-Lora"] == "styles/watercolour:-0.5"


async def test_the_scale_is_1_by_default(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    await client.post(URL, json=body({"name": "star"}))
    await client.post(URL, json=body({"name": "star", "scale": None}))
    assert [job.loras[0].scale for job in backend.jobs] == [1.0, 1.0]


async def test_a_request_without_adapters_has_none(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    for fields in (body(), {"prompt": "a"}, body() | {"lora": None}):
        reply = await client.post(URL, json=fields)
        assert reply.json()["data"][0]["lora"] == []
        assert "X-Lora" not in reply.headers
    assert [job.loras for job in backend.jobs] == [(), (), ()]


async def test_an_edit_names_adapters_as_json_in_its_form(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    file = io.BytesIO()
    Image.new("RGB", (128, 128)).save(file, "PNG")
    fields = {"prompt": "a", "lora": json.dumps([{"name": "star", "scale": 0.25}])}
    reply = await client.post("/v1/images/edits", data=fields, files={"image": file.getvalue()})
    assert reply.status_code == 200, reply.text
    assert backend.jobs[0].loras == (LoraUse("star", 0.25, "ba9876543210", 3000),)


@pytest.mark.parametrize(
    ("lora", "status", "param", "words"),
    [
        ([{"name": "sta"}], 404, "lora.0.name", "did you mean 'star'?"),
        ([{"name": "nothing like it"}], 404, "lora.0.name", "GET /v1/loras lists"),
        ([{"name": "star"}, {"name": "broken"}], 404, "lora.1.name", "cannot be used: it has no matrices"),
        ([{"name": "star"}, {"name": "star"}], 400, "lora.1.name", "named twice"),
        ([{"name": "star", "scale": 2.5}], 400, "lora.0.scale", "from -2 to 2"),
        ([{"name": "star", "scale": "1"}], 400, "lora.0.scale", "valid number"),
        ([{"name": "star"}] * 3, 400, "lora", "at most 2"),
        ([{"name": "star"}, {"name": "styles/watercolour"}], 400, "lora", "loras_bytes"),
        ([{"scale": 1}], 400, "lora.0.name", "required"),
        (["star"], 400, "lora.0", "dictionary"),
        ("star", 400, "lora", "list"),
        ([{"name": "star", "weight": 1}], 400, "lora.0.weight", "did you mean 'lora.0.scale'?"),
        ([{"path": "star"}], 400, "lora.0.name", "required"),
        ([{"name": "star", "scael": 1}], 400, "lora.0.scael", "did you mean 'lora.0.scale'?"),
        ([{"name": "star", "weight": "x"}], 400, "lora.0.weight", "valid names: lora.0.name, lora.0.scale"),
    ],
)
async def test_what_is_refused(client: httpx.AsyncClient, lora: Any, status: int, param: str, words: str) -> None:
    reply = await client.post(URL, json={"prompt": "a", "lora": lora})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param), error
    assert words in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("loras", [{"name": "star"}], "did you mean 'lora'?"),
        ("lora_weights", [{"name": "sta"}], "did you mean 'star'?"),
        ("lora_scale", 0.5, "stands beside its name in lora"),
        ("lora[][name]", "star", "JSON in one field"),
    ],
)
async def test_other_programs_names(client: httpx.AsyncClient, field: str, value: Any, words: str) -> None:
    reply = await client.post(URL, json={"prompt": "a", field: value})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_several_adapters_in_their_order() -> None:
    asked = [LoraBody(name="star"), LoraBody(name="styles/watercolour", scale=0.5)]
    uses = resolve_loras(asked, LISTING, Settings(loras="adapters"))
    assert [(use.name, use.digest, use.scale) for use in uses] == [
        ("star", "ba9876543210", 1.0),
        ("styles/watercolour", "0123456789ab", 0.5),
    ]


def test_without_a_folder_every_adapter_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="setting loras") as refused:
        resolve_loras([LoraBody(name="star")], LISTING, Settings())
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "loras_not_configured", "lora")
    assert resolve_loras([], LISTING, Settings()) == ()


def test_a_request_that_names_none_costs_no_look_at_the_listing() -> None:
    assert may_name_loras({"LoRAs": []}, Settings(loras="adapters"))
    assert not may_name_loras({"prompt": "a lora"}, Settings(loras="adapters"))
    assert not may_name_loras({"lora": []}, Settings())


async def test_the_document_limits_adapters(app: FastAPI) -> None:
    document = app.openapi()
    schema = {"$ref": "#/components/schemas/ImagesRequest", "components": document["components"]}
    allows = Draft202012Validator(schema).is_valid
    assert allows(body({"name": "star", "scale": -2}))
    assert not allows(body({"name": "star", "scale": -2.5}))
    assert not allows(body({"name": "a"}, {"name": "b"}, {"name": "c"}))
    assert not allows(body({"name": "star", "weight": 1}))
    without = create_app(Settings(), FakeBackend).openapi()
    assert without["components"]["schemas"]["ImagesRequest"]["properties"]["lora"]["anyOf"][0]["maxItems"] == 0


async def test_requests_are_counted_by_adapter(client: httpx.AsyncClient) -> None:
    await client.post(URL, json=body({"name": "star"}))
    await client.post(URL, json=body({"name": "unheard of"}))
    counted = {
        (dict(labels)["lora"], dict(labels)["outcome"]): value
        for (name, labels), value in (await samples_of(client)).items()
        if name == "flux_lora_requests_total"
    }
    assert counted == {("star", "ok"): 1.0}
