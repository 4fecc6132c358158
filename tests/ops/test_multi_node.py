"""Three hosts on one machine: a group spread over two of them; an update, autoscaling and a node's end under load.

The Serve config is handed to the head's dashboard as KubeRay does it, and requests go to the workers' proxies only. The
tests are one story, told in order.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ops.hosts import Host, hosts, why_not
from tests.ops.load import PROMPT, Load
from tests.ops.needs import missing

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.nodes, pytest.mark.timeout(3600)]

RAY = str(Path(sys.executable).parent / "ray")
PATIENCE_S = 900.0
RUNNING = "RUNNING"


def config(**changes: Any) -> dict[str, Any]:
    """deployments/flux-tiny.yaml with its group spread over two nodes, and ``changes``."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "deployments/flux-tiny.yaml").read_text(encoding="utf-8"))
    document |= {"proxy_location": "EveryNode"}
    document["http_options"]["host"] = "0.0.0.0"
    document["applications"][0]["args"] |= {
        "placement_group_strategy": "STRICT_SPREAD",
        "cpus_per_rank": 0.5,
        "cpus_per_helper": 0.1,
        "text_encoder": {"placement": "cpu"},  # in a process of its own, on whatever host
        "drain_seconds": 30,
        **changes,
    }
    return document


@dataclass(frozen=True)
class Cluster:
    """The hosts, the head first, and the head's dashboard."""

    head: Host
    workers: list[Host]
    dashboard: httpx.Client
    environment: dict[str, str]

    @property
    def urls(self) -> list[str]:
        """The workers' HTTP proxies."""
        return [f"http://{host.address}:8000" for host in self.workers]

    def deploy(self, document: dict[str, Any]) -> None:
        """Hand a Serve config over."""
        reply = self.dashboard.put("/api/serve/applications/", json=document)
        assert reply.status_code == 200, reply.text

    def application(self) -> dict[str, Any]:
        """The application's state, or {} before there is one."""
        reply = self.dashboard.get("/api/serve/applications/")
        found: dict[str, Any] = reply.json()["applications"].get("flux", {}) if reply.status_code == 200 else {}
        assert found.get("status") != "DEPLOY_FAILED", found["message"]
        return found

    def replicas(self, deployment: str = "FluxReplica") -> set[str]:
        """The ids of the replicas of a deployment that are up."""
        deployments = self.application().get("deployments", {})
        listed = deployments.get(deployment, {}).get("replicas", [])
        return {replica["replica_id"] for replica in listed if replica["state"] == RUNNING}

    def nodes(self) -> int:
        """How many have joined and are alive."""
        return sum(node["state"] == "ALIVE" for node in self._list("nodes"))

    def actors(self, name: str) -> list[tuple[str, int]]:
        """(address of the node, pid) of the living actors whose class is ``name``."""
        nodes = self._list("nodes")
        addresses = {node["node_id"]: node["node_ip"] for node in nodes}
        return [
            (addresses[actor["node_id"]], actor["pid"])
            for actor in self._list("actors")
            if actor["state"] == "ALIVE" and actor["class_name"].partition(":")[0] == name
        ]

    def _list(self, what: str) -> list[dict[str, Any]]:
        reply = self.dashboard.get(f"/api/v0/{what}", params={"limit": 1000, "detail": True})
        assert reply.status_code == 200, reply.text
        listed: list[dict[str, Any]] = reply.json()["data"]["result"]["result"]
        return listed


def wait_for(condition: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if condition():
                return
        time.sleep(0.5)
    pytest.fail(f"not within {PATIENCE_S:g} s: {what}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        missing(reason)
    # Ray's sockets have long names below this folder, and a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="fx", dir="/tmp"))
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The manifests have Ray ask for a token; KubeRay makes it and gives it to the pods in the same way.
    token = secrets.token_hex(16)
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment |= {"PATH": f"{Path(RAY).parent}{os.pathsep}{environment['PATH']}"}
    with (
        hosts(3) as (head, *workers),
        httpx.Client(base_url=f"http://{head.address}:8265", timeout=120, trust_env=False) as dashboard,
    ):
        dashboard.headers["Authorization"] = f"Bearer {token}"
        environment["RAY_ADDRESS"] = f"{head.address}:6379"  # as KubeRay sets it
        common = [RAY, "start", "--block", "--object-store-memory=100000000"]
        # Included, so that a head whose dashboard does not start fails as a whole, and is started again.
        shown = ["--include-dashboard=true", "--dashboard-host=0.0.0.0"]
        for host, options in [
            (head, ["--head", "--port=6379", f"--temp-dir={folder}/ray", "--num-cpus=0", *shown]),
            *((worker, [f"--address={head.address}:6379", "--num-cpus=2"]) for worker in workers),
        ]:
            command = [*common, f"--node-ip-address={host.address}", *options]
            host.boot(command, folder / "ray", folder / f"{host.name}.log", environment)
            if host is head:
                wait_for(lambda: dashboard.get("/api/gcs_healthz").status_code == 200, "the head is up")
        made = Cluster(head, workers, dashboard, environment)
        wait_for(lambda: made.nodes() == 3, "all nodes have joined")
        made.deploy(config())
        wait_for(lambda: made.application().get("status") == RUNNING, "the application runs")
        yield made
    shutil.rmtree(folder, ignore_errors=True)


def test_a_group_spans_two_nodes_and_serves_from_both(cluster: Cluster) -> None:
    addresses = {host.address for host in cluster.workers}
    ranks = cluster.actors("Rank")
    assert len(ranks) == 2
    assert {address for address, _ in ranks} == addresses
    assert cluster.actors("ServeReplica")
    assert cluster.head.address not in {address for address, _ in cluster.actors("ServeReplica")}
    body = {"prompt": PROMPT, "seed": 7, "size": "64x64", "num_inference_steps": 4}
    with httpx.Client(timeout=300, trust_env=False) as client:
        replies = [client.post(f"{url}/v1/images/generations", json=body) for url in cluster.urls]
    assert [reply.status_code for reply in replies] == [200, 200], [reply.text for reply in replies]
    first, second = (reply.json()["data"][0]["b64_json"] for reply in replies)
    assert first == second


def test_nothing_is_lost_while_groups_change_come_and_go(cluster: Cluster) -> None:
    def replicas() -> set[str]:
        return cluster.replicas() | cluster.replicas("ImagesApi") | cluster.replicas("PromptEncoder")

    before = replicas()
    # Pauses, so that what starts under load has processors, too.
    with Load(cluster.urls, clients=4, pause_s=0.3) as load:
        wait_for(lambda: load.answered > 10, "the group serves")
        # Each group on one node from here on, and a second one under load.
        autoscaling = {"max_replicas": 2, "target_ongoing_requests": 0.5, "upscale_delay_s": 1, "downscale_delay_s": 1}
        cluster.deploy(config(placement_group_strategy="STRICT_PACK", autoscaling=autoscaling))
        wait_for(lambda: not before & replicas() and len(cluster.replicas()) == 2, "two new groups, one by the load")
        wait_for(lambda: cluster.application().get("status") == RUNNING, "the update is over")
        wait_for(lambda: len(cluster.actors("Rank")) == 4, "of the old group nothing is left")
        served = load.answered
        wait_for(lambda: load.answered > served + 10, "both groups serve")
    assert load.failures == []
    assert load.answered > 50
    with Load(cluster.urls, clients=1, pause_s=1.0) as load:
        wait_for(lambda: len(cluster.replicas()) == 1, "the second group goes")
        wait_for(lambda: len(cluster.actors("Rank")) == 2, "its ranks, too")
        served = load.answered
        wait_for(lambda: load.answered > served + 3, "the one that is left serves")
    assert load.failures == []


def test_a_node_leaves_and_its_group_moves_first(cluster: Cluster) -> None:
    ((address, _), _) = ranks = cluster.actors("Rank")
    assert {address for address, _ in ranks} == {address}, "both ranks on one node"
    (leaving,) = [host for host in cluster.workers if host.address == address]
    (staying,) = [host for host in cluster.workers if host is not leaving]
    with Load(cluster.urls, clients=1, pause_s=0.2) as load:
        left = leaving.run(["bash", "scripts/leave_cluster.sh", "900"], cluster.environment, timeout_s=1000)
        assert (left.returncode, "still running" in left.stderr) == (0, False), left.stderr
        assert {address for address, _ in cluster.actors("Rank")} == {staying.address}
        leaving.stop_everything()
        served = load.answered
        wait_for(lambda: load.answered > served + 3, "the other node serves")
    assert load.failures == []
