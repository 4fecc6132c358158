"""The Serve ingress: the HTTP application over handles to the encoder, the replicas and the decoder."""

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.api.app import create_app
from app.serving.backend import ServeBackend
from app.serving.logs import configure_logging
from app.settings import Settings

_backend: ServeBackend | None = None  # one per process; Serve builds the ASGI app after the deployment's constructor


def build_http_app() -> FastAPI:
    """Serve calls this in the ingress replica, after `ImagesApi.__init__`."""
    backend = _backend
    assert backend is not None
    return create_app(backend.settings, lambda: backend, id_added_in_front=True)


@serve.ingress(build_http_app)
class ImagesApi:
    """Receives HTTP requests."""

    def __init__(
        self, settings: Settings, encoder: DeploymentHandle, replica: DeploymentHandle, decoder: DeploymentHandle
    ) -> None:
        global _backend
        configure_logging(settings)
        _backend = ServeBackend(settings, encoder, replica, decoder)
