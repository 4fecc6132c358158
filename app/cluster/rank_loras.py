"""A rank's adapters are read in a thread of their own, so that no step waits for a disk."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.engine.lora import Loras


class RankLoras:
    """Loads and drops adapters, one after another in the order of the calls, which do not wait for it."""

    def __init__(self, loras: "Loras") -> None:
        self._loras = loras
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lora")
        self._loads: dict[tuple[str, str], Future[None]] = {}

    def load(self, name: str, digest: str) -> bool:
        """Begin to load an adapter, unless that has begun; whether it is loaded.

        Raises:
            LoraError: it could not be; the next call tries again.
        """
        content = name, digest
        if content not in self._loads:
            self._loads[content] = self._thread.submit(self._loras.load, name, digest)
        if not self._loads[content].done():
            return False
        if self._loads[content].exception() is not None:
            self._loads.pop(content).result()
        return True

    def drop(self, name: str, digest: str) -> None:
        """Free an adapter that no row uses, once what was asked for before is done."""
        self._loads.pop((name, digest), None)
        self._thread.submit(self._loras.drop, name, digest)
