"""Start the service, ask it for an image over HTTP, show what was computed and what was skipped, and keep serving.

Where the service has low-rank adapters, it is asked for the same image with one of them as well.

``make demo`` runs it. With ``--once`` it stops when the image is there; with ``--url`` it asks a running service.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from scripts.serve_process import ROOT, DemoError, Service, address, check_port, open_url, other_ray_processes

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP."""


def ask(url: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """The reply to ``POST /v1/images/generations``."""
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with open_url(request, timeout_s) as response:
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


def draw_schedule(schedule: str) -> list[str]:
    """The steps as blocks (computed) and dots (reused), over a ruler of step numbers."""
    marks = {"C": "█", ".": "·"}
    ruler = "".join(f"{step:<10}" for step in range(0, len(schedule), 10)).rstrip()
    return ["".join(marks[decision] for decision in schedule), ruler]


def describe(image: dict[str, Any]) -> list[str]:
    """One image's report: schedule, steps and the time of each phase."""
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


def image(url: str, options: argparse.Namespace) -> None:
    """Ask for the image, write it and report."""
    print(f'Prompt    "{options.prompt}"', flush=True)
    fields = {"size": options.size, "num_inference_steps": options.steps, "seed": options.seed}
    body = {"prompt": options.prompt, "response_format": "b64_json"}
    given = {name: value for name, value in fields.items() if value is not None}
    reply = ask(url, body | given, options.timeout)
    image = reply["data"][0]
    _write(options.out, image)
    print(f"Image     {_short(options.out)} ({reply['size']}, seed {image['seed']})")
    print("\n".join(describe(image)), flush=True)
    name = options.lora or next(iter(adapters(url)), None)
    if name is not None:
        same = {**body, **given, "lora": [{"name": name}]}
        path = options.out.with_stem(f"{options.out.stem}-lora")
        _write(path, ask(url, same, options.timeout)["data"][0])
        print(f"Adapter   {_short(path)} (the same with the adapter {name})", flush=True)


def adapters(url: str) -> list[str]:
    """The names of the service's low-rank adapters; none where it has no folder of them."""
    try:
        with open_url(f"{url}/v1/loras", 10) as response:
            return [each["id"] for each in json.load(response)["data"]]
    except (OSError, ValueError, KeyError):
        return []


def _write(path: Path, image: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(image["b64_json"]))


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
        image(options.url.rstrip("/"), options)
        return 0
    service = service_of(options)
    if others := other_ray_processes():
        print(
            f"Note: Ray already runs here (process {', '.join(map(str, others))}); the demo starts a Ray of its own "
            "beside it, and both share this machine's cores. `ray stop` ends Ray processes that are left over.",
            flush=True,
        )
    print(f"Starting  serve run {_short(options.config)} (log: {_short(options.log)})", flush=True)
    try:
        service.start()
        wait_until_ready(service, ProgressLine(began), options.timeout)
        print(f"Ready     after {time.monotonic() - began:.1f} s", flush=True)
        image(service.url, options)
        print(f"          first image {time.monotonic() - began:.1f} s after the start", flush=True)
        if not options.once:
            print(f"The service keeps running; Ctrl-C stops it. Its page, for a browser:\n{service.url}/", flush=True)
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
    parser.add_argument("--prompt", default="a red circle on a blue background", help="what to draw (%(default)s)")
    parser.add_argument("--size", metavar="WxH", help="pixels, for example 160x96 (the server's default)")
    parser.add_argument("--steps", type=int, help="denoising steps (the server's default)")
    parser.add_argument("--seed", type=int, default=7, help="the same seed gives the same image (%(default)s)")
    parser.add_argument(
        "--lora", metavar="NAME", help="the adapter of the second image (the first that the service has)"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out/demo.png", help="where the image goes (out/demo.png)")
    parser.add_argument("--config", type=Path, default=ROOT / "deployments/flux-tiny.yaml", help="Serve config to run")
    parser.add_argument("--port", type=int, help="listen here instead of on the config's port")
    parser.add_argument("--url", help="ask a service that runs already, and start nothing")
    parser.add_argument("--log", type=Path, default=ROOT / "out/serve.log", help="the service's log (out/serve.log)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to wait for the service (%(default)g)")
    parser.add_argument("--once", action="store_true", help="stop when the image is there")
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
