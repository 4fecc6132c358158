"""Writes the parts of k8s/ that repeat another file, which kustomize cannot put into a field by itself.

``python -m scripts.render_manifests`` after a change to deployments/flux.yaml, deployments/gateways/envoy.yaml or
k8s/base/rules.yaml; a test compares.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_AUTOSCALING = """\
      # Between num_replicas and max_replicas, by load; each group needs a pod with two GPUs.
      autoscaling:
        max_replicas: 4
        target_ongoing_requests: 4  # as many as share a forward pass
        upscale_delay_s: 30
        downscale_delay_s: 600    # loading the model again takes minutes
"""

_SERVICE = "address: 127.0.0.1"


def multi_node_config(flux: str) -> str:
    """deployments/flux.yaml with autoscaled groups.

    Raises:
        ValueError: the text has no line that sets ``num_replicas``, or more than one.
    """
    body, found = re.subn(r"(?m)^ {6}num_replicas: .*\n", lambda line: line[0] + _AUTOSCALING, flux)
    if found != 1:
        raise ValueError(f"deployments/flux.yaml has {found} lines `      num_replicas: …`; exactly one is needed")
    return (
        "# Several groups of deployments/flux.yaml on a cluster that grows and shrinks with the load.\n"
        "# Made from that file by scripts/render_manifests.py: edit it there.\n#\n"
    ) + body


def serve_config_patch(config: str, source: str) -> str:
    """The patch that gives the RayService its Serve config."""
    return (
        f"# {source}, written by scripts/render_manifests.py: edit it there.\n"
        "apiVersion: ray.io/v1\nkind: RayService\nmetadata:\n  name: flux\nspec:\n  serveConfigV2: |\n"
    ) + _indented(config, 4)


def prometheus_rule(rules: str) -> str:
    """A file of Prometheus rules as the object that Prometheus Operator reads."""
    return (
        "# k8s/base/rules.yaml, written by scripts/render_manifests.py: edit it there.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: flux\nspec:\n"
    ) + _indented(rules, 2)


def gateway_config(envoy: str) -> str:
    """Envoy's configuration in front of the Service.

    Raises:
        ValueError: the text has no address of the service, or more than one.
    """
    if envoy.count(_SERVICE) != 1:
        raise ValueError(f"deployments/gateways/envoy.yaml has {envoy.count(_SERVICE)} times {_SERVICE}; one is needed")
    return (
        "# deployments/gateways/envoy.yaml, written by scripts/render_manifests.py: edit it there.\n"
        + envoy.replace(_SERVICE, "address: flux-serve-svc.flux.svc.cluster.local")
    )


def _indented(text: str, spaces: int) -> str:
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(keepends=True))


def rendered(root: Path = ROOT) -> dict[str, str]:
    """Every rendered file by its path in the repository."""
    flux = (root / "deployments/flux.yaml").read_text(encoding="utf-8")
    multi_node = multi_node_config(flux)
    rules = (root / "k8s/base/rules.yaml").read_text(encoding="utf-8")
    envoy = (root / "deployments/gateways/envoy.yaml").read_text(encoding="utf-8")
    return {
        "deployments/flux-multi-node.yaml": multi_node,
        "k8s/base/serve-config.yaml": serve_config_patch(flux, "deployments/flux.yaml"),
        "k8s/overlays/multi-node/serve-config.yaml": serve_config_patch(multi_node, "deployments/flux-multi-node.yaml"),
        "k8s/components/gateway/envoy.yaml": gateway_config(envoy),
        "k8s/overlays/monitoring/prometheus-rule.yaml": prometheus_rule(rules),
    }


def main() -> None:
    """Write what changed."""
    for path, text in rendered().items():
        target = ROOT / path
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
