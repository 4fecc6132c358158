"""Find a model's files: a local folder, or a snapshot from the Hugging Face hub.

The hub's token comes from the environment: ``HF_TOKEN``, or ``HF_TOKEN_PATH`` naming a file such as a mounted secret.
huggingface_hub reads it itself, so that it passes through no setting, message or log line of this service.
"""

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from app.engine.checkpoint_files import CheckpointError, read_json
from app.engine.families import Family, family_of
from app.model_hints import INDEX, not_a_model, not_a_transformer
from app.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
COMPILED = "flux-compiled"
SUFFIXES = ("json", "safetensors", "txt", "model", "jinja")


def compile_cache(settings: Settings) -> Path:
    """The folder on this node that keeps what the ranks compile, on the volume of the models unless set otherwise."""
    if settings.compile_cache_dir is not None:
        return Path(settings.compile_cache_dir).expanduser()
    return Path(HF_HOME) / COMPILED


def local_folder(model: str) -> Path | None:
    """The folder of ``model`` on this node, or None when it names a model on the hub.

    Args:
        model: a folder (relative to the working directory or to the repository), or a hub id ``owner/name``.

    Raises:
        CheckpointError: a single file, a part of a model or an address is named; the message says what to name.
        FileNotFoundError: a folder is meant, and it has no ``model_index.json``.
    """
    candidates = [Path(model).expanduser(), REPOSITORY / model]
    for folder in candidates:
        if (folder / INDEX).is_file():
            return folder.resolve()
    found = next((path for path in candidates if path.exists()), None)
    if hint := not_a_model(model, found):
        raise CheckpointError(f"model {model!r} {hint}")
    if found is not None or model.startswith((".", "/", "~", "models/")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"model {model!r}: no {INDEX} in {found or candidates[0].absolute()}; "
            "name a folder in diffusers layout or a hub id such as black-forest-labs/FLUX.1-dev"
        )
    return None


def model_folder(settings: Settings) -> Path:
    """The folder of the served model on this node; ``revision`` of a model on the hub is downloaded once per node.

    Raises:
        FileNotFoundError: a folder is meant, and it has no ``model_index.json``.
        CheckpointError: something else is named, or the hub doesn't give it: unknown, gated, or not to be reached.
    """
    own_transformer = settings.transformer is None
    return local_folder(settings.model) or _snapshot(settings.model, settings.revision, own_transformer)


def transformer_file(settings: Settings) -> Path | None:
    """The file that the setting ``transformer`` names, None where the model's own weights are served.

    Raises:
        CheckpointError: it is something else than a safetensors file; the message says what to name.
        FileNotFoundError: it is not on this node.
    """
    if settings.transformer is None:
        return None
    candidates = [Path(settings.transformer).expanduser(), REPOSITORY / settings.transformer]
    found = next((path for path in candidates if path.exists() or path.is_symlink()), None)
    if found is None:
        raise FileNotFoundError(
            f"transformer {settings.transformer!r}: there is no file {candidates[0].absolute()} on this node; download "
            "it, or leave the setting out"
        )
    if what := not_a_transformer(found):
        raise CheckpointError(f"transformer {settings.transformer!r} {what}")
    return found.absolute()


def _snapshot(model: str, revision: str | None, own_transformer: bool) -> Path:
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[INDEX]))
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"model {model!r} on the hub has no {INDEX}: it is not in diffusers layout; one file with a transformer"
                " is given as `transformer`, after `hf download`"
            )
        # Of this commit, whatever is pushed meanwhile.
        return Path(
            snapshot_download(model, revision=folder.name, allow_patterns=wanted_files(folder, own_transformer))
        )
    except GatedRepoError:
        reason = (
            f"it is gated: accept its licence at https://huggingface.co/{model}, and give the nodes a token that may "
            "read it in HF_TOKEN, or in a file that HF_TOKEN_PATH names"
        )
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}: name a commit, tag or branch of https://huggingface.co/{model}"
    except RepositoryNotFoundError:
        reason = "there is no such model, or the token in HF_TOKEN or HF_TOKEN_PATH may not see it"
    except LocalEntryNotFoundError:
        reason = "it is not in this node's cache (HF_HOME) and the hub cannot be reached"
    except HfHubHTTPError as error:
        reason = f"the hub answered {error.response.status_code}"
    raise CheckpointError(f"model {model!r} cannot be had from the Hugging Face hub: {reason}")


def wanted_files(folder: Path, own_transformer: bool = True) -> list[str]:
    """Patterns of the files to download, from a downloaded ``model_index.json``.

    Only the parts that it names: FLUX repositories also hold the same weights as one file for other programs. Without
    ``own_transformer`` only the configuration of the transformer.
    """
    parts = [name for name, entry in read_json(folder / INDEX).items() if isinstance(entry, list) and entry[0]]
    patterns = [
        f"{part}/*.{suffix}"
        for part in parts
        for suffix in SUFFIXES
        if own_transformer or part != "transformer" or suffix == "json"
    ]
    return [INDEX, *patterns]


def check_local_checkpoint(settings: Settings) -> str | None:
    """Check the checkpoint if its files are on this machine; a head node need not have them.

    Returns:
        What `fetch_and_check` is told of the files that were checked; None when they are not here.

    Raises:
        ValueError: what is wrong, with the file or number; see `app.engine.checkpoint`.
    """
    try:
        folder = local_folder(settings.model)
        single_file = transformer_file(settings)
    except FileNotFoundError:
        return None
    if folder is None:
        return None
    state = _state_of_files(folder, single_file)
    _check(folder, settings, single_file)
    return state


def fetch_and_check(settings: Settings, checked: str | None = None) -> Family:
    """Have the checkpoint on this node, and check it; a model from the hub is downloaded once before its ranks ask.

    Args:
        checked: what `check_local_checkpoint` returned for these settings. Files that are the same still, by name, size
            and time of change, are not checked again: reading diffusers and transformers for it takes 5 s of CPU.

    Returns:
        What kind of model it is.

    Raises:
        FileNotFoundError, ValueError: what is wrong; see `model_folder`, `transformer_file`, `app.engine.checkpoint`.
    """
    single_file = transformer_file(settings)  # before anything is downloaded
    folder = model_folder(settings)
    if checked is None or checked != _state_of_files(folder, single_file):
        _check(folder, settings, single_file)
    return family_of(folder)


def _state_of_files(folder: Path, single_file: Path | None) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen = sorted((str(path.relative_to(folder)), *_change(path)) for path in files)
    return hashlib.sha256(repr((seen, single_file and _change(single_file))).encode()).hexdigest()


def _change(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check(folder: Path, settings: Settings, single_file: Path | None) -> None:
    # Most processes only look for files; this is the one import here that reads diffusers and transformers.
    from app.engine.checkpoint import check_checkpoint

    check_checkpoint(folder, settings.tensor_parallel_size, settings.sequence_parallel_size, single_file)
