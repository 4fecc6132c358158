"""The Serve application: ``serve run deployments/flux-tiny.yaml`` calls `build` with the file's ``args``.

Serve validates the arguments only when the parameter's annotation is a real class, so this module must not postpone
the evaluation of annotations.
"""

import logging
import time
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment

from app.cluster.ingress import ImagesApi
from app.cluster.replica import FluxReplica
from app.logs import configure_logging
from app.model_files import check_local_checkpoint
from app.settings import Settings

logger = logging.getLogger(__name__)

CONSTRUCTOR_ATTEMPTS = 3
"""Few, so that a part that cannot start fails the deployment with its reason; several, for a hub that answers late."""


HEALTH_CHECK_S = 1.0
"""How often Serve looks at each of its processes: one that died is missed for so long before it is replaced."""


def build(settings: Settings) -> Application:
    """Bind the deployments that ``settings`` ask for.

    Raises:
        ValueError: the checkpoint cannot be served; checked only if its folder is on this machine.
        RuntimeError: the cluster lacks the CPUs or GPUs that the deployments reserve.
    """
    checked = check_local_checkpoint(settings)
    check_resources(settings)
    component = {"num_cpus": settings.cpus_per_helper}
    free = ray.available_resources() if ray.is_initialized() else {}
    every = {
        "max_constructor_retry_count": CONSTRUCTOR_ATTEMPTS,
        "health_check_period_s": HEALTH_CHECK_S,
        "max_surge_percent": surge_percent(settings, free),
    }
    common: dict[str, Any] = {**every, "graceful_shutdown_timeout_s": settings.drain_seconds}

    def own_deployment(part: type, runs_on: str, replicas: int) -> Application:
        return _deployment(
            part,
            num_replicas=replicas,
            ray_actor_options={**component, "num_gpus": settings.gpus_per_helper if runs_on == "cuda" else 0},
            max_ongoing_requests=settings.max_ongoing_requests,
            **common,
        ).bind(settings)

    replica = _deployment(
        FluxReplica,
        **replica_count(settings),
        # The replica only supervises; its ranks use the bundles.
        ray_actor_options={"num_cpus": 0},
        placement_group_bundles=[rank_bundle(settings)] * settings.ranks,
        placement_group_strategy=settings.placement_group_strategy,
        max_ongoing_requests=settings.max_ongoing_requests,
        max_queued_requests=settings.max_queued_requests,
        **common,
    )
    api = _deployment(
        ImagesApi,
        num_replicas=settings.api_replicas,
        ray_actor_options=component,
        # More than may run and wait behind it, so that requests beyond a full queue get an answer.
        max_ongoing_requests=2 * (settings.max_ongoing_requests * settings.max_replicas + settings.max_queued_requests),
        **every,
        graceful_shutdown_timeout_s=settings.api_drain_seconds,
    )
    encoder = decoder = None
    # The models' libraries, which take 2 s to load, are loaded here only where a deployment needs them.
    if not settings.encoder_is_in_api:
        from app.components.prompt_encoder import PromptEncoder

        encoder = own_deployment(PromptEncoder, settings.encoder_runs_on, settings.text_encoder.replicas)
    if not settings.decoder_is_in_api:
        from app.components.vae import ImageDecoder

        decoder = own_deployment(ImageDecoder, settings.decoder_runs_on, settings.vae.replicas)
    return api.bind(settings, replica.bind(settings, checked), encoder, decoder)


def _deployment(cls: type, **options: Any) -> Deployment:
    deployment: Deployment = serve.deployment(**options)(cls)
    return deployment


def replica_count(settings: Settings) -> dict[str, Any]:
    """Serve's options for the number of groups: fixed, or autoscaled between two bounds."""
    autoscaling = settings.autoscaling
    if autoscaling.max_replicas is None:
        return {"num_replicas": settings.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.num_replicas,
            "max_replicas": autoscaling.max_replicas,
            "target_ongoing_requests": autoscaling.target_ongoing_requests,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
        }
    }


def surge_percent(settings: Settings, free: dict[str, float]) -> int:
    """Serve's option for updates: with 1 a successor starts before what it replaces ends, with 0 when it begins to end.

    The former needs room for another group, API, encoder and decoder in ``free``; without it Serve would wait for ever.
    """
    more = needed_resources(settings.model_copy(update={"num_replicas": 1}))
    return 1 if all(free.get(name, 0.0) + 1e-6 >= amount for name, amount in more.items()) else 0


def rank_bundle(settings: Settings) -> dict[str, float]:
    """The resources that one rank reserves."""
    cpu = {"CPU": settings.cpus_per_rank}
    return {**cpu, "GPU": settings.gpus_per_rank} if settings.device == "cuda" else cpu


def needed_resources(settings: Settings) -> dict[str, float]:
    """Logical CPUs and GPUs that all deployments together reserve at the start."""
    ranks = settings.num_replicas * settings.ranks
    encoders = 0 if settings.encoder_is_in_api else settings.text_encoder.replicas
    decoders = 0 if settings.decoder_is_in_api else settings.vae.replicas
    on_gpu = encoders * (settings.encoder_runs_on == "cuda") + decoders * (settings.decoder_runs_on == "cuda")
    gpus = ranks * settings.gpus_per_rank if settings.device == "cuda" else 0.0
    components = settings.api_replicas + encoders + decoders
    return {
        "CPU": ranks * settings.cpus_per_rank + components * settings.cpus_per_helper,
        "GPU": gpus + on_gpu * settings.gpus_per_helper,
    }


def check_resources(settings: Settings) -> None:
    """Fail with the needed and the present resources, where Serve would wait for ever.

    Raises:
        RuntimeError: after ``resources_timeout_s`` the cluster still has too little.
    """
    if not ray.is_initialized():
        return
    needed = needed_resources(settings)
    until = time.monotonic() + settings.resources_timeout_s
    warned = False
    while shortage := _shortage(settings, needed):
        if time.monotonic() >= until:
            raise RuntimeError(shortage)
        if not warned:
            configure_logging(settings)
            logger.warning("%s Waiting up to %g s for more.", shortage, settings.resources_timeout_s)
            warned = True
        time.sleep(1.0)


def _shortage(settings: Settings, needed: dict[str, float]) -> str | None:
    has = ray.cluster_resources()
    missing = [name for name, amount in needed.items() if has.get(name, 0.0) + 1e-6 < amount]
    if not missing:
        return None
    wants = " and ".join(f"{needed[name]:g} {name}s" for name in missing)
    holds = " and ".join(f"{has.get(name, 0.0):g}" for name in missing)
    advice = " For a machine without GPUs there is deployments/flux-tiny.yaml." if "GPU" in missing else ""
    return (
        f"{settings.model_name} at tensor_parallel_size {settings.tensor_parallel_size} and sequence_parallel_size "
        f"{settings.sequence_parallel_size} with {settings.num_replicas} replica(s) on {settings.device} needs "
        f"{wants}; the Ray cluster has {holds}. Add nodes, or lower these, gpus_per_rank or cpus_per_rank.{advice}"
    )
