"""What makes a request the repetition of another: its key or id, and its body, whatever the bytes were."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.api.backend import RequestIdentity
from app.api.proxy_guard import WITHOUT_ID
from tests.api.edit_forms import RED
from tests.api.edit_forms import URL as EDITS
from tests.api.fake_backend import FakeBackend

URL = "/v1/images/generations"
BODY = {"prompt": "a red circle", "n": 2}


@pytest.fixture
async def identity(client: httpx.AsyncClient, backend: FakeBackend) -> Any:
    """Sends a request and gives what the backend is told."""

    async def sent(url: str = URL, **request: Any) -> RequestIdentity:
        request = request or {"json": BODY}
        reply = await client.post(url, **request)
        assert reply.status_code == 200, reply.text
        return backend.identities[-1]

    return sent


async def test_the_same_key_has_the_same_scope_whatever_the_body(identity: Any) -> None:
    headers = {"Idempotency-Key": '"a key"'}
    first = await identity(json=BODY, headers=headers)
    again = await identity(json={"n": 2, "prompt": "a red circle"}, headers=headers)
    assert (first, first.keyed, first.retried) == (again, True, False)
    other = await identity(json=BODY | {"n": 1}, headers=headers)
    assert other.scope == first.scope
    assert other.body != first.body
    assert (await identity(json=BODY, headers={"Idempotency-Key": "another"})).scope != first.scope


async def test_an_id_counts_together_with_the_body(identity: Any) -> None:
    headers = {"X-Request-Id": "mine"}
    first, again = [await identity(json=BODY, headers=headers) for _ in range(2)]
    assert first == again
    assert not first.keyed
    assert (await identity(json=BODY | {"n": 1}, headers=headers)).scope != first.scope
    assert (await identity()).scope == "", "its client calls it nothing"
    assert (await identity(json=BODY, headers={"X-Request-Id": "not a sane id"})).scope == ""


async def test_an_id_that_a_proxy_made_names_nothing(identity: Any) -> None:
    headers = {"X-Request-Id": "the-proxys-own", WITHOUT_ID: "1"}
    assert (await identity(json=BODY, headers=headers)).scope == ""
    assert (await identity(json=BODY, headers=headers | {"Idempotency-Key": "a"})).scope != ""


@pytest.mark.parametrize(("count", "retried"), [("0", False), ("1", True), ("2", True), ("one", False), ("", False)])
async def test_openais_clients_count_their_attempts(identity: Any, count: str, retried: bool) -> None:
    assert (await identity(json=BODY, headers={"x-stainless-retry-count": count})).retried == retried


async def test_a_form_is_the_same_with_another_boundary(identity: Any) -> None:
    forms = [{"data": {"prompt": "a"}, "files": {"image": ("red.png", RED, "image/png")}} for _ in range(2)]
    bodies = [
        (await identity(EDITS, **form, headers={"Content-Type": f"multipart/form-data; boundary={boundary}"})).body
        for form, boundary in zip(forms, ("one", "two"), strict=True)
    ]
    assert bodies[0] == bodies[1]
    other = await identity(EDITS, data={"prompt": "b"}, files=forms[0]["files"])
    assert other.body != bodies[0]


@pytest.mark.parametrize("key", [b"", b"a" * 256, b"caf\xe9"])
async def test_a_key_that_is_none_is_refused(client: httpx.AsyncClient, key: bytes) -> None:
    reply = await client.post(URL, json=BODY, headers=[(b"Idempotency-Key", key)])
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "Idempotency-Key")
