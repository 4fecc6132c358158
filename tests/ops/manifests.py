"""Build overlays with kustomize, and validate objects against Kubernetes' schemas and those of custom resources."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.ops.needs import missing

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "k8s/overlays"
KUBERNETES = "1.34"
CRD_FOLDER = "FLUX_CRDS"
"""Names a folder of CustomResourceDefinition files, such as KubeRay's ray.io_rayservices.yaml."""

Object = dict[str, Any]


@functools.cache
def build(overlay: str) -> list[Object]:
    """The objects of an overlay."""
    return _built(OVERLAYS / overlay)


def with_component(component: str, folder: Path) -> list[Object]:
    """The objects of an overlay in ``folder`` that adds one of k8s/components to single-node."""
    parts = {"resources": "overlays/single-node", "components": f"components/{component}"}
    overlay = {key: [os.path.relpath(ROOT / "k8s" / path, folder)] for key, path in parts.items()}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return _built(folder)


def _built(folder: Path) -> list[Object]:
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if kubectl is None and kustomize is None:
        missing("neither kubectl nor kustomize is installed")
    command = [kubectl, "kustomize"] if kubectl else [str(kustomize), "build"]
    built = subprocess.run([*map(str, command), folder], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "deprecated" not in built.stderr, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def named(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """The only object of ``kind`` (and ``name``)."""
    (found,) = [item for item in objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
    return found


def validate(item: Object) -> None:
    """Refuse what the API server would refuse, and each field that it would drop without a word.

    Raises:
        jsonschema.ValidationError: or kubernetes_validate's, with the place and the reason.
    """
    if "." not in item["apiVersion"].partition("/")[0] or ".k8s.io/" in item["apiVersion"]:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
        return
    schema = custom_schema(item["kind"], item["apiVersion"].rpartition("/")[2])
    jsonschema.Draft7Validator(schema).validate(item)


@functools.cache
def custom_schema(kind: str, version: str) -> Object:
    """A custom resource's schema with unknown fields refused; skips the test where there is none."""
    folder = os.environ.get(CRD_FOLDER)
    for path in sorted(Path(folder).glob("*.yaml")) if folder else ():
        definition = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if definition["spec"]["names"]["kind"] == kind:
            (found,) = [each for each in definition["spec"]["versions"] if each["name"] == version]
            schema = closed(found["schema"]["openAPIV3Schema"])
            # The API server knows these itself.
            schema["properties"]["metadata"] = {"type": "object"}
            return schema
    own: Object = yaml.safe_load((Path(__file__).parent / "monitoring-schemas.yaml").read_text(encoding="utf-8"))
    if kind not in own:
        pytest.skip(f"{CRD_FOLDER} names no folder with the CRD of {kind}")
    outside = {
        name: {"type": kind} for name, kind in (("apiVersion", "string"), ("kind", "string"), ("metadata", "object"))
    }
    return {"type": "object", "additionalProperties": False, "properties": {**outside, "spec": closed(own[kind])}}


def closed(schema: Any) -> Any:
    """A structural schema that refuses the fields that it does not name, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: value if key == "properties" else closed(value) for key, value in schema.items()}
    if "properties" in schema:
        result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
    free = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not free:
        result["additionalProperties"] = False
    return result
