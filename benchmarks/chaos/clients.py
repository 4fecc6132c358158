"""Clients that ask again and again for images whose pixels are known, and what came of each request."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

TIMEOUT_S = 180.0
LEVELS = 1
"""A value of an image depends on what shared its batches by at most so much of 255."""
PAUSE_S = 0.2
"""Between a request that failed and the next of the same client."""


class Result(Enum):
    """How a request ended for its client."""

    RIGHT = "right"
    WRONG = "wrong"
    LOST = "lost"
    """It was under way when the fault came, and ended without an image."""
    REFUSED = "refused"
    """It came after the fault and ended without an image."""


@dataclass(frozen=True)
class Outcome:
    """One request: the kind of its client, when it was sent and answered (monotonic seconds), and how it ended."""

    client: str
    sent_s: float
    ended_s: float
    result: Result
    detail: str = ""


def pixels(encoded: str) -> np.ndarray:
    """(height, width, 3) of a file in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), dtype=np.int16)


Ask = Callable[[Mapping[str, Any]], str]
"""Sends a request's body and returns the image in base64; raises when there is none."""


@contextmanager
def plain(url: str) -> Iterator[Ask]:
    """A client that never asks twice."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as http:

        def ask(body: Mapping[str, Any]) -> str:
            reply = http.post("/v1/images/generations", json=dict(body))
            if reply.status_code != 200:
                raise RuntimeError(f"{reply.status_code}: {reply.text[:200]}")
            return str(reply.json()["data"][0]["b64_json"])

        yield ask


@contextmanager
def official(url: str) -> Iterator[Ask]:
    """OpenAI's client with the retries that it has by default."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", timeout=TIMEOUT_S) as client:

        def ask(body: Mapping[str, Any]) -> str:
            fields = dict(body)
            reply = client.images.generate(prompt=fields.pop("prompt"), extra_body=fields)
            return str((reply.data or [])[0].b64_json)

        yield ask


KINDS: Mapping[str, Callable[[str], AbstractContextManager[Ask]]] = {"official": official, "plain": plain}


@dataclass
class Crowd:
    """Clients of each kind, in threads of their own, from `start` to `stop`."""

    url: str
    bodies: list[dict[str, Any]]
    expected: list[np.ndarray]
    each: int = 2
    fault_s: float = float("inf")
    """When the fault came."""
    outcomes: list[Outcome] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Begin to ask."""
        for kind in KINDS:
            for number in range(self.each):
                thread = threading.Thread(target=self._run, args=(kind, number), daemon=True)
                thread.start()
                self._threads.append(thread)

    def stop(self) -> None:
        """Let every client have its last answer."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def right_since(self, moment_s: float) -> dict[str, int]:
        """Right images that came after ``moment_s``, by kind of client."""
        right = [one for one in list(self.outcomes) if one.result is Result.RIGHT and one.ended_s > moment_s]
        return {kind: sum(one.client == kind for one in right) for kind in KINDS}

    def _run(self, kind: str, number: int) -> None:
        turn = number
        with KINDS[kind](self.url) as ask:
            while not self._stop.is_set():
                choice = turn % len(self.bodies)
                outcome = self._ask(kind, ask, choice, time.monotonic())
                self.outcomes.append(outcome)
                turn += len(KINDS)
                if outcome.result in (Result.LOST, Result.REFUSED):
                    time.sleep(PAUSE_S)

    def _ask(self, kind: str, ask: Ask, choice: int, sent: float) -> Outcome:
        try:
            image = pixels(ask(self.bodies[choice]))
        except Exception as error:
            result = Result.LOST if sent < self.fault_s else Result.REFUSED
            return Outcome(kind, sent, time.monotonic(), result, f"{type(error).__name__}: {error}")
        expected = self.expected[choice]
        same = image.shape == expected.shape and int(np.abs(image - expected).max()) <= LEVELS
        return Outcome(kind, sent, time.monotonic(), Result.RIGHT if same else Result.WRONG)
