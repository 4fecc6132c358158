"""The Serve configs say only what Serve and our settings understand."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import ServeDeploySchema

from app.engine.families import FEW_STEPS
from app.main import needed_resources
from app.settings import Settings
from benchmarks import fits
from magcache_core import load_profile

FOLDER = Path(__file__).parent.parent / "deployments"
FILES = sorted(FOLDER.glob("*.yaml"))


def _load(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(config, dict)
    return config


def _settings(path: Path) -> Settings:
    (application,) = _load(path)["applications"]
    return Settings(**application["args"])


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside an annotation such as ``Optional[List[Model]]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _unknown_keys(value: Any, model: type[BaseModel], path: str = "") -> list[str]:
    """Serve ignores keys that it does not know, so a misspelt one would have no effect and no message."""
    if isinstance(value, list):
        return [key for index, item in enumerate(value) for key in _unknown_keys(item, model, f"{path}[{index}]")]
    found = [f"{path}.{key}" for key in value if key not in model.model_fields]
    for name, field in model.model_fields.items():
        for inner in _models(field.annotation):
            if value.get(name) is not None:
                found += _unknown_keys(value[name], inner, f"{path}.{name}")
    return found


MODELS = {
    "flux-tiny.yaml": ("models/flux-tiny", 28),
    "flux.yaml": ("black-forest-labs/FLUX.1-dev", 28),
    "flux-schnell.yaml": ("black-forest-labs/FLUX.1-schnell", 4),
    "flux-kontext.yaml": ("black-forest-labs/FLUX.1-Kontext-dev", 28),
    "flux2-klein.yaml": ("black-forest-labs/FLUX.2-klein-4B", 4),
}
LARGE = [name for name in MODELS if name != "flux-tiny.yaml"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_config(name: str) -> None:
    settings = _settings(FOLDER / name)
    assert (settings.model, settings.sampling.num_inference_steps) == MODELS[name]
    assert settings.model_name == MODELS[name][0].rpartition("/")[2]


@pytest.mark.parametrize("name", LARGE)
def test_it_fits_the_cards_that_its_comment_names(name: str) -> None:
    """The memory that was computed from the real geometry, and the shares of a GPU that Ray hands out."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    settings = _settings(FOLDER / name)
    (count, size) = re.search(r"on (one|two) GPUs? of (\d+) GB", text).groups()  # type: ignore[union-attr]
    cards = {"one": 1, "two": 2}[count]
    assert cards == settings.tensor_parallel_size
    gpus = settings.tensor_parallel_size * settings.gpus_per_rank + 2 * settings.gpus_per_helper
    assert gpus == pytest.approx(cards)
    report = json.loads(fits.RESULTS.read_text(encoding="utf-8"))["models"]
    fit = fits.fit(report[settings.model.rpartition("/")[2].lower()], cards, int(size))
    assert fit is not None
    assert (fit.tensor_parallel_size, fit.text_encoder, fit.fp8) == (cards, "gpu", False)
    assert settings.max_batch_rows <= fit.rows


@pytest.mark.parametrize("name", LARGE)
def test_it_says_what_other_hardware_needs(name: str) -> None:
    head = (FOLDER / name).read_text(encoding="utf-8").partition("\nproxy_location")[0]
    words = re.sub(r"\n# +", " ", head)
    for topic in ("Memory: ", "24 GB cards: ", "One card", "Several nodes: ", "docs/models.md"):
        assert topic in words


@pytest.mark.parametrize("name", ["flux-schnell.yaml", "flux2-klein.yaml"])
def test_models_of_few_steps_compute_all_of_them(name: str) -> None:
    settings = _settings(FOLDER / name)
    # Enabled, so that replies give the reason why nothing is reused.
    assert settings.magcache.enabled
    assert settings.magcache.profile is None
    assert settings.sampling.num_inference_steps <= FEW_STEPS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_parses_and_has_no_unknown_key(path: Path) -> None:
    config = _load(path)
    schema = ServeDeploySchema.model_validate(config)
    assert [(app.name, app.import_path) for app in schema.applications] == [("flux", "app.main:build")]
    assert _unknown_keys(config, ServeDeploySchema) == []
    assert _settings(path)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ((), "proxy_locations"),
        (("http_options",), "hots"),
        (("logging_config",), "levle"),
        (("applications", 0), "arg"),
    ],
)
def test_the_lint_finds_a_misspelt_key(place: tuple[str | int, ...], key: str) -> None:
    config: Any = _load(FOLDER / "flux-tiny.yaml")
    target = config
    for part in place:
        target = target[part]
    target[key] = 1
    assert [found.rpartition(".")[2] for found in _unknown_keys(config, ServeDeploySchema)] == [key]


@pytest.mark.parametrize("section", ["", "sampling", "magcache"])
def test_a_misspelt_setting_is_refused(section: str) -> None:
    (application,) = _load(FOLDER / "flux-tiny.yaml")["applications"]
    args = copy.deepcopy(application["args"])
    name = next(iter(args[section] if section else args))
    (args[section] if section else args)[name + "x"] = 1
    with pytest.raises(ValidationError, match=f"did you mean '{name}'"):
        Settings(**args)


def test_flux_tiny_fits_two_cpus_and_stays_on_this_machine() -> None:
    path = FOLDER / "flux-tiny.yaml"
    settings = _settings(path)
    assert needed_resources(settings) == {"CPU": 1.25, "GPU": 0.0}
    assert (settings.device, settings.tensor_parallel_size) == ("cpu", 2)
    assert (settings.encoder_runs_on, settings.decoder_runs_on) == ("cpu", "cpu")
    assert (FOLDER.parent / settings.model).name == settings.model_name == "flux-tiny"
    assert _load(path)["http_options"] == {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 300}


def test_flux_is_flux_dev_on_two_gpus_with_the_authors_magcache() -> None:
    settings = _settings(FOLDER / "flux.yaml")
    assert (settings.model, settings.device, settings.dtype) == ("black-forest-labs/FLUX.1-dev", "cuda", "bfloat16")
    gpus = settings.tensor_parallel_size * settings.gpus_per_rank + 2 * settings.gpus_per_helper
    assert gpus == pytest.approx(2)
    magcache, sampling = settings.magcache, settings.sampling
    assert magcache.profile is not None
    profile = load_profile(magcache.profile)
    assert (profile.threshold, profile.max_skip_steps, profile.retention_ratio) == (0.24, 5, 0.1)
    # What is left to the profile follows the calibrated one as soon as there is one.
    assert (magcache.mag_threshold, magcache.mag_max_skip_steps, magcache.mag_retention_ratio) == (None, None, None)
    assert (magcache.calibrate, magcache.profile_dir) == ("idle", "$HF_HOME/magcache-profiles")
    assert (sampling.default_width, sampling.default_height, sampling.max_sequence_length) == (1024, 1024, 512)


@pytest.mark.parametrize("name", LARGE)
def test_models_on_gpus_are_compiled(name: str) -> None:
    settings = _settings(FOLDER / name)
    assert (settings.device, settings.compile, settings.attention_backend) == ("cuda", True, "auto")
