"""Calls through Serve's handles that are cancelled together with the task that awaits them."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

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


PlanPart = TypeVar("PlanPart")


def remote(handle: DeploymentHandle, part: type[PlanPart]) -> PlanPart:
    """The ``part`` that a deployment holds, to be used as if it were in this process; coroutine methods only."""
    return cast(PlanPart, DeploymentProxy(handle))


class DeploymentProxy:
    """Turns a method's name into a call through the handle; each method's handle is made once."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._handle, name)

        async def call(*args: Any) -> Any:
            return await result_of(method.remote(*args))

        setattr(self, name, call)
        return call
