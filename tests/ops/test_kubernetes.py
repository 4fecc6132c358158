"""The manifests build, are what the API server accepts, agree with the Serve configs, and give nothing away."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.main import needed_resources
from app.settings import Settings
from scripts.render_manifests import gateway_config, multi_node_config, rendered
from tests.ops.manifests import OVERLAYS, ROOT, Object, build, named, validate

SERVING = {"single-node": "flux.yaml", "multi-node": "flux-multi-node.yaml"}
PROXY_PORT = 8000


def serve_config(name: str) -> Object:
    return yaml.safe_load((ROOT / "deployments" / name).read_text(encoding="utf-8"))


def settings_of(config: Object) -> Settings:
    (application,) = config["applications"]
    return Settings(**application["args"])


def cluster_of(overlay: str) -> Object:
    return named(build(overlay), "RayService")["spec"]["rayClusterConfig"]


def pod_specs(overlay: str) -> Iterator[tuple[str, Object]]:
    cluster = cluster_of(overlay)
    yield "head", cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]
    yield "redis", named(build(overlay), "StatefulSet")["spec"]["template"]["spec"]


def worker(overlay: str) -> tuple[Object, Object]:
    """The worker group and its container."""
    (group,) = cluster_of(overlay)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return group, container


def test_every_overlay_is_tested() -> None:
    assert {path.name for path in OVERLAYS.iterdir()} == {*SERVING, "monitoring"}


@pytest.mark.parametrize("overlay", [*SERVING, "monitoring"])
@pytest.mark.parametrize("custom", [False, True], ids=["core", "custom"])
def test_every_object_is_valid_without_unknown_fields(overlay: str, custom: bool) -> None:
    objects = [item for item in build(overlay) if item["apiVersion"].startswith(("ray.io", "monitoring")) == custom]
    assert objects
    for item in objects:
        validate(item)


@pytest.mark.parametrize(
    ("overlay", "kind", "place"),
    [
        ("single-node", "PodDisruptionBudget", ("spec",)),
        ("single-node", "NetworkPolicy", ("spec", "podSelector")),
        ("single-node", "StatefulSet", ("spec", "template", "spec", "containers", 0, "securityContext")),
        ("single-node", "RayService", ("spec", "rayClusterConfig")),
        ("single-node", "RayService", ("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec")),
        ("monitoring", "PodMonitor", ("spec",)),
        ("monitoring", "ScrapeConfig", ("spec", "staticConfigs", 0)),
        ("monitoring", "PrometheusRule", ("spec", "groups", 0)),
    ],
)
def test_the_validation_finds_a_misspelt_field(overlay: str, kind: str, place: tuple[str | int, ...]) -> None:
    item = copy.deepcopy(next(item for item in build(overlay) if item["kind"] == kind))
    validate(item)
    target: Any = item
    for part in place:
        target = target[part]
    target["misspelt"] = 1
    with pytest.raises(Exception, match="misspelt"):
        validate(item)


def test_rendered_files_are_those_of_their_sources() -> None:
    for path, text in rendered().items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path}: run python -m scripts.render_manifests"


@pytest.mark.parametrize(("overlay", "config"), SERVING.items())
def test_the_serve_config_is_the_deployments_file(overlay: str, config: str) -> None:
    text = named(build(overlay), "RayService")["spec"]["serveConfigV2"]
    assert text == (ROOT / "deployments" / config).read_text(encoding="utf-8")


def test_the_multi_node_config_is_flux_with_autoscaling() -> None:
    one, several = serve_config("flux.yaml"), serve_config("flux-multi-node.yaml")
    autoscaling = several["applications"][0]["args"].pop("autoscaling")
    assert one == several
    assert autoscaling["max_replicas"] > settings_of(one).num_replicas == 1


@pytest.mark.parametrize("text", ["", 2 * "      num_replicas: 1\n"])
def test_a_config_that_the_renderer_does_not_know_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        multi_node_config(text)


def test_a_gateway_without_the_services_address_is_an_error() -> None:
    with pytest.raises(ValueError, match="one is needed"):
        gateway_config("")


@pytest.mark.parametrize(("overlay", "config"), SERVING.items())
def test_a_worker_pod_holds_one_group(overlay: str, config: str) -> None:
    settings = settings_of(serve_config(config))
    group, container = worker(overlay)
    resources = container["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]
    assert int(resources["limits"]["nvidia.com/gpu"]) == settings.ranks
    assert settings.placement_group_strategy == "PACK"
    # The whole service starts on the smallest number of pods.
    needed, pods = needed_resources(settings), group["minReplicas"]
    assert pods * int(resources["limits"]["cpu"]) >= needed["CPU"]
    assert pods * int(resources["limits"]["nvidia.com/gpu"]) >= needed["GPU"]
    assert (group["minReplicas"], group["maxReplicas"]) == (settings.num_replicas, settings.max_replicas)


def test_pods_follow_the_load_on_several_nodes_only() -> None:
    assert "enableInTreeAutoscaling" not in cluster_of("single-node")
    assert cluster_of("multi-node")["enableInTreeAutoscaling"] is True
    claims = {overlay: named(build(overlay), "PersistentVolumeClaim")["spec"]["accessModes"] for overlay in SERVING}
    assert claims == {"single-node": ["ReadWriteOnce"], "multi-node": ["ReadWriteMany"]}


@pytest.mark.parametrize(("overlay", "config"), SERVING.items())
def test_a_pod_has_time_to_drain(overlay: str, config: str) -> None:
    settings, options = settings_of(serve_config(config)), serve_config(config)["http_options"]
    group, container = worker(overlay)
    *command, waits = container["lifecycle"]["preStop"]["exec"]["command"]
    assert (ROOT / command[-1]).is_file()
    assert settings.drain_seconds < int(waits) < group["template"]["spec"]["terminationGracePeriodSeconds"]
    # During an update of the only group, the API's requests wait until the model is loaded again.
    assert settings.api_drain_seconds >= options["request_timeout_s"]
    # An upgrade's old cluster stays until the longest request that it took is answered.
    spec = named(build(overlay), "RayService")["spec"]
    assert spec["upgradeStrategy"] == {"type": "NewCluster"}
    assert spec["rayClusterDeletionDelaySeconds"] > options["request_timeout_s"]


@pytest.mark.parametrize(("overlay", "config"), SERVING.items())
def test_the_head_serves_nothing_and_may_restart(overlay: str, config: str) -> None:
    spec = named(build(overlay), "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    assert spec["excludeHeadPodFromServeSvc"] is True
    assert serve_config(config)["proxy_location"] == "EveryNode"
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    (container,) = head["template"]["spec"]["containers"]
    assert not any("gpu" in name for name in container["resources"]["limits"])
    assert {port["name"]: port["containerPort"] for port in container["ports"]}["serve"] == PROXY_PORT
    redis = named(build(overlay), "Service")
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == f"{redis['metadata']['name']}:6379"
    assert cluster["rayVersion"] in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", SERVING)
def test_secrets_are_references_to_one_secret_that_is_not_here(overlay: str) -> None:
    assert not [item for item in build(overlay) if item["kind"] == "Secret"]
    variables = {each["name"]: each for _, pod in pod_specs(overlay) for each in pod["containers"][0].get("env", [])}
    token = variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token == {"name": "flux-secrets", "key": "HF_TOKEN", "optional": True}
    assert variables["REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == {"name": "flux-secrets", "key": "REDIS_PASSWORD"}
    password = cluster_of(overlay)["gcsFaultToleranceOptions"]["redisPassword"]
    assert password == {"valueFrom": variables["REDIS_PASSWORD"]["valueFrom"]}


@pytest.mark.parametrize("overlay", SERVING)
def test_every_pod_is_confined(overlay: str) -> None:
    confined = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    for name, pod in pod_specs(overlay):
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            assert field not in pod, name
        assert all("hostPath" not in volume for volume in pod.get("volumes", [])), name
        for container in pod["containers"]:
            assert container["securityContext"] == confined, name
            assert container["resources"]["limits"]["memory"], name
            assert container["image"].rpartition(":")[2] not in ("", "latest", container["image"]), name
        # Only the head's autoscaler talks to the API server.
        assert pod["automountServiceAccountToken"] is (name == "head" and overlay == "multi-node")
    autoscaler = cluster_of(overlay).get("autoscalerOptions")
    assert autoscaler is None or autoscaler["securityContext"] == confined
    namespace = named(build(overlay), "Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {item["metadata"].get("namespace", "flux") for item in build(overlay)} == {namespace["name"]} == {"flux"}


@pytest.mark.parametrize("overlay", SERVING)
def test_what_ray_writes_to_is_writable(overlay: str) -> None:
    for name, pod in pod_specs(overlay):
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        if name == "redis":
            assert set(mounts) == {"/data"}
            continue
        assert {"/tmp", "/tmp/ray", "/dev/shm"} <= set(mounts)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert {mounts["/tmp"], mounts["/tmp/ray"]} <= {key for key, volume in volumes.items() if "emptyDir" in volume}
    group, container = worker(overlay)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    cache = {each["name"]: each.get("value") for each in container["env"]}["HF_HOME"]
    (volume,) = [each for each in group["template"]["spec"]["volumes"] if each["name"] == mounts[str(cache)]]
    claim = named(build(overlay), "PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim
    # Ray's object store lies in /dev/shm, which counts as the pod's memory; NCCL needs some of it too.
    (shared,) = [each["emptyDir"] for each in group["template"]["spec"]["volumes"] if each["name"] == "shared-mem"]
    assert int(group["rayStartParams"]["object-store-memory"]) < int(shared["sizeLimit"].removesuffix("Gi")) * 2**30


def sources(objects: list[Object], port: int, node_type: str) -> set[str]:
    """Who may reach ``port`` of a Ray pod, by the namespace or the pod label that the policies name."""
    labels = {"app.kubernetes.io/name": "flux", "ray.io/node-type": node_type}
    allowed = set()
    for policy in (item["spec"] for item in objects if item["kind"] == "NetworkPolicy"):
        if (
            "Ingress" not in policy["policyTypes"]
            or not policy["podSelector"].get("matchLabels", {}).items() <= labels.items()
        ):
            continue
        for rule in policy.get("ingress", []):
            if port in [entry["port"] for entry in rule.get("ports", [{"port": port}])]:
                assert rule["from"], "an empty list would let everyone in"
                for peer in rule["from"]:
                    place = peer.get("namespaceSelector", peer.get("podSelector"))["matchLabels"]
                    allowed.add(place.get("kubernetes.io/metadata.name") or f"pods {place['app.kubernetes.io/name']}")
    return allowed


@pytest.mark.parametrize("overlay", SERVING)
def test_only_the_ingress_reaches_the_service_and_nobody_ray(overlay: str) -> None:
    objects = build(overlay)
    ours = "pods flux"
    assert sources(objects, PROXY_PORT, "worker") == {"ingress-nginx", ours}
    assert sources(objects, PROXY_PORT, "head") == {ours}
    assert sources(objects, 8265, "head") == {"kuberay-system", ours}
    for port in (6379, 10001, 8080, 52365):
        assert sources(objects, port, "head") == sources(objects, port, "worker") == {ours}
    assert cluster_of(overlay)["authOptions"] == {"mode": "token"}
    closed = named(objects, "NetworkPolicy", "flux-nothing-else")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    # Prometheus gets its ports from the overlay that wants them read.
    with_monitoring = objects + build("monitoring")
    assert sources(with_monitoring, PROXY_PORT, "worker") == {"ingress-nginx", "monitoring", ours}
    assert sources(with_monitoring, 8265, "head") == {"kuberay-system", ours}


@pytest.mark.parametrize("overlay", SERVING)
def test_a_drain_of_nodes_leaves_a_group(overlay: str) -> None:
    budget = named(build(overlay), "PodDisruptionBudget")["spec"]
    group, _ = worker(overlay)
    labels = {**group["template"]["metadata"]["labels"], "ray.io/node-type": "worker"}
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    # Kubernetes takes neither a percentage nor maxUnavailable for pods whose owner it does not know.
    assert set(budget) == {"minAvailable", "selector"}
    assert budget["minAvailable"] == group["minReplicas"]


def test_the_service_is_scraped_once_and_ray_pod_by_pod() -> None:
    objects = build("monitoring")
    scrape = named(objects, "ScrapeConfig")["spec"]
    service = named(build("single-node"), "RayService")["metadata"]
    # KubeRay names the Service after the RayService.
    target = f"{service['name']}-serve-svc.{service['namespace']}.svc:{PROXY_PORT}"
    (static,) = scrape["staticConfigs"]
    assert (scrape["metricsPath"], static["targets"]) == ("/metrics", [target])
    # What the rules join by; Serve's own metrics have `application` already, under the application's name there.
    (application,) = serve_config("flux.yaml")["applications"]
    assert (scrape["jobName"], static["labels"]["application"]) == ("flux", application["name"])
    endpoints = named(objects, "PodMonitor")["spec"]["podMetricsEndpoints"]
    named_so = [{"targetLabel": "cluster", "replacement": static["labels"]["cluster"]}]
    assert all(endpoint["relabelings"] == named_so for endpoint in endpoints)
    ports = {endpoint["port"] for endpoint in endpoints}
    head = {
        port["name"] for port in cluster_of("multi-node")["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert "serve" not in ports
    assert ports <= head


def test_rules_and_dashboards_are_the_committed_files() -> None:
    objects = build("monitoring")
    rules = yaml.safe_load((ROOT / "k8s/base/rules.yaml").read_text(encoding="utf-8"))
    assert named(objects, "PrometheusRule")["spec"] == rules
    loaded: dict[str, str] = {}
    for item in objects:
        if item["kind"] == "ConfigMap":
            assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
            loaded |= item["data"]
    files = {path.name: path.read_text(encoding="utf-8") for path in Path(ROOT / "k8s/base/dashboards").glob("*.json")}
    assert len(files) >= 2
    assert loaded == files
    selected = [item for item in objects if item["apiVersion"].startswith("monitoring.coreos.com")]
    assert len(selected) == 3
    assert {item["metadata"]["labels"]["release"] for item in selected} == {"kube-prometheus-stack"}


def test_every_alert_has_its_page_in_the_runbook() -> None:
    rules = yaml.safe_load((ROOT / "k8s/base/rules.yaml").read_text(encoding="utf-8"))
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    headings = (ROOT / "docs/operations.md").read_text(encoding="utf-8").splitlines()
    assert alerts == {line.removeprefix("### ") for line in headings if line.startswith("### Flux")}
