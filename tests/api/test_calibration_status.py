"""A calibration that is followed: its changes as events, an end that ends the stream, and a client that leaves."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx
import pytest

from app.api import calibration_status
from app.api.app import create_app
from app.messages.calibration import CalibrationStatus
from app.settings import HttpSettings, Settings
from tests.api.fake_backend import FakeBackend
from tests.api.sse import events_of

URL = "/v1/calibrations/calibration-1"
STATUS = CalibrationStatus("calibration-1", "running", "record", 0, 20, 0.0)
DONE = replace(STATUS, state="done", phase="try", runs=20, profile="p@1")


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_status, "LOOK_S", 0.001)


class Calibrating(FakeBackend):
    """Has one calibration, at each look in the next of ``states`` and then in the last; one may be an error."""

    def __init__(self, *states: CalibrationStatus | Exception) -> None:
        super().__init__()
        self.looks = 0
        self._states = states

    async def calibration(self, calibration_id: str) -> CalibrationStatus:
        state = self._states[min(self.looks, len(self._states) - 1)]
        self.looks += 1
        if isinstance(state, Exception):
            raise state
        return state


def client_of(backend: FakeBackend, heartbeat_s: float = 10.0) -> httpx.AsyncClient:
    settings = Settings(http=HttpSettings(heartbeat_s=heartbeat_s))
    transport = httpx.ASGITransport(create_app(settings, lambda: backend))
    return httpx.AsyncClient(transport=transport, base_url="http://service")


async def test_each_change_is_an_event_and_the_end_is_the_last() -> None:
    half = replace(STATUS, runs=10, phase="probe")
    async with client_of(Calibrating(STATUS, STATUS, half, half, DONE)) as client:
        response = await client.get(URL, params={"stream": "true"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    events = events_of(response.text)
    assert [(event["type"], event["progress"], event["phase"]) for event in events] == [
        ("calibration.running", 0.0, "record"),
        ("calibration.running", 0.5, "probe"),
        ("calibration.done", 1.0, "try"),
    ]
    assert events[-1]["profile"] == "p@1"


@pytest.mark.parametrize("state", ["cancelled", "failed"])
async def test_any_end_ends_it(state: str) -> None:
    backend = Calibrating(STATUS, replace(STATUS, state=state, message="why"))
    async with client_of(backend) as client:
        last = events_of((await client.get(URL, headers={"Accept": "text/event-stream"})).text)[-1]
    assert (last["type"], last["status"], last["message"]) == (f"calibration.{state}", state, "why")
    assert backend.looks == 2


@pytest.mark.parametrize(
    ("accept", "query", "streamed"),
    [
        ("text/event-stream", {}, True),
        ("text/event-stream, application/json", {}, True),
        ("application/json, text/event-stream;q=0.5", {}, False),
        ("*/*", {}, False),
        ("text/event-stream", {"stream": "false"}, False),
        ("application/json", {"stream": "true"}, True),
    ],
)
async def test_who_gets_events(accept: str, query: dict[str, str], streamed: bool) -> None:
    async with client_of(Calibrating(DONE)) as client:
        response = await client.get(URL, params=query, headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream") == streamed
    if not streamed:
        assert (response.json()["status"], response.json()["progress"]) == ("done", 1.0)


async def test_what_is_wrong_from_the_start_has_its_status() -> None:
    async with client_of(FakeBackend()) as client:
        missing = await client.get(URL, params={"stream": "true"})
        wrong = await client.get(URL, params={"stream": "maybe"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "calibration_not_found")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "stream")


async def test_a_later_error_is_the_last_event() -> None:
    async with client_of(Calibrating(STATUS, RuntimeError("secret"))) as client:
        text = (await client.get(URL, params={"stream": "true"})).text
    first, last = events_of(text)
    assert (first["type"], last["type"], last["error"]["code"]) == ("calibration.running", "error", "internal_error")
    assert "secret" not in text


async def test_silence_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_status, "LOOK_S", 0.2)
    async with client_of(Calibrating(STATUS, DONE), heartbeat_s=0.01) as client:
        text = (await client.get(URL, params={"stream": "true"})).text
    assert text.count(": still at work\n\n") >= 2
    assert len(events_of(text)) == 2


def test_no_look_follows_once_the_client_is_gone(
    base_url: str, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed = Calibrating(STATUS)
    monkeypatch.setattr(backend, "calibration", followed.calibration)
    with httpx.Client(timeout=60) as client, client.stream("GET", f"{base_url}{URL[3:]}?stream=true") as reply:
        assert next(reply.iter_lines()) == "event: calibration.running"
    until = time.monotonic() + 60
    before = -1
    while before != followed.looks:
        assert time.monotonic() < until, "it is still looked at"
        before = followed.looks
        time.sleep(0.1)


def test_it_is_done_when_it_says_so() -> None:
    assert replace(STATUS, runs=30).progress < 1.0, "more runs than were expected"
    assert replace(STATUS, runs=5).progress == 0.25
    assert replace(STATUS, state="done", runs=5).progress == 1.0
