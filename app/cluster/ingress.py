"""The Serve ingress: the HTTP application over the encoder, the replicas and the decoder."""

import ipaddress
import logging

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from app.api.app import create_app
from app.api.drain import Drain
from app.cluster.backend import ServeBackend
from app.cluster.handles import remote
from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.logs import configure_logging
from app.settings import Settings

logger = logging.getLogger(__name__)

# One per process; Serve builds the ASGI app after the deployment's constructor.
_backend: ServeBackend | None = None
_drain: Drain | None = None


def build_http_app() -> FastAPI:
    """Serve calls this in the ingress replica, after `ImagesApi.__init__`."""
    global _drain
    backend = _backend
    assert backend is not None
    app = create_app(backend.settings, lambda: backend, id_added_in_front=True)
    _drain = app.state.service.drain
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
        _backend = ServeBackend(
            settings,
            PromptEncoder(settings) if encoder is None else remote(encoder, PromptEncoder),
            replica,
            ImageDecoder(settings) if decoder is None else remote(decoder, ImageDecoder),
        )

    async def drain(self) -> int:
        """Refuse new requests for images from now on; how many are under way for which `app.serve` should wait."""
        assert _drain is not None
        assert _backend is not None
        _drain.begin()
        await _backend.stop_background()
        return _drain.waits_for
