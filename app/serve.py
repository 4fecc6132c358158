"""``python -m app.serve deployments/flux.yaml``: ``serve run`` that loses no image when it is stopped.

On SIGTERM, which systemd, ``docker stop`` and Kubernetes send, and on SIGINT the service refuses new requests with
503, finishes those under way within ``drain_seconds``, and ends with exit code 0. ``serve run`` itself would close its
clients' connections at once.
"""

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.scripts import run as serve_run

logger = logging.getLogger("ray.serve")

API = "ImagesApi"
"""The deployment that is asked, by name: importing the class, and torch with it, would delay every start by 2 s."""
LOOK_S = 0.5
"""How often the API is asked what it still works on."""
ANSWER_S = 10.0
RAY_ENVIRONMENT = {
    # For Serve's HTTP proxies to have our guard.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "app.api.proxy_guard:middlewares",
    # How often Serve looks whether its HTTP proxies live, in seconds; it starts another after three looks.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.3",
    # How soon a process finds that one which called it is dead. A replica's results leave it one after another, so that
    # each of a dead API process would hold up those of all others for a second, as Ray is by default.
    "RAY_core_worker_rpc_server_reconnect_timeout_base_s": "0",
    "RAY_grpc_client_check_connection_status_interval_milliseconds": "100",
}
"""What Ray's processes need in their environment."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(
        prog="python -m app.serve", description="`serve run` that finishes its requests when it is stopped."
    )
    parser.add_argument("config", type=Path, help="one of deployments/*.yaml; further options are those of `serve run`")
    options, further = parser.parse_known_args(arguments)
    if not options.config.is_file():
        parser.error(f"there is no config {options.config}; choose one of deployments/*.yaml")
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # a Ray that this command starts hands it to all of its processes
    serve_run.main([str(options.config), "--non-blocking", *further], standalone_mode=False)
    _wait_for_signal()
    try:
        drain()
    except (KeyboardInterrupt, TimeoutError, ray.exceptions.RayError, RayServeException) as error:
        logger.warning("not waiting for requests under way: %r", error)
    serve.shutdown()


def _wait_for_signal() -> None:
    """Block until SIGTERM or SIGINT; a second one is a `KeyboardInterrupt`."""
    stop = threading.Event()

    def stopped(number: int, _: object) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.default_int_handler)
        logger.info("%s: finishing the requests under way", signal.Signals(number).name)
        stop.set()

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, stopped)
    stop.wait()


def drain() -> None:
    """Have every API process refuse new requests, and return when their requests are answered or out of time."""
    applications = serve.status().applications.items()
    apis = [serve.get_app_handle(name) for name, each in applications if API in each.deployments]
    idle_looks = 0
    while idle_looks < 2:  # what an API process has answered is on its way through the proxy
        asked = [api.broadcast("drain") for api in apis]
        answers = [each for one in asked for each in one.results(timeout_s=ANSWER_S, return_exceptions=True)]
        busy = any(each for each in answers if isinstance(each, int))  # a process that died has none under way
        idle_looks = 0 if busy else idle_looks + 1
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
