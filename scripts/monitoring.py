"""``make monitoring``: Prometheus beside the running service, with the rules and alerts of k8s/."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from scripts.prometheus import Prometheus, PrometheusError, config_for

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Run it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Watch a running service with Prometheus.")
    parser.add_argument("--target", default="127.0.0.1:8000", help="host:port of the service")
    parser.add_argument("--port", type=int, default=9090, help="port of Prometheus on this machine")
    parser.add_argument("--folder", type=Path, default=ROOT / "out/prometheus", help="where its data is kept")
    arguments = parser.parse_args()
    try:
        with Prometheus(config_for(arguments.target), arguments.folder, arguments.port) as prometheus:
            print(f"{prometheus.url} watches http://{arguments.target}/metrics; alerts: {prometheus.url}/alerts")
            print("Ctrl-C stops it. The dashboards in k8s/base/dashboards are for any Grafana that reads from it.")
            with contextlib.suppress(KeyboardInterrupt):
                prometheus.wait()
    except PrometheusError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
