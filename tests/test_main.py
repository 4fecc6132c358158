"""From settings to what Serve is told; the running service is tested in tests/cluster and tests/ops."""

from __future__ import annotations

from ray.serve.config import AutoscalingConfig

from app.main import needed_resources, replica_count
from app.settings import AutoscalingSettings, Settings


def test_the_number_of_groups_is_fixed_unless_it_may_grow() -> None:
    assert replica_count(Settings(num_replicas=3)) == {"num_replicas": 3}
    growing = Settings(num_replicas=2, autoscaling=AutoscalingSettings(max_replicas=5, target_ongoing_requests=6))
    options = replica_count(growing)
    assert set(options) == {"autoscaling_config"}, "Serve takes one or the other"
    config = AutoscalingConfig(**options["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas, config.target_ongoing_requests) == (2, 5, 6)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (30, 600)


def test_the_start_needs_the_fewest_groups_only() -> None:
    few = Settings(device="cuda", tensor_parallel_size=2, gpus_per_rank=0.8, gpus_per_helper=0.2)
    growing = few.model_copy(update={"autoscaling": AutoscalingSettings(max_replicas=8)})
    assert needed_resources(growing) == needed_resources(few)
    assert growing.max_replicas == 8
