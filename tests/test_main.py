"""From settings to what Serve is told; the running service is tested in tests/cluster and tests/ops."""

from __future__ import annotations

import pytest
from ray.serve.config import AutoscalingConfig

from app.cluster.ingress import ImagesApi
from app.main import build, needed_resources, replica_count, surge_percent
from app.serve import API
from app.settings import AutoscalingSettings, Settings, TextEncoderSettings, VaeSettings


def test_the_number_of_groups_is_fixed_unless_it_may_grow() -> None:
    assert replica_count(Settings(num_replicas=3)) == {"num_replicas": 3}
    growing = Settings(num_replicas=2, autoscaling=AutoscalingSettings(max_replicas=5, target_ongoing_requests=6))
    options = replica_count(growing)
    assert set(options) == {"autoscaling_config"}, "Serve takes one or the other"
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 6)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (30, 600)


def test_the_deployment_that_is_drained_is_found_by_its_name() -> None:
    assert build(Settings())._bound_deployment.name == ImagesApi.__name__ == API


def test_the_start_needs_the_fewest_groups_only() -> None:
    few = Settings(device="cuda", tensor_parallel_size=2, gpus_per_rank=0.8, gpus_per_helper=0.2)
    growing = few.model_copy(update={"autoscaling": AutoscalingSettings(max_replicas=8)})
    assert needed_resources(growing) == needed_resources(few)
    assert growing.max_replicas == 8


def test_each_process_of_the_encoders_reserves_its_share() -> None:
    one = Settings(device="cuda", gpus_per_helper=0.25, cpus_per_helper=0.5)
    two = one.model_copy(update={"text_encoder": TextEncoderSettings(replicas=2)})
    more = {name: amount - needed_resources(one)[name] for name, amount in needed_resources(two).items()}
    assert more == {"CPU": 0.5, "GPU": 0.25}


def test_each_process_of_the_vae_reserves_its_share() -> None:
    one = Settings(device="cuda", gpus_per_helper=0.25, cpus_per_helper=0.5)
    three = one.model_copy(update={"vae": VaeSettings(replicas=3)})
    more = {name: amount - needed_resources(one)[name] for name, amount in needed_resources(three).items()}
    assert more == {"CPU": 1.0, "GPU": 0.5}
    in_api = one.model_copy(update={"vae": VaeSettings(replicas=3, placement="api")})
    assert needed_resources(in_api)["GPU"] == needed_resources(one)["GPU"] - 0.25
    several = Settings(cpus_per_helper=0.1, text_encoder=TextEncoderSettings(replicas=2), vae=VaeSettings(replicas=3))
    *_, encoder, decoder = build(several)._bound_deployment.init_args
    assert [part._bound_deployment.num_replicas for part in (encoder, decoder)] == [2, 3]


@pytest.mark.parametrize(
    ("free", "percent"),
    [
        ({"CPU": 2.0, "GPU": 2.0, "memory": 1e9}, 1),
        ({"CPU": 1.7, "GPU": 2.0}, 0),
        ({"CPU": 8.0, "GPU": 1.9}, 0),
        ({"CPU": 8.0}, 0),  # Ray leaves out what is all taken
        ({}, 0),
    ],
)
def test_successors_start_first_where_another_group_fits(free: dict[str, float], percent: int) -> None:
    settings = Settings(
        device="cuda", tensor_parallel_size=2, num_replicas=4, gpus_per_rank=0.8, gpus_per_helper=0.2,
        cpus_per_rank=0.5, cpus_per_helper=0.25,
    )  # fmt: skip
    assert surge_percent(settings, free) == percent
