"""Replies of the proxies themselves: the envelope, when to ask again, and an id that is safe to send back."""

from __future__ import annotations

import json

import pytest

from app.api.proxy_replies import proxy_reply
from app.errors import UnavailableError


@pytest.mark.parametrize(("given", "kept"), [(b"mine", True), (b"", False), (b"a b", False), (b"x" * 129, False)])
def test_it_has_the_requests_id_or_a_new_one(given: bytes, kept: bool) -> None:
    scope = {"type": "http", "headers": [(b"x-request-id", given)]}
    reply = proxy_reply(UnavailableError("gone", retry_after_s=1.0), scope)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert json.loads(reply.body)["error"]["message"] == "gone"
    assert (reply.headers["x-request-id"] == given.decode()) == kept
    assert kept or len(reply.headers["x-request-id"]) == 32
