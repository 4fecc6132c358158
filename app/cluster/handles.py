"""Calls through Serve's handles that are cancelled together with the task that awaits them."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from app.errors import UnavailableError

logger = logging.getLogger(__name__)

TRIES = 4
"""How often a call is made whose process dies each time: it may be the call that kills it."""
BETWEEN_TRIES_S = 0.1
"""For Serve's router to take note of the death; it then holds the call until there is another process."""

T = TypeVar("T")

ANSWER_SECONDS = 1.5
"""A part that does not answer within this time counts as not ready, and is left out of a scrape."""

# Serve types what `remote` gives as the union of both, whatever the handle's options are.
Response = DeploymentResponse[Any] | DeploymentResponseGenerator[Any]


async def result_of(response: Response) -> Any:
    """The call's result. Serve ends calls with the request that they serve, but not with a single task of it."""
    assert isinstance(response, DeploymentResponse)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


async def repeated(call: Callable[[], Awaitable[T]]) -> T:
    """The result of ``call``, which is made again when the process that worked on it dies; for calls without effects.

    Raises:
        UnavailableError: that happened `TRIES` times.
    """
    for _ in range(TRIES):
        try:
            return await call()
        except ray.exceptions.RayActorError as error:
            logger.warning("a part of the service died, its call is made again: %s", type(error).__name__)
            await asyncio.sleep(BETWEEN_TRIES_S)
    raise UnavailableError(f"a part of the service died {TRIES} times on this request; ask again")


async def items_of(response: Response) -> AsyncGenerator[Any, None]:
    """The items of a streaming call; closing the generator early ends the call."""
    assert isinstance(response, DeploymentResponseGenerator)
    finished = False
    try:
        async for item in response:
            yield item
        finished = True
    finally:
        if not finished:
            response.cancel()


async def answers_of_all(handle: DeploymentHandle, method: str, *args: object) -> list[Any]:
    """What every replica of a deployment answers; those that fail are left out, and all while one of them hangs."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            answers = await handle.broadcast(method, *args).results_async(return_exceptions=True)
    except (TimeoutError, ray.exceptions.RayError, RayServeException):
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def answer_of_one(handle: DeploymentHandle, method: str, *args: object) -> Any:
    """What the one replica answers that has what is asked for, however long it takes; None when none has it.

    Raises:
        ray.exceptions.RayTaskError: what that replica raised.
    """
    try:
        answers = await handle.broadcast(method, *args).results_async(return_exceptions=True)
    except (ray.exceptions.RayError, RayServeException):
        return None
    found = [one for one in answers if one is not None and not isinstance(one, BaseException)]
    raised = [one for one in answers if isinstance(one, ray.exceptions.RayTaskError)]
    if raised and not found:
        raise raised[0]
    return found[0] if found else None


class DeploymentProxy:
    """What a deployment holds, to be used as if it were in this process; coroutine methods only.

    Its methods have no effects, so that a call is made again when the deployment's process dies. Each method's handle
    is made once.

    Attributes:
        handle: of the deployment, for what all of its processes are asked.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self.handle, name)

        async def call(*args: Any) -> Any:
            return await repeated(lambda: result_of(method.remote(*args)))

        setattr(self, name, call)
        return call
