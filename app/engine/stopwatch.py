"""The time between points of a device's work, without waiting for the device at each of them."""

from __future__ import annotations

import time
from itertools import pairwise

import torch


class Stopwatch:
    """Laps of a device's work. On a GPU they are the GPU's: events in its stream, and one wait when they are read."""

    def __init__(self, device: torch.device) -> None:
        """The first lap begins now."""
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []
        self.lap()

    def lap(self) -> None:
        """End a lap, and begin the next one."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds of each ended lap, once all of the device's work is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return [_seconds(begin, end) for begin, end in pairwise(self._marks)]


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
