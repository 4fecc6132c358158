"""Several hosts on one machine: namespaces on a bridge, each with a loopback and processes of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORKS = "10.213"
PATIENCE_S = 30.0
AGAIN = 'trap exit TERM; until "$@"; do sleep 1; done'
"""As Kubernetes does with a pod's container: a node of Ray's gives itself thirty seconds to start."""


@dataclass(frozen=True)
class Host:
    """A network namespace with one address beside its own loopback, and processes that see only each other."""

    name: str
    address: str
    booted: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def boot(self, command: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
        """Run ``command`` as this host's first process, again when it fails; the others end with it.

        Args:
            folder: where this host sees an empty folder of its own, though the path is the same on all.
        """
        own = log.with_suffix("")
        own.mkdir()
        folder.mkdir(exist_ok=True)
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        alone += ["sh", "-c", f'mount --bind "$0" "$1" && shift && {AGAIN}', str(own), str(folder)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *alone, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.booted.append(process)

    def run(
        self, command: list[str], environment: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` beside what was booted, as an exec into a container does."""
        # The eldest is `unshare` itself, which stands outside of what it made.
        _, first, *_ = sorted(self._processes(), key=lambda process: process.create_time())
        inside = ["nsenter", "--target", str(first.pid), "--net", "--pid", "--mount", f"--wd={os.getcwd()}"]
        return subprocess.run(
            [*inside, *command], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def stop_everything(self) -> None:
        """End all processes of this host, asking first."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            processes = self._processes()
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(sign)
            psutil.wait_procs(processes, timeout=PATIENCE_S)
        for process in self.booted:
            process.wait(PATIENCE_S)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found


def why_not() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"{package} is not installed"
    if os.geteuid() != 0:
        return "namespaces need root"
    return None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other and this process by address; gone afterwards, with what they ran."""
    tag = f"fx{os.getpid() % 100_000}"
    network = _free_network()
    made = [Host(f"{tag}n{number}", f"{network}.{number}") for number in range(1, count + 1)]
    with contextlib.ExitStack() as cleanup:
        _ip("link", "add", tag, "type", "bridge")
        cleanup.callback(_ip, "link", "delete", tag)
        _ip("address", "add", f"{network}.254/24", "dev", tag)
        _ip("link", "set", tag, "up")
        for host in made:
            _ip("netns", "add", host.name)
            cleanup.callback(_ip, "netns", "delete", host.name)
            cleanup.callback(host.stop_everything)
            inside = ("netns", "exec", host.name, "ip")
            _ip("link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.name, "master", tag, "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")
        yield made


def _free_network() -> str:
    """The first three numbers of addresses that this machine has no route to.

    A test run that was killed leaves its bridge behind, and of two bridges with one network the older gets all packets.
    """
    taken = _ip("-4", "route", "show", "table", "all")
    return next(name for name in (f"{NETWORKS}.{number}" for number in range(256)) if f"{name}." not in taken)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
