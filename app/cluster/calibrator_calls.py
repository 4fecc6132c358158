"""Calls of the calibrator from any API process: the first of them has it, the others ask that one."""

from collections.abc import Awaitable
from typing import Literal

import ray

from app.cluster.api_processes import ApiProcesses
from app.cluster.calibrator import Calibrator
from app.cluster.client_errors import unwrap_ray_error
from app.errors import UnavailableError
from app.messages.calibration import CalibrationJob, CalibrationStatus

Method = Literal["start", "status", "cancel"]


class CalibratorCalls:
    """The service's one calibrator: ``calibrator`` if this is the first of ``apis``, else the first one's."""

    def __init__(self, calibrator: Calibrator, apis: ApiProcesses) -> None:
        self._calibrator = calibrator
        self._apis = apis

    async def ask(self, method: Method, argument: CalibrationJob | str) -> CalibrationStatus:
        """What the calibrator says: the other processes' have none under way.

        Raises:
            UnavailableError: the process that has it is restarting.
            ServiceError: its refusal.
        """
        answer = await self.ask_here(method, argument)
        if answer is None:
            try:
                answer = await self._apis.ask_the_one("ask_calibrator", method, argument)
            except ray.exceptions.RayTaskError as error:  # its refusal
                raise unwrap_ray_error(error) from error
        if answer is None:
            raise UnavailableError("the API process that calibrates is restarting; ask again")
        return answer

    async def ask_here(self, method: Method, argument: CalibrationJob | str) -> CalibrationStatus | None:
        """What this process's calibrator says; None where another process calibrates."""
        if not self._apis.is_first:
            return None
        answer: CalibrationStatus | Awaitable[CalibrationStatus] = getattr(self._calibrator, method)(argument)
        return await answer if isinstance(answer, Awaitable) else answer
