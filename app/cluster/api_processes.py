"""The API's processes, where it runs as several: what one of them holds, any other can ask for."""

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from app.cluster.handles import answer_of_one, answers_of_all


class ApiProcesses:
    """All processes of the deployment whose ``handle`` this is; without one, this process alone."""

    def __init__(self, handle: DeploymentHandle | None = None) -> None:
        self._handle = handle

    @property
    def this(self) -> str:
        """This process's name."""
        return "api" if self._handle is None else serve.get_replica_context().replica_tag

    @property
    def is_alone(self) -> bool:
        """Whether there are no others to ask."""
        return self._handle is None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that does what only one may do; another becomes it when it ends."""
        return self._handle is None or serve.get_replica_context().rank.rank == 0

    async def ask(self, method: str, *args: object) -> list[Any]:
        """What they all, this one among them, answer to a call of `ImagesApi`; nothing while one of them hangs."""
        return [] if self._handle is None else await answers_of_all(self._handle, method, *args)

    async def ask_the_one(self, method: str, *args: object) -> Any:
        """What that process answers which has what is asked for, however long it takes; None when none has it."""
        return None if self._handle is None else await answer_of_one(self._handle, method, *args)
