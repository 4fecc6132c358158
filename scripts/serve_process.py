"""``serve run`` as a child process with its own Ray: start it, watch it, and stop all of its processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_STARTING = "starting Ray"
LATE = "The current node timed out during startup"
"""What Ray says when its start takes more than thirty seconds, which no setting changes."""
TRIES = 3
"""How often Ray is started at most, on a machine that is too busy for it."""
PATIENCE_S = 5.0  # for processes to end, by themselves and after SIGTERM
_DASHBOARD = re.compile(r"View the dashboard at (?:\x1b\[[0-9;]*m)*(https?://)?([\w.-]+:\d+)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class DemoError(Exception):
    """An error to show to the user of the demo."""


def open_url(request: urllib.request.Request | str, timeout_s: float) -> Any:
    """The open response."""
    # Without the environment's proxy, which would not reach this machine's loopback.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def address(config: dict[str, Any]) -> tuple[str, int]:
    """Host and port on which a Serve config listens; Serve's own defaults where it names none."""
    options = config.get("http_options") or {}
    return options.get("host", "127.0.0.1"), int(options.get("port", 8000))


def check_port(host: str, port: int) -> None:
    """Raise if another service listens there: the demo would talk to that one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"cannot listen on {host}:{port} ({error.strerror}). Is another demo or service running? Stop it, "
                f"choose a free port with --port, or ask the running service with --url http://{host}:{port}"
            ) from None


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def other_ray_processes() -> list[int]:
    """Ray nodes that already run on this machine."""
    return [pid for pid, name, _ in _processes() if name in ("raylet", "gcs_server")]


def _processes() -> Iterator[tuple[int, str, int]]:
    """(pid, name, session id) of every living process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            head, _, tail = (folder / "stat").read_text().rpartition(")")
            state, _, _, session = tail.split()[:4]
            if state != "Z":
                yield int(folder.name), head.partition("(")[2], int(session)


def reason(message: str) -> str:
    """The innermost error in a message that may contain nested tracebacks."""
    lines = _COLOURS.sub("", message).strip().splitlines()
    errors = [index for index, line in enumerate(lines) if re.match(r"[\w.]+: ", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines)


class Service:
    """``serve run`` in its own session, with its own Ray."""

    def __init__(self, command: list[str], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self._command = command
        self._token = secrets.token_hex(16)
        self._applications: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._tries_left = TRIES

    def start(self) -> None:
        """Start it; from here on ``stop`` must be called."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._launch()
        threading.Thread(target=self._poll_applications, daemon=True).start()

    def _launch(self) -> None:
        self._tries_left -= 1
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(paths),
                    "RAY_USAGE_STATS_ENABLED": "0",
                    # The dashboard and job submission of this Ray need the token.
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": self._token,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach only the demo, which then stops the service in order.
                start_new_session=True,
            )

    def check(self) -> None:
        """Raise if the service failed; ``serve run`` itself keeps running after a failed deployment.

        Where Ray was too slow for its own limit, on a busy machine, it is started again.
        """
        code = self._child.poll() if self._child else None
        if code is not None and self._tries_left and LATE in self.log_tail():
            self._end_processes()
            self._launch()
        elif code is not None:
            raise DemoError(f"`serve run` ended with exit code {code}. The end of {self.log}:\n{self.log_tail()}")
        for name, application in self._applications.items():
            if application["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
                reasons = {
                    application["message"]: "",
                    **{
                        details["message"]: f"{deployment}: "
                        for deployment, details in application["deployments"].items()
                        if details["status"] in ("DEPLOY_FAILED", "UNHEALTHY") and details["message"]
                    },
                }
                lines = [f"  {prefix}{reason(message)}" for message, prefix in reasons.items()]
                lines.append(f"{self.log} has the full log.")
                raise DemoError(f"application {name!r} is {application['status']}:\n" + "\n".join(lines))

    def progress(self) -> str:
        """One line on which deployments are up and which are starting."""
        parts = []
        for application in self._applications.values():
            for name, details in application["deployments"].items():
                up = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
                goal = max(details["target_num_replicas"], 1)
                parts.append(f"{name} {'up' if up >= goal else 'starting'}")
            if not parts:
                parts.append("building the application")
        return ", ".join(parts) or _STARTING

    def ready(self) -> bool:
        """Whether the service is healthy and all of its deployments are running."""
        if any(application["status"] != "RUNNING" for application in self._applications.values()):
            return False
        try:
            with open_url(f"{self.url}/health", 2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def watch(self) -> None:
        """Block until the service fails, and raise then."""
        while True:
            self.check()
            time.sleep(1)

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the service wrote."""
        return "\n".join(_COLOURS.sub("", self.log.read_text(errors="replace")).splitlines()[-lines:])

    def stop(self) -> None:
        """Stop Serve with SIGINT, then kill what is left of its session; return when all processes have ended."""
        self._stopping.set()
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)  # `serve run` then shuts Serve and Ray down
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(30)
        self._end_processes()

    def _end_processes(self) -> None:
        self._gone_within(PATIENCE_S, self.processes)  # Ray's workers end with their raylet
        for number, patience_s in ((signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, 10)):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if self._gone_within(patience_s, self.processes):
                return
        raise DemoError(f"these processes could not be stopped: {self.processes()}")

    def _gone_within(self, patience_s: float, remaining: Callable[[], list[int]]) -> bool:
        deadline = time.monotonic() + patience_s
        while remaining():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def processes(self) -> list[int]:
        """Every process of the service: Ray's daemons and workers stay in the session of their parent."""
        if self._child is None:
            return []
        self._child.poll()
        return [pid for pid, _, session in _processes() if session == self._child.pid]

    def _poll_applications(self) -> None:
        """Poll the deployment's state from Ray's dashboard; in a thread, as it answers slowly during the start."""
        while not self._stopping.wait(1):
            # The dashboard is up only after the service's log says so, and stops first.
            with contextlib.suppress(OSError, ValueError):
                self._applications = self._ask_dashboard()

    def _ask_dashboard(self) -> dict[str, Any]:
        """The content of `serve status`, by application; empty while Ray starts."""
        found = _DASHBOARD.search(self.log.read_text(errors="replace"))
        if found is None:
            return {}
        url = f"http://{found[2]}/api/serve/applications/"
        with open_url(urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"}), 10) as response:
            applications: dict[str, Any] = json.load(response)["applications"]
            return applications
