"""The Serve ingress: the HTTP application over the encoder, the replicas and the decoder."""

import ipaddress
import logging
from typing import TYPE_CHECKING, Literal, cast

from fastapi import FastAPI
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from app.api.app import create_app
from app.api.routes import Service
from app.cluster.api_processes import ApiProcesses
from app.cluster.backend import ServeBackend
from app.cluster.coordinators import Coordinators
from app.cluster.handles import DeploymentProxy
from app.logs import configure_logging
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.metrics import merge_families
from app.settings import Settings

if TYPE_CHECKING:
    from app.components.prompt_encoder import PromptEncoder
    from app.components.vae import ImageDecoder

logger = logging.getLogger(__name__)

# One per process; Serve builds the ASGI app after the deployment's constructor.
_backend: ServeBackend | None = None
_service: Service | None = None


def build_http_app() -> FastAPI:
    """Serve calls this in the ingress replica, after `ImagesApi.__init__`."""
    global _service
    backend = _backend
    assert backend is not None
    process = serve.get_replica_context().replica_tag
    app = create_app(backend.settings, lambda: backend, process=process, id_added_in_front=True)
    _service = app.state.service
    return app


def warn_of_strangers(host: str) -> None:
    """Warn when a service that wants no API keys listens elsewhere than on this machine alone."""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        logger.warning(
            "The service listens on %s and wants no API keys: set http.api_keys_file, or let a gateway ask for them.",
            host,
        )


# The models' libraries take 2 s of CPU to load, which a process does without whose models are elsewhere.


def _encoder(settings: Settings, deployment: DeploymentHandle | None, process: str) -> "PromptEncoder":
    if deployment is not None:
        return cast("PromptEncoder", DeploymentProxy(deployment))
    from app.components.prompt_encoder import PromptEncoder

    return PromptEncoder(settings, process)


def _decoder(settings: Settings, deployment: DeploymentHandle | None) -> "ImageDecoder":
    if deployment is not None:
        return cast("ImageDecoder", DeploymentProxy(deployment))
    from app.components.vae import ImageDecoder

    return ImageDecoder(settings)


def _listens_on() -> str:
    """The address of Serve's HTTP proxies, which Serve tells its own parts only."""
    client = _get_global_client()
    return "" if client is None else str(client.http_config.host)


@serve.ingress(build_http_app)
class ImagesApi:
    """Receives HTTP requests, and holds the encoder and the decoder where they have no deployment of their own."""

    def __init__(
        self,
        settings: Settings,
        replica: DeploymentHandle,
        encoder: DeploymentHandle | None,
        decoder: DeploymentHandle | None,
    ) -> None:
        global _backend
        configure_logging(settings)
        if settings.http.api_keys_file is None:
            warn_of_strangers(_listens_on())
        context = serve.get_replica_context()
        _backend = ServeBackend(
            settings,
            _encoder(settings, encoder, context.replica_tag),
            replica,
            _decoder(settings, decoder),
            ApiProcesses(serve.get_deployment_handle(context.deployment, context.app_name)),
            Coordinators(context.app_name),
        )

    async def drain(self) -> int:
        """Refuse new requests for images from now on; how many are under way for which `app.serve` should wait."""
        backend, service = _parts()
        service.drain.begin()
        await backend.stop_background()
        return service.drain.waits_for

    # What the other API processes ask of this one.

    async def name(self) -> str:
        """This process's name."""
        return serve.get_replica_context().replica_tag

    async def cancel_here(self, request_id: str, key_name: str) -> tuple[int, int]:
        """See `ServeBackend.cancel_here`."""
        return _parts()[0].cancel_here(request_id, key_name)

    async def ask_calibrator(
        self, method: Literal["start", "status", "cancel"], argument: CalibrationJob | str
    ) -> CalibrationStatus | None:
        """See `CalibratorCalls.ask_here`."""
        return await _parts()[0].calibrations.ask_here(method, argument)

    async def metric_families(self) -> tuple[str, list[Metric]]:
        """This process's name and its metrics, with those of an encoder that it holds."""
        backend, service = _parts()
        encoder = await backend.encoder_families() if backend.settings.encoder_is_in_api else []
        return serve.get_replica_context().replica_tag, merge_families(
            service.registry.collect(), encoder, backend.background_families()
        )


def _parts() -> tuple[ServeBackend, Service]:
    assert _backend is not None
    assert _service is not None, "Serve calls a replica once its ASGI app is there"
    return _backend, _service
