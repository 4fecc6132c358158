"""Finding a model's files: folders, and the hub as huggingface_hub itself talks to one on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file

import app.model_files
from app.engine.checkpoint_files import CheckpointError
from app.engine.families import FLUX_DEV
from app.model_files import (
    REPOSITORY,
    check_local_checkpoint,
    compile_cache,
    fetch_and_check,
    local_folder,
    model_folder,
    wanted_files,
)
from app.settings import Settings
from benchmarks.make_checkpoint import make_checkpoint

TOKEN = "hf_" + "secret" * 6
COMMIT = "a" * 40
REPO = "acme/FLUX.2-klein"


def test_a_folder_is_found_from_the_repository_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder(Settings(model="models/flux-tiny")) == REPOSITORY / "models/flux-tiny"
    assert local_folder(str(REPOSITORY / "models/flux-tiny")) == REPOSITORY / "models/flux-tiny"


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "models/nowhere", "nowhere", "a/b/c", "docs"])
def test_a_folder_without_a_model_is_named(model: str) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"model {model!r}: no model_index.json in ")):
        local_folder(model)


def test_the_checked_folder_says_what_model_it_is() -> None:
    assert fetch_and_check(Settings()) is FLUX_DEV


WITHOUT_ANOTHER_CHECK = """
import sys
from app.model_files import *
print(fetch_and_check(Settings(model=sys.argv[1]), sys.argv[2]).name, "diffusers" in sys.modules)
"""


def test_what_the_head_has_checked_is_checked_again_only_where_it_changed(tmp_path: Path) -> None:
    model = shutil.copytree(REPOSITORY / "models/flux-tiny", tmp_path / "model")
    checked = check_local_checkpoint(Settings(model=str(model)))
    assert checked is not None
    told = [sys.executable, "-c", WITHOUT_ANOTHER_CHECK, str(model), checked]
    made = subprocess.run(told, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert made.stdout.split() == [FLUX_DEV.name, "False"]
    elsewhere = shutil.copytree(model, tmp_path / "elsewhere")
    file = elsewhere / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model\.safetensors cannot be read"):
        fetch_and_check(Settings(model=str(elsewhere)), checked)


def test_another_transformer_file_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Path | None] = []
    monkeypatch.setattr(app.model_files, "_check", lambda folder, settings, single_file: looked.append(single_file))
    file = tmp_path / "flux1-dev.safetensors"
    save_file({"weight": torch.zeros(1)}, file)
    settings = Settings(transformer=str(file))
    checked = check_local_checkpoint(settings)
    fetch_and_check(settings, checked)
    assert looked == [file]
    save_file({"weight": torch.ones(2)}, file)
    fetch_and_check(settings, checked)
    fetch_and_check(Settings(), checked)
    assert looked == [file, file, None]


def test_a_hub_id_is_no_folder() -> None:
    assert local_folder("black-forest-labs/FLUX.1-dev") is None


def test_only_the_parts_that_the_index_names_are_wanted(tmp_path: Path) -> None:
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    patterns = [f"vae/*.{suffix}" for suffix in ("json", "safetensors", "txt", "model", "jinja")]
    assert wanted_files(tmp_path) == ["model_index.json", *patterns]


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs; the model is gated by the token."""

    files: dict[str, Path]
    requests: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.requests.append(path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(HTTPStatus.FORBIDDEN, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif match := re.fullmatch(f"/api/models/{REPO}/(revision|tree)/(.+)", path):
            if match[2] not in ("main", "v1", COMMIT):
                self._answer(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RevisionNotFound"})
            elif match[1] == "tree":
                self._json([{"type": "file", "path": name, **self._about(name)} for name in self.files])
            else:
                siblings = [{"rfilename": name} for name in self.files]
                self._json({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            data = self.files[name].read_bytes()
            self._answer(HTTPStatus.OK, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{self._about(name)["oid"]}"'})
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"", {"X-Error-Code": "RepoNotFound"})

    def _about(self, name: str) -> dict:
        data = self.files[name].read_bytes()
        return {"size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, content: object) -> None:
        self._answer(HTTPStatus.OK, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    model = make_checkpoint("flux.2-klein-4b", "tiny", tmp_path_factory.mktemp("hub") / "model")
    (model / "flux-2-klein.safetensors").write_bytes(b"for other programs")
    (model / "text_encoder" / "pytorch_model.bin").write_bytes(b"a pickle")
    Hub.files = {str(path.relative_to(model)): path for path in sorted(model.rglob("*.*"))}
    Hub.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", model
    server.shutdown()
    server.server_close()


def download(endpoint: str, home: Path, model: str = REPO, revision: str | None = None, **environment: str):
    """Call `model_folder` with a hub's settings."""
    code = (
        "from app.model_files import model_folder; from app.settings import Settings; "
        f"print(model_folder(Settings(model={model!r}, revision={revision!r})))"
    )
    return run(code, endpoint, home, **environment)


def run(code: str, endpoint: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own: huggingface_hub reads its environment once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    values = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_DEBUG": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=values, capture_output=True, text=True, timeout=120
    )


def test_a_model_comes_from_the_hub_with_the_token_of_a_mounted_secret(hub: tuple[str, Path], tmp_path: Path) -> None:
    endpoint, source = hub
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    done = download(endpoint, tmp_path / "home", revision="v1", HF_TOKEN_PATH=str(secret))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    got = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert got == Hub.files.keys() - {"flux-2-klein.safetensors", "text_encoder/pytorch_model.bin"}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in got)
    assert TOKEN not in done.stdout + done.stderr
    # It is there now, and needs no hub any more.
    offline = download("http://127.0.0.1:9", tmp_path / "home", revision="v1", HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr


def test_beside_a_single_file_the_transformers_weights_stay_on_the_hub(hub: tuple[str, Path], tmp_path: Path) -> None:
    settings = f"Settings(model={REPO!r}, revision='v1', transformer='flux-2-klein.safetensors')"
    code = f"from app.model_files import *; print(model_folder({settings}))"
    done = run(code, hub[0], tmp_path / "home", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    got = {path.name for path in Path(done.stdout.strip(), "transformer").iterdir()}
    assert got == {"config.json"}


def test_a_repository_of_single_files_is_named(
    hub: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "files", {"flux-2-klein.safetensors": Hub.files["flux-2-klein.safetensors"]})
    done = download(hub[0], tmp_path / "home", HF_TOKEN=TOKEN)
    last = done.stderr.strip().splitlines()[-1]
    assert f"model {REPO!r} on the hub has no model_index.json: it is not in diffusers layout; one file with a" in last


EVERY_PROCESS = f"""
import asyncio
import huggingface_hub, app.model_files
from app.cluster.coordinator import Coordinator
from app.cluster.rank import Rank
from app.components.prompt_encoder import PromptEncoder
from app.components.vae import ImageDecoder
from app.settings import Settings

asked = []
def snapshot_download(model, *, revision, **options):
    asked.append(revision)
    return huggingface_hub.snapshot_download(model, revision=revision, **options)
app.model_files.snapshot_download = snapshot_download

settings = Settings(model={REPO!r}, revision="v1", threads_per_rank=1)
app.model_files.fetch_and_check(settings)
rank = Rank(settings, 0)
rank.load(None)
asyncio.run(Coordinator(settings).lead([], [], "native", "replica", rebuilds=0))
PromptEncoder(settings)
ImageDecoder(settings)
print(*asked)
"""


def test_every_process_reads_the_pinned_revision(hub: tuple[str, Path], tmp_path: Path) -> None:
    """Each names it itself: the cache knows no ``main``, and offline it cannot be asked for."""
    assert download(hub[0], tmp_path / "home", revision="v1", HF_TOKEN=TOKEN).returncode == 0
    done = run(EVERY_PROCESS, "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    # The replica's check, the rank, the coordinator, the encoder, the decoder: the index, then the files of its commit.
    assert done.stdout.split() == ["v1", COMMIT] * 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, f"it is gated: accept its licence at https://huggingface.co/{REPO}, and give the nodes a token"),
        ({"HF_TOKEN": TOKEN, "model": "acme/nothing"}, "there is no such model, or the token in HF_TOKEN"),
        ({"HF_TOKEN": TOKEN, "revision": "v9"}, "it has no revision 'v9': name a commit, tag or branch"),
        ({"HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}, "it is not in this node's cache (HF_HOME) and the hub cannot"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(hub: tuple[str, Path], tmp_path: Path, options, reason: str) -> None:
    done = download(hub[0], tmp_path / "home", **options)
    last = done.stderr.strip().splitlines()[-1]
    name = options.get("model", REPO)
    assert f"CheckpointError: model {name!r} cannot be had from the Hugging Face hub: {reason}" in last
    assert TOKEN not in done.stdout + done.stderr


def test_compiled_kernels_are_kept_beside_the_models_unless_a_folder_is_named(tmp_path: Path) -> None:
    told = [sys.executable, "-c", "from app.model_files import *; print(compile_cache(Settings()))"]
    made = subprocess.run(told, env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == str(tmp_path / "flux-compiled")
    assert compile_cache(Settings(compile_cache_dir="~/compiled")) == Path.home() / "compiled"
