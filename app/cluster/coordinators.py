"""All coordinators of an application, found by their actors' names: any API process reaches those of all replicas."""

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from app.cluster.group import COORDINATOR_NAME, namespace
from app.cluster.handles import ANSWER_SECONDS

LOOKUP_SECONDS = 0.5
"""Without an answer of the GCS in this time, those that were known last are asked: they work without it."""

# Without the GCS a look-up hangs for a minute: one at a time, and not in the event loop's own threads.
_LOOKUP = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coordinators")


class Coordinators:
    """Those of one of Serve's applications; another one in the same cluster has its own."""

    def __init__(self, application: str = "") -> None:
        self._namespace = namespace(application)
        self._known: dict[str, Any] = {}

    async def call(self, method: str, *args: object) -> list[Any]:
        """The answers of those coordinators that answer within `ANSWER_SECONDS`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + ANSWER_SECONDS

        async def ask(coordinator: Any) -> object:
            async with asyncio.timeout_at(until):
                return await getattr(coordinator, method).remote(*args)

        async def ask_all(coordinators: dict[str, Any]) -> list[Any]:
            answers = await asyncio.gather(*map(ask, coordinators.values()), return_exceptions=True)
            return [answer for answer in answers if not isinstance(answer, BaseException)]

        lookup = loop.run_in_executor(_LOOKUP, self._find)
        try:
            await asyncio.wait([lookup], timeout=LOOKUP_SECONDS if self._known else ANSWER_SECONDS)
            asked = lookup.result() if lookup.done() else self._known
            answers = await ask_all(asked)
            if len(answers) < len(asked):  # another may be in the place of one that is gone
                await asyncio.wait([lookup], timeout=max(until - loop.time(), 0.0))
            if lookup.done():
                self._known = lookup.result()
                answers += await ask_all({name: each for name, each in self._known.items() if name not in asked})
            return answers
        finally:
            lookup.cancel()  # others wait behind it

    def _find(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if actor["namespace"] == self._namespace and actor["name"].startswith(f"{COORDINATOR_NAME}:"):
                with contextlib.suppress(ValueError):  # it ended in between
                    found[actor["name"]] = ray.get_actor(actor["name"], self._namespace)
        return found
