"""The processes of a service, by what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Victim:
    """A kind of process: the begin of its title, or its program's name."""

    name: str
    title: str

    def find(self, processes: Sequence[int]) -> list[psutil.Process]:
        """Those among ``processes`` (pids) that are of this kind, oldest first: spares come after those at work."""
        found = []
        for pid in processes:
            try:
                process = psutil.Process(pid)
                shown = process.cmdline()
                if shown and (shown[0].startswith(self.title) or shown[0].endswith(f"/{self.title}")):
                    found.append((process.create_time(), pid, process))
            except psutil.Error:
                continue  # it ended in between
        return [process for *_, process in sorted(found)]


VICTIMS = {
    victim.name: victim
    for victim in (
        Victim("rank", "ray::Rank"),
        Victim("coordinator", "ray::Coordinator"),
        Victim("replica", "ray::ServeReplica:flux:FluxReplica"),
        Victim("api", "ray::ServeReplica:flux:ImagesApi"),
        Victim("encoder", "ray::ServeReplica:flux:PromptEncoder"),
        Victim("decoder", "ray::ServeReplica:flux:ImageDecoder"),
        Victim("proxy", "ray::ProxyActor"),
        Victim("controller", "ray::ServeController"),
        Victim("gcs", "gcs_server"),
    )
}
