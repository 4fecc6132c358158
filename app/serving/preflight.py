"""What would keep the model from being served, found before any rank, encoder or decoder starts."""

from app.engine.checkpoint import check_checkpoint
from app.serving.model_files import local_folder, local_model
from app.settings import Settings


def check_here(settings: Settings) -> None:
    """Check the checkpoint if its folder is on this machine; a head node need not have it.

    Raises:
        ValueError: what is wrong, with the file or number; see `check_checkpoint`.
    """
    try:
        folder = local_folder(settings.model)
    except FileNotFoundError:
        return
    if folder is not None:
        check_checkpoint(folder, settings.tensor_parallel_size)


def fetch_and_check(settings: Settings) -> None:
    """Have the checkpoint on this node, and check it; a model from the hub is downloaded once before its ranks ask.

    Raises:
        FileNotFoundError, ValueError: what is wrong; see `local_model` and `check_checkpoint`.
    """
    check_checkpoint(local_model(settings.model, settings.revision), settings.tensor_parallel_size)
