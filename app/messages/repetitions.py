"""How a request that comes again finds the images of the first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reservation:
    """A request that may come again.

    Attributes:
        token: drawn for it; its repetitions have the same.
        body: a digest of its body and of its API key's name.
        seed: of its first image.
        made_s: Unix time of its arrival.
    """

    token: str
    body: str
    seed: int
    made_s: float


@dataclass(frozen=True)
class Sharing:
    """How a repetition finds the images of a request.

    Attributes:
        token, body, seed, made_s: see `Reservation`.
        process: the API process that the request came to.
        keyed: it has an Idempotency-Key: its client may come again after it has left.
    """

    token: str
    body: str
    seed: int
    made_s: float
    process: str
    keyed: bool

    def image(self, index: int) -> str:
        """The name of the request's image ``index``, unique in the service."""
        return f"{self.token}/{index}"
