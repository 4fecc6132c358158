"""Bounds the memory of bodies that arrive in one process, and of uploaded images until the VAE has encoded them."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from app.errors import BusyError

_NEWEST_SHARE = 0.2


class ImageMemory:
    """Counts the bytes of bodies that arrive and of images decoded or waiting; beyond ``limit`` a 429. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._claim_s = 1.0  # running mean of how long a claim lasts
        # Reentrant: arrays may be freed, and so give their bytes back, at any point of any thread.
        self._lock = threading.RLock()

    @contextmanager
    def claim(self, nbytes: int = 0) -> Iterator[Claim]:
        """``nbytes`` and what the claim grows by, for the time of the block.

        Raises:
            BusyError: there is no room for so much beside what is held.
        """
        started, claim = time.monotonic(), Claim(self)
        try:
            claim.grow(nbytes)
            yield claim
        finally:
            self._add(-claim.nbytes)
            self._claim_s += _NEWEST_SHARE * (time.monotonic() - started - self._claim_s)

    def hold(self, array: np.ndarray) -> None:
        """Count ``array`` for as long as it lives.

        Raises:
            BusyError: there is no room for it.
        """
        self.take(array.nbytes)
        weakref.finalize(array, self._add, -array.nbytes)

    def take(self, nbytes: int) -> None:
        """Count ``nbytes`` more; see `claim` and `hold`, which give them back."""
        with self._lock:
            if self.held + nbytes > self.limit:
                raise BusyError(
                    self._claim_s,
                    "the bodies and images of other requests fill http.max_decoded_bytes; ask again later",
                )
            self.held += nbytes

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self.held += nbytes


class Claim:
    """What one piece of work holds of an `ImageMemory`."""

    def __init__(self, memory: ImageMemory) -> None:
        self.nbytes = 0
        self._memory = memory

    def grow(self, nbytes: int) -> None:
        """Hold ``nbytes`` more.

        Raises:
            BusyError: there is no room for them.
        """
        self._memory.take(nbytes)
        self.nbytes += nbytes
