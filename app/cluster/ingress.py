"""The Serve ingress: the HTTP application over the encoder, the replicas and the decoder."""

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.api.app import create_app
from app.cluster.backend import ServeBackend
from app.cluster.handles import remote
from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.logs import configure_logging
from app.settings import Settings

_backend: ServeBackend | None = None  # one per process; Serve builds the ASGI app after the deployment's constructor


def build_http_app() -> FastAPI:
    """Serve calls this in the ingress replica, after `ImagesApi.__init__`."""
    backend = _backend
    assert backend is not None
    return create_app(backend.settings, lambda: backend, id_added_in_front=True)


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
        _backend = ServeBackend(
            settings,
            PromptEncoder(settings) if encoder is None else remote(encoder, PromptEncoder),
            replica,
            ImageDecoder(settings) if decoder is None else remote(decoder, ImageDecoder),
        )
