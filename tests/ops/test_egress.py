"""What the pods may reach: each other, names, the hub, and what an overlay or a component adds."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from tests.ops.manifests import Object, build, validate, with_component

HUB, PRIVATE, METADATA, INSIDE = "3.165.102.58", "192.168.7.7", "169.254.169.254", "fd00::7"
HEAD = {"app.kubernetes.io/name": "flux", "ray.io/node-type": "head"}
WORKER = {"app.kubernetes.io/name": "flux", "ray.io/node-type": "worker"}
REDIS = {"app.kubernetes.io/name": "flux-redis"}
DNS = {"k8s-app": "kube-dns"}


def _within(address: str, block: Object) -> bool:
    found = ipaddress.ip_address(address)
    inside = [found in ipaddress.ip_network(each) for each in [block["cidr"], *block.get("except", [])]]
    return inside[0] and not any(inside[1:])


def _names(peer: Object, to: str | dict[str, str], namespace: str) -> bool:
    """Whether a rule's peer is ``to``: an address, or the labels of a pod in ``namespace``."""
    if isinstance(to, str) or "ipBlock" in peer:
        return isinstance(to, str) and "ipBlock" in peer and _within(to, peer["ipBlock"])
    place = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", "flux")
    return place == namespace and peer.get("podSelector", {}).get("matchLabels", {}).items() <= to.items()


def may_reach(
    objects: list[Object], pod: dict[str, str], to: str | dict[str, str], port: int, namespace: str = "flux"
) -> bool:
    """What Kubernetes says for policies on outgoing traffic: a selected pod reaches what any of them names."""
    policies = [item["spec"] for item in objects if item["kind"] == "NetworkPolicy"]
    of_pod = [
        policy
        for policy in policies
        if "Egress" in policy["policyTypes"] and policy["podSelector"].get("matchLabels", {}).items() <= pod.items()
    ]
    assert of_pod, "a pod that no policy selects reaches everything"
    return any(
        port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]
        and any(_names(peer, to, namespace) for peer in rule["to"])
        for policy in of_pod
        for rule in policy.get("egress", [])
    )


@pytest.mark.parametrize("overlay", ["single-node", "multi-node"])
def test_pods_reach_each_other_names_and_the_hub(overlay: str) -> None:
    objects = build(overlay)
    for pod in (HEAD, WORKER):
        for port in (6379, 8265, 10001, 31234):
            assert may_reach(objects, pod, WORKER, port)
            assert may_reach(objects, pod, HEAD, port)
        assert may_reach(objects, pod, REDIS, 6379)
        assert may_reach(objects, pod, DNS, 53, "kube-system")
        assert may_reach(objects, pod, HUB, 443)


@pytest.mark.parametrize("overlay", ["single-node", "multi-node"])
def test_they_reach_nothing_else(overlay: str) -> None:
    objects = build(overlay)
    for address in (PRIVATE, METADATA, INSIDE, "127.0.0.1"):
        for port in (80, 443, 6443):
            assert not may_reach(objects, WORKER, address, port), address
    for port in (22, 80, 25, 6443):
        assert not may_reach(objects, WORKER, HUB, port)
    for pod in (HEAD, WORKER):
        assert not may_reach(objects, pod, METADATA, 443)
        assert not may_reach(objects, pod, REDIS, 22)
        assert not may_reach(objects, pod, {"app": "other"}, 80, "default")
        assert not may_reach(objects, pod, {"app": "collector"}, 4318, "observability")
    for to in (HUB, HEAD, WORKER):
        assert not may_reach(objects, REDIS, to, 443)


def test_only_the_autoscalers_pod_reaches_the_kubernetes_api() -> None:
    for overlay, reached in (("single-node", False), ("multi-node", True)):
        assert may_reach(build(overlay), HEAD, "10.0.0.1", 6443) is reached
        assert not may_reach(build(overlay), WORKER, "10.0.0.1", 6443)


def test_traces_have_a_component(tmp_path: Path) -> None:
    objects = with_component("otlp", tmp_path)
    assert may_reach(objects, WORKER, {"app": "collector"}, 4318, "observability")
    for item in objects:
        if item["kind"] == "NetworkPolicy":
            validate(item)
