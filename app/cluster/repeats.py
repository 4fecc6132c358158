"""Requests that come again: they get the seed of the first one, and share its images."""

import time
import uuid
from dataclasses import replace
from http import HTTPStatus

from ray.serve.handle import DeploymentHandle

from app.api.backend import ImagesJob, RequestIdentity
from app.cluster.api_processes import ApiProcesses
from app.cluster.handles import answers_of_all
from app.errors import InvalidRequestError
from app.messages.repetitions import Reservation, Sharing


class Repeats:
    """Asks the replicas, which outlive an API process, for the request that another one repeats."""

    def __init__(self, replica: DeploymentHandle, apis: ApiProcesses) -> None:
        self._replica = replica
        self._apis = apis

    async def reserve(self, job: ImagesJob, identity: RequestIdentity) -> ImagesJob:
        """See `app.api.backend.Backend`."""
        offered = Reservation(uuid.uuid4().hex, identity.body, job.seed, time.time())
        found = await self._first(offered, identity)
        if found.body != identity.body:
            raise InvalidRequestError(
                "this Idempotency-Key came with another request lately; send a new key with each new request",
                param="Idempotency-Key",
                code="idempotency_key_reused",
                status=HTTPStatus.UNPROCESSABLE_ENTITY,
            )
        sharing = Sharing(found.token, found.body, found.seed, found.made_s, self._apis.this, keyed=identity.keyed)
        return replace(job, seed=found.seed, sharing=sharing, repeats=found.token != offered.token)

    async def _first(self, offered: Reservation, identity: RequestIdentity) -> Reservation:
        known: list[Reservation] = []
        if identity.scope:
            known = await answers_of_all(self._replica, "reserve", identity.scope, offered)
        # Each group keeps its own list; the oldest is the one that all take.
        found = min(known, key=lambda one: (one.made_s, one.token), default=offered)
        if found.token == offered.token and identity.retried and not identity.keyed:
            found = await self._orphan(identity.body) or offered
        return found

    async def _orphan(self, body: str) -> Reservation | None:
        """A request with this body whose API process died: one for each retry, since equal bodies are no same request.

        OpenAI's clients say that they retry, and not what.
        """
        living = set(await self._apis.ask("name"))
        if not living:
            return None
        lost = {one for each in await answers_of_all(self._replica, "orphans", body, living) for one in each}
        for one in sorted(lost, key=lambda one: (one.made_s, one.token)):
            if any(await answers_of_all(self._replica, "claim", one.token, living, self._apis.this)):
                return one
        return None
