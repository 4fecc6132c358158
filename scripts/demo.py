"""Start the service, ask it for one picture over HTTP, show what was computed and what was skipped, and keep serving.

``make demo`` runs it. With ``--once`` it stops when the picture is there; with ``--url`` it asks a running service.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
STARTING = "starting Ray"
PATIENCE_S = 5.0  # for processes that should end by themselves, and for those that were told to
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_DASHBOARD = re.compile(r"View the dashboard at (?:\x1b\[[0-9;]*m)*(https?://)?([\w.-]+:\d+)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class DemoError(Exception):
    """What went wrong, for the person who started the demo."""


class StopRequested(BaseException):
    """Ctrl-C, or a polite kill."""


# -- the request and what comes back ---------------------------------------------------------------------------------


def ask(url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The reply to ``POST /v1/images/generations``."""
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with _open(request, timeout_s) as response:
            reply: dict[str, Any] = json.load(response)
            return reply
    except urllib.error.HTTPError as error:
        raise DemoError(f"the service answered {error.code}: {_message(error.read())}") from None
    except OSError as error:
        raise DemoError(f"the service did not answer at {url}: {error}") from None


def _message(body: bytes) -> str:
    """The message in OpenAI's error envelope, or the body as it is."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(body)["error"]["message"])
    return body.decode(errors="replace").strip()[:500]


def _open(request: urllib.request.Request | str, timeout_s: float) -> Any:
    # The service is reached directly: a proxy from the environment would not know this machine's loopback.
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def draw_schedule(schedule: str) -> list[str]:
    """The steps as blocks (computed) and dots (reused), over a ruler of step numbers."""
    marks = {"C": "█", ".": "·"}
    ruler = "".join(f"{step:<10}" for step in range(0, len(schedule), 10)).rstrip()
    return ["".join(marks[decision] for decision in schedule), ruler]


def describe(image: dict[str, Any]) -> list[str]:
    """One picture's report: schedule, steps and the time of each phase."""
    magcache, timings = image["magcache"], image["timings"]
    blocks, ruler = draw_schedule(magcache["schedule"])
    computed, skipped = magcache["computed"], magcache["skipped"]
    steps = computed + skipped
    phases = [(name, timings[f"{name}_s"]) for name in ("queue", "encode", "denoise", "decode", "total")]
    return [
        f"Schedule  {blocks}   █ computed  · reused",
        f"          {ruler}",
        f"Steps     {computed} of {steps} computed, {skipped} skipped ({skipped / steps:.0%}), "
        f"predicted error {magcache['predicted_error']:.3g}" + ("" if magcache["enabled"] else ", MagCache is off"),
        "Time      " + "   ".join(f"{name} {seconds:.2f} s" for name, seconds in phases),
    ]


# -- the service as a child process ----------------------------------------------------------------------------------


def address(config: dict[str, Any]) -> tuple[str, int]:
    """Host and port on which a Serve config listens; Serve's own defaults where it names none."""
    options = config.get("http_options") or {}
    return options.get("host", "127.0.0.1"), int(options.get("port", 8000))


def check_port(host: str, port: int) -> None:
    """Refuse to start where another service listens: the demo would talk to that one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise DemoError(
                f"cannot listen on {host}:{port} ({error.strerror}). Is another demo or service running? Stop it, "
                f"choose a free port with --port, or ask the running service with --url http://{host}:{port}"
            ) from None


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
    """The innermost error in a message that may be a traceback, or several of them one in another."""
    lines = _COLOURS.sub("", message).strip().splitlines()
    errors = [index for index, line in enumerate(lines) if re.match(r"[\w.]+: ", line)]
    return "\n".join(lines[errors[-1] :] if errors else lines)


class Service:
    """``serve run`` in a session of its own, with a Ray of its own."""

    def __init__(self, command: list[str], url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self._command = command
        self._token = secrets.token_hex(16)
        self._applications: dict[str, Any] = {}
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; from here on ``stop`` must be called."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=os.environ
                | {
                    "PYTHONPATH": os.pathsep.join(paths),
                    "RAY_USAGE_STATS_ENABLED": "0",
                    # Only whoever knows the token may ask the dashboard or submit code to this Ray.
                    "RAY_AUTH_MODE": "token",
                    "RAY_AUTH_TOKEN": self._token,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C must reach the demo only, which then stops the rest in order.
                start_new_session=True,
            )
        threading.Thread(target=self._poll_applications, daemon=True).start()

    def check(self) -> None:
        """Raise if the service cannot become or stay ready; ``serve run`` itself goes on after a failed deployment."""
        code = self._child.poll() if self._child else None
        if code is not None:
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
                lines.append(f"{self.log} has the whole story.")
                raise DemoError(f"application {name!r} is {application['status']}:\n" + "\n".join(lines))

    def progress(self) -> str:
        """What is up and what is still starting, in one line."""
        parts = []
        for application in self._applications.values():
            for name, details in application["deployments"].items():
                up = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
                goal = max(details["target_num_replicas"], 1)
                parts.append(f"{name} {'up' if up >= goal else 'starting'}")
            if not parts:
                parts.append("building the application")
        return ", ".join(parts) or STARTING

    def ready(self) -> bool:
        """Whether pictures can be made right now: the service says so, and Serve waits for no part of it."""
        if any(application["status"] != "RUNNING" for application in self._applications.values()):
            return False
        try:
            with _open(f"{self.url}/health", 2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def watch(self) -> None:
        """Return never, raise when the service is gone."""
        while True:
            self.check()
            time.sleep(1)

    def log_tail(self, lines: int = 25) -> str:
        """The last lines that the service wrote."""
        return "\n".join(_COLOURS.sub("", self.log.read_text(errors="replace")).splitlines()[-lines:])

    def stop(self) -> None:
        """Stop Serve politely, then whatever is left of its session; return when nothing is."""
        self._stopping.set()
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)  # `serve run` then shuts Serve and Ray down
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(30)
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
        """Every process of the service: Ray's daemons and workers stay in the session of the one that started them."""
        if self._child is None:
            return []
        self._child.poll()
        return [pid for pid, _, session in _processes() if session == self._child.pid]

    def _poll_applications(self) -> None:
        """Keep asking Ray's dashboard how the deployment goes; a thread, since it answers slowly while all starts."""
        while not self._stopping.wait(1):
            # The dashboard comes up after the service's log says so, and goes away first at the end.
            with contextlib.suppress(OSError, ValueError):
                self._applications = self._ask_dashboard()

    def _ask_dashboard(self) -> dict[str, Any]:
        """What `serve status` shows, by application; nothing while Ray starts."""
        found = _DASHBOARD.search(self.log.read_text(errors="replace"))
        if found is None:
            return {}
        url = f"http://{found[2]}/api/serve/applications/"
        with _open(urllib.request.Request(url, headers={"Authorization": f"Bearer {self._token}"}), 10) as response:
            applications: dict[str, Any] = json.load(response)["applications"]
            return applications


# -- the demo --------------------------------------------------------------------------------------------------------


class ProgressLine:
    """One line that is rewritten on a terminal, and printed again only when it changes elsewhere."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._shown = ""
        self._live = sys.stdout.isatty()
        self._spinner = 0

    def show(self, text: str) -> None:
        seconds = time.monotonic() - self._began
        if self._live:
            self._spinner += 1
            width = shutil.get_terminal_size((120, 24)).columns
            mark = "|/-\\"[self._spinner % 4]
            line = f"{mark} {seconds:3.0f} s  {text}"[: max(width - 1, 20)]
            print(f"\r\x1b[K{line}", end="", flush=True)
        elif text != self._shown:
            print(f"  {seconds:3.0f} s  {text}", flush=True)
        self._shown = text

    def close(self) -> None:
        if self._live:
            print("\r\x1b[K", end="", flush=True)


def wait_until_ready(service: Service, progress: ProgressLine, timeout_s: float) -> None:
    """Show the progress until the service is healthy; raise with the reason when it will not be."""
    deadline = time.monotonic() + timeout_s
    try:
        while not service.ready():
            service.check()
            if time.monotonic() > deadline:
                raise DemoError(f"not ready after {timeout_s:.0f} s. The end of {service.log}:\n{service.log_tail()}")
            progress.show(service.progress())
            time.sleep(0.25)
    finally:
        progress.close()


def picture(url: str, options: argparse.Namespace) -> None:
    """Ask for the picture, write it and report."""
    print(f'Prompt    "{options.prompt}"', flush=True)
    wishes = {"size": options.size, "num_inference_steps": options.steps, "seed": options.seed}
    body = {"prompt": options.prompt, "response_format": "b64_json"}
    reply = ask(url, body | {name: wish for name, wish in wishes.items() if wish is not None}, options.timeout)
    image = reply["data"][0]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(base64.b64decode(image["b64_json"]))
    print(f"Picture   {_short(options.out)} ({reply['size']}, seed {image['seed']})")
    print("\n".join(describe(image)), flush=True)


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def service_of(options: argparse.Namespace) -> Service:
    """The service that ``--config`` describes, on ``--port`` if given."""
    if not options.config.is_file():
        raise DemoError(f"there is no config {options.config}; choose one of deployments/*.yaml")
    config = yaml.safe_load(options.config.read_text())
    path = options.config
    if options.port is not None:
        config["http_options"] = (config.get("http_options") or {}) | {"port": options.port}
        path = options.log.with_suffix(".yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
    host, port = address(config)
    check_port(host, port)
    serve = Path(sys.executable).parent / "serve"
    if not serve.is_file():
        raise DemoError(f"there is no {serve}; run `make setup` first")
    reachable = "127.0.0.1" if host == "0.0.0.0" else host
    return Service([str(serve), "run", "--address", "local", str(path)], f"http://{reachable}:{port}", options.log)


def run(options: argparse.Namespace) -> int:
    """The whole demo; the exit code."""
    began = time.monotonic()
    if options.url:
        picture(options.url.rstrip("/"), options)
        return 0
    service = service_of(options)
    if others := other_ray_processes():
        print(
            f"Note: Ray already runs here (process {', '.join(map(str, others))}); the demo starts a Ray of its own "
            "beside it, and both share this machine's cores. `ray stop` ends Ray processes that nobody needs.",
            flush=True,
        )
    print(f"Starting  serve run {_short(options.config)} (log: {_short(options.log)})", flush=True)
    try:
        service.start()
        wait_until_ready(service, ProgressLine(began), options.timeout)
        print(f"Ready     after {time.monotonic() - began:.1f} s", flush=True)
        picture(service.url, options)
        print(f"          first picture {time.monotonic() - began:.1f} s after the start", flush=True)
        if not options.once:
            print(f"The service keeps running; Ctrl-C stops it.\n{service.url}", flush=True)
            with contextlib.suppress(StopRequested):
                service.watch()
    finally:
        for number in STOP_SIGNALS:  # stopping takes seconds and ends by itself
            signal.signal(number, signal.SIG_IGN)
        print("Stopping  the service and its Ray", flush=True)
        service.stop()
    print("Stopped", flush=True)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", default="a red circle on a blue background", help="what to paint (%(default)s)")
    parser.add_argument("--size", metavar="WxH", help="pixels, for example 160x96 (the server's default)")
    parser.add_argument("--steps", type=int, help="denoising steps (the server's default)")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same picture (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "out/demo.png", help="where the picture goes (out/demo.png)")
    parser.add_argument("--config", type=Path, default=ROOT / "deployments/flux-tiny.yaml", help="Serve config to run")
    parser.add_argument("--port", type=int, help="listen here instead of on the config's port")
    parser.add_argument("--url", help="ask a service that runs already, and start nothing")
    parser.add_argument("--log", type=Path, default=ROOT / "out/serve.log", help="the service's log (out/serve.log)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the service (%(default)g)")
    parser.add_argument("--once", action="store_true", help="stop when the picture is there")
    options = parser.parse_args(arguments)
    for name in ("out", "config", "log"):
        setattr(options, name, getattr(options, name).absolute())
    return options


def _request_stop(number: int, _: object) -> None:
    raise StopRequested(number)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; every failure ends in one message and a code other than 0."""
    options = parse(arguments)
    for number in STOP_SIGNALS:
        signal.signal(number, _request_stop)
    try:
        return run(options)
    except StopRequested as stop:
        print("Interrupted", flush=True)
        return 128 + int(stop.args[0])
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
