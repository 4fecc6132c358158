"""What is done to a running service: its processes killed or stopped, its disk filled, its weights cut short."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from benchmarks.chaos.victims import VICTIMS
from scripts.serve_process import Service

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FILLING = 1 << 20
STARTING = ("__init__", "initialize")
"""Methods that a process's title names while it starts, of Ray's actors and of Serve's replicas."""


@dataclass(frozen=True)
class Served:
    """A running service and the folder with its files.

    Attributes:
        folder: has ``model``, a copy of the checkpoint, and as root ``ray`` and ``profiles``, small file systems.
        parts: how many processes it has, by name of the victim; with a spare group, two groups.
    """

    service: Service
    folder: Path
    parts: Mapping[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether all has started, spares and the successors of what was killed: else a kill is one in a recovery.

        The processes are looked at, since Serve takes a second to note that one is gone.
        """
        processes = self.service.processes()
        try:
            started = {name: sum(map(_has_started, VICTIMS[name].find(processes))) for name in self.parts}
        except psutil.NoSuchProcess:
            return False
        return started == self.parts and self.service.ready()

    def process(self, victim: str, number: int) -> psutil.Process:
        """The process of a kind, counted from the oldest.

        Raises:
            LookupError: the service has no such process.
        """
        found = VICTIMS[victim].find(self.service.processes())
        if len(found) <= number:
            raise LookupError(f"the service has {len(found)} processes {VICTIMS[victim].title!r}, asked for {number}")
        return found[number]


def _has_started(process: psutil.Process) -> bool:
    title = " ".join(process.cmdline())
    return not any(method in title for method in STARTING)


class Fault(Protocol):
    """Something that is done to a service; ``str`` names it in the table."""

    @property
    def kind(self) -> str:
        """What it does, for the goals."""

    def commit(self, served: Served) -> None:
        """Do it; of what lasts a while, return when it is over."""


@dataclass(frozen=True)
class Kill:
    """SIGKILL to one process."""

    victim: str
    number: int = 0

    @property
    def kind(self) -> str:
        return self.victim

    def __str__(self) -> str:
        return f"{self.victim} {self.number} killed" if self.victim == "rank" else f"{self.victim} killed"

    def commit(self, served: Served) -> None:
        served.process(self.victim, self.number).kill()


@dataclass(frozen=True)
class Pause:
    """SIGSTOP to one process, and after ``seconds`` SIGCONT."""

    victim: str
    seconds: float

    @property
    def kind(self) -> str:
        return "pause"

    def __str__(self) -> str:
        return f"{self.victim} stopped for {self.seconds:g} s"

    def commit(self, served: Served) -> None:
        process = served.process(self.victim, 0)
        process.send_signal(signal.SIGSTOP)
        time.sleep(self.seconds)
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have been given up and replaced
            process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class FullDisk:
    """The file system of a folder is full for ``seconds``."""

    name: str
    seconds: float

    @property
    def kind(self) -> str:
        return "disk"

    def __str__(self) -> str:
        return f"disk of the {self.name} folder full for {self.seconds:g} s"

    def commit(self, served: Served) -> None:
        path = served.folder / self.name / "filling"
        try:
            with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(FILLING))
            time.sleep(self.seconds)
        finally:
            path.unlink()


@dataclass(frozen=True)
class CutWeights:
    """The transformer's file lacks its end for ``seconds``, in which a rank is killed; then it is whole again."""

    seconds: float

    @property
    def kind(self) -> str:
        return "weights"

    def __str__(self) -> str:
        return f"rank killed while the weights are cut short for {self.seconds:g} s"

    def commit(self, served: Served) -> None:
        path = served.folder / "model" / WEIGHTS
        whole = path.read_bytes()
        os.truncate(path, len(whole) - 1000)
        try:
            Kill("rank").commit(served)
            time.sleep(self.seconds)
        finally:
            path.write_bytes(whole)
