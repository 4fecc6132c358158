"""Calls through Serve's handles that end with whoever awaits them."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

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
