"""Find a model's files: a local folder, or a snapshot from the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import snapshot_download

import app

REPOSITORY = Path(app.__file__).resolve().parents[1]
WANTED = ("model_index.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")


def local_model(model: str) -> Path:
    """The folder of ``model`` on this node.

    Args:
        model: a folder (relative to the working directory or to the repository), or a hub id ``owner/name``, which is
            downloaded once per node. The hub's token comes from the environment (``HF_TOKEN``).

    Raises:
        FileNotFoundError: a local folder is meant, and it has no ``model_index.json``.
    """
    candidates = [Path(model).expanduser(), REPOSITORY / model]
    for folder in candidates:
        if (folder / "model_index.json").is_file():
            return folder.resolve()
    empty = next((folder for folder in candidates if folder.is_dir()), None)
    if empty is not None or model.startswith((".", "/", "~", "models/")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model {model!r}: no model_index.json in {empty or candidates[0].absolute()}; "
            "name a folder in diffusers layout or a hub id such as black-forest-labs/FLUX.1-dev"
        )
    # Only the diffusers layout: FLUX repositories also hold the same weights as one file for other programs.
    return Path(snapshot_download(model, allow_patterns=list(WANTED)))
