"""All coordinators of the service, found by their actors' names, so that none is missed whichever replica is asked."""

import asyncio
from typing import Any

import ray

from app.cluster.group import COORDINATOR_NAME, NAMESPACE

ANSWER_SECONDS = 5.0
"""A part that does not answer within this time counts as not ready, and is left out of a scrape."""


async def call_all_coordinators(method: str, *args: object) -> list[Any]:
    """The answers of those coordinators that do answer."""
    named = await asyncio.to_thread(ray.util.list_named_actors, True)
    answers = await asyncio.gather(
        *(
            _ask(actor["name"], method, args)
            for actor in named
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{COORDINATOR_NAME}:")
        ),
        return_exceptions=True,
    )
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _ask(name: str, method: str, args: tuple[object, ...]) -> object:
    actor = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
    return await asyncio.wait_for(getattr(actor, method).remote(*args), ANSWER_SECONDS)
