"""Clients that ask for images all the time, and remember every answer that was not one.

A Kubernetes Service stops sending requests to a pod whose proxy is not ready; here each client looks for itself.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from types import TracebackType

import httpx

from tests.patience import ANSWER_S

PROMPT = "a red circle on a blue background"
MOST_REQUESTS = 5000
"""The load ends by itself, whatever becomes of the test."""


class Load:
    """``clients`` threads that go round ``urls``, with a pause between requests."""

    def __init__(self, urls: list[str], clients: int, pause_s: float) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._urls = urls
        self._seeds = itertools.count()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=ANSWER_S)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _ask(self) -> None:
        # No retries, and a new connection each time: what is lost must show.
        limits = httpx.Limits(max_keepalive_connections=0)
        with httpx.Client(timeout=300, trust_env=False, limits=limits) as client:
            while not self._stop.wait(self._pause_s):
                with self._lock:
                    seed = next(self._seeds)
                if seed >= MOST_REQUESTS:
                    return
                body = {"prompt": PROMPT, "seed": seed, "size": "64x64", "num_inference_steps": 4}
                url = self._ready(client, seed)
                try:
                    reply = client.post(f"{url}/v1/images/generations", json=body)
                    trouble = None if reply.status_code == 200 else f"{reply.status_code} {reply.text[:300]}"
                except httpx.HTTPError as error:
                    trouble = repr(error)
                with self._lock:
                    if trouble is None:
                        self.answered += 1
                    else:
                        self.failures.append(f"seed {seed} at {url}: {trouble}")

    def _ready(self, client: httpx.Client, turn: int) -> str:
        """The next URL whose proxy says that it is ready; the next one in any case when none does."""
        start = turn % len(self._urls)
        in_turn = self._urls[start:] + self._urls[:start]
        for url in in_turn:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/-/healthz", timeout=30).status_code == 200:
                    return url
        return in_turn[0]
