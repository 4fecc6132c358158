"""Several hosts on one machine: network namespaces on a bridge, each with a loopback that no other one reaches."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

NETWORK = "10.213.77"
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Host:
    """A network namespace with one address beside its own loopback."""

    name: str
    address: str

    def start(self, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Run ``command`` on this host, in a session of its own."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def stop_everything(self) -> None:
        """End all processes of this host, asking first."""
        for sign in (signal.SIGTERM, signal.SIGKILL):
            listed = _ip("netns", "pids", self.name).split()
            processes = []
            for pid in map(int, listed):
                with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                    processes.append(psutil.Process(pid))
                    os.kill(pid, sign)
            psutil.wait_procs(processes, timeout=PATIENCE_S)


def why_not() -> str | None:
    """Why this machine cannot have such hosts, or None."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """``count`` hosts that reach each other and this process by address; gone afterwards, with what they ran."""
    tag = f"fx{os.getpid() % 100_000}"
    made = [Host(f"{tag}n{number}", f"{NETWORK}.{number}") for number in range(1, count + 1)]
    with contextlib.ExitStack() as cleanup:
        _ip("link", "add", tag, "type", "bridge")
        cleanup.callback(_ip, "link", "delete", tag)
        _ip("address", "add", f"{NETWORK}.254/24", "dev", tag)
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


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
