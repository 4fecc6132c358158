"""The catalogue is what is exposed, under names as Prometheus has them."""

from __future__ import annotations

from app.messages.calibration import CalibrationStatus
from app.messages.jobs import ImageKind
from app.metrics import CATALOGUE
from app.metrics.catalogue import COMMON
from tests.metrics.owners import Everything, plan_of

BOUNDED = {"model", "replica", "rank", "key", "profile", "steps", "computed", "lora", "backend"}


def test_the_catalogue_is_what_is_exposed(everything: Everything) -> None:
    everything.coordinator.observe_step(plan_of((True,)), [0.01])
    everything.api.observe_request("ok", 200, 1.0, key_name="alice", loras=["star"])
    everything.coordinator.attention("cudnn")
    everything.guard.compared(ImageKind("p", 28, guided=False), 10, 40.0, 0.98)
    everything.guard.holds(ImageKind("p", 28, guided=False), 10, 38.5)
    everything.calibration.ran("p", "probe", 1.0)
    everything.calibration.at("p", CalibrationStatus("c", "running", "probe", 1, 2, 1.0))
    exposed = {family.name: family for family in everything.registry.collect()}
    assert set(exposed) == {spec.name for spec in CATALOGUE}
    for spec in CATALOGUE:
        family = exposed[spec.name]
        assert (family.type, family.documentation) == (spec.kind, spec.help)
        # The series of unlabelled and of known label values are there before anything happens.
        assert family.samples, spec.name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == {*COMMON[spec.owner], *spec.labels}


def test_names_follow_prometheus() -> None:
    for spec in CATALOGUE:
        assert spec.name.startswith("flux_")
        assert spec.help.endswith(".")
        assert not spec.name.endswith("_total"), "prometheus_client adds it"
        if spec.unit in ("seconds", "bytes"):
            assert spec.name.endswith(f"_{spec.unit}"), spec.name
        assert (spec.kind == "histogram") == bool(spec.buckets)
        assert list(spec.buckets) == sorted(set(spec.buckets))
        free = {name for name, values in spec.labels.items() if not values}
        assert free <= BOUNDED or spec.name == "flux_build_info", spec.name
