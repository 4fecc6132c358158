from __future__ import annotations

from typing import Any

import pytest
import ray

from app.cluster.api_processes import ApiProcesses
from app.cluster.calibrator_calls import CalibratorCalls
from app.errors import RequestNotFoundError, UnavailableError


class Calibrator:
    """Stands for one: starting takes a while, the rest is known at once."""

    async def start(self, job: str) -> str:
        return f"started {job}"

    def status(self, calibration_id: str) -> str:
        return f"{calibration_id} here"


class Second(ApiProcesses):
    """The second of two processes; ``answer`` is what the first one says."""

    is_first = False

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.asked: list[tuple[object, ...]] = []
        self._answer = answer

    async def ask_the_one(self, method: str, *args: object) -> Any:
        self.asked.append((method, *args))
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


async def test_the_first_process_asks_its_own() -> None:
    calls: Any = CalibratorCalls(Calibrator(), ApiProcesses())  # type: ignore[arg-type]
    assert await calls.ask("start", "a") == "started a"
    assert await calls.ask("status", "a") == "a here"


async def test_another_process_asks_the_first() -> None:
    first = Second("a there")
    calls: Any = CalibratorCalls(Calibrator(), first)  # type: ignore[arg-type]
    assert await calls.ask_here("status", "a") is None
    assert await calls.ask("status", "a") == "a there"
    assert first.asked == [("ask_calibrator", "status", "a")]


async def test_its_refusal_is_this_ones() -> None:
    refusal = ray.exceptions.RayTaskError("ask_calibrator", "trace", RequestNotFoundError("no calibration 'a'"))
    calls: Any = CalibratorCalls(Calibrator(), Second(refusal))  # type: ignore[arg-type]
    with pytest.raises(RequestNotFoundError, match="no calibration 'a'"):
        await calls.ask("status", "a")


async def test_while_it_restarts_clients_ask_again() -> None:
    calls: Any = CalibratorCalls(Calibrator(), Second(None))  # type: ignore[arg-type]
    with pytest.raises(UnavailableError, match="restarting; ask again"):
        await calls.ask("status", "a")
