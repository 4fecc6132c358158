"""Settings: documented, strict, and an error tells the field, the value and the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.settings import MagCacheSettings, Settings, describe, table
from tests.wrong_settings import assert_refused


def test_the_defaults_are_valid_and_frozen() -> None:
    settings = Settings()
    assert settings.model_name == "flux-tiny"
    with pytest.raises(ValidationError, match="frozen"):
        settings.num_replicas = 2


@pytest.mark.parametrize(
    ("model", "served", "name"),
    [
        ("models/flux-tiny", None, "flux-tiny"),
        ("/data/flux/", None, "flux"),
        ("black-forest-labs/FLUX.1-dev", None, "FLUX.1-dev"),
        ("models/flux-tiny", "acme/flux", "acme/flux"),
        ("models/flux-tiny", ["flux", "gpt-image-1"], "flux"),
    ],
)
def test_the_models_name(model: str, served: str | list[str] | None, name: str) -> None:
    assert Settings(model=model, served_model_name=served).model_name == name


def test_helpers_run_where_the_ranks_run_unless_told() -> None:
    settings = Settings(device="cuda", text_encoder={"placement": "cpu"})
    assert (settings.encoder_runs_on, settings.decoder_runs_on) == ("cpu", "cuda")
    settings = Settings(device="cuda", text_encoder={"placement": "offload"}, vae={"placement": "cpu"})
    assert (settings.encoder_runs_on, settings.decoder_runs_on) == ("cuda", "cpu")
    assert Settings(device="cpu", vae={"placement": "gpu"}).decoder_runs_on == "cuda"
    assert not settings.encoder_is_in_api
    settings = Settings(device="cuda", text_encoder={"placement": "api"}, vae={"placement": "api"})
    assert (settings.encoder_runs_on, settings.decoder_runs_on) == ("cpu", "cpu")
    assert settings.encoder_is_in_api
    assert settings.decoder_is_in_api


def test_the_decoder_is_compiled_where_it_runs_on_a_gpu() -> None:
    assert Settings(device="cuda", compile=True).decoder_is_compiled
    assert not Settings(device="cuda").decoder_is_compiled
    for placement in ("cpu", "api"):
        assert not Settings(device="cuda", compile=True, vae={"placement": placement}).decoder_is_compiled


@pytest.mark.parametrize(
    ("values", "place", "words"),
    [
        ({"tensor_paralel_size": 2}, (), "unknown setting 'tensor_paralel_size'; did you mean 'tensor_parallel_size'?"),
        ({1: 2}, (), "unknown setting '1'"),
        ({"num_replicas": "2"}, ("num_replicas",), "valid integer"),
        ({"num_replicas": True}, ("num_replicas",), "valid integer"),
        ({"num_replicas": 0}, ("num_replicas",), "greater than or equal to 1"),
        ({"num_replicas": 3, "autoscaling": {"max_replicas": 2}}, (), "raise it to at least num_replicas, 3"),
        ({"placement_group_strategy": "pack"}, ("placement_group_strategy",), "'PACK', 'STRICT_PACK', 'SPREAD'"),
        ({"device": "gpu"}, ("device",), "'cpu' or 'cuda'"),
        ({"dtype": "float16"}, (), "choose 'float32'"),
        ({"attention_backend": "xformers"}, (), "'xformers', which needs CUDA, and device is 'cpu'"),
        ({"attention_backend": "cudnn"}, (), "'cudnn', which needs CUDA, and device is 'cpu'; choose 'auto'"),
        ({"attention_backend": "flash", "device": "cuda"}, (), "'flash', which has no float32 kernels on CUDA"),
        ({"cuda_graphs": True}, (), "cuda_graphs is true, and device is 'cpu', which has none; set it to false"),
        ({"quantization": "fp8", "device": "cuda"}, (), "quantization is 'fp8' and dtype 'float32'; set dtype to 'bf"),
        (
            {"quantization": "fp8", "device": "cuda", "dtype": "bfloat16"},
            (),
            "compile is false: operator by operator",
        ),
        ({"quantization": "int4"}, ("quantization",), "'fp8'"),
        ({"model": ""}, ("model",), "at least 1 character"),
        ({"model": "/"}, ("model",), "name a folder or a hub id"),
        ({"served_model_name": "a\nb"}, ("served_model_name",), "printable"),
        ({"served_model_name": ["a", ""]}, ("served_model_name",), "at least one"),
        ({"served_model_name": ["a", "b", "a"]}, ("served_model_name",), "give each name once"),
        ({"gpus_per_rank": 0.5}, ("gpus_per_rank",), "greater than 0.5"),
        ({"cpus_per_rank": float("nan")}, ("cpus_per_rank",), "finite"),
        ({"log_level": "info"}, ("log_level",), "'INFO'"),
        ({"max_batch_tokens": 500}, (), "the largest image with true CFG has 576 tokens: raise max_batch_tokens"),
        ({"max_waiting_pictures": 400}, (), "max_ongoing_requests is 320; raise it to at least 408"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    assert_refused(values, place, words)


def test_every_wrong_setting_of_a_section_is_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"num_replicas": 0, "device": "tpu", "magcache": {"enabled": 1}})
    assert {error["loc"] for error in caught.value.errors()} == {
        ("num_replicas",), ("device",), ("magcache", "enabled")
    }  # fmt: skip


def test_every_setting_is_documented_with_its_default() -> None:
    rows = list(describe())
    names = [name for name, _, _ in rows]
    assert len(names) == len(set(names))
    assert {"tensor_parallel_size", "sampling.max_n", "magcache.profile"} <= set(names)
    for name, default, description in rows:
        assert description.endswith("."), name
        value: Any = Settings()
        for part in name.split("."):
            value = getattr(value, part)
        assert not isinstance(value, BaseModel)
        assert default == ("null" if value is None else str(value).lower() if isinstance(value, bool) else str(value))
        assert f"| `{name}` | `{default}` | {description} |" in table()


def test_the_module_prints_the_table() -> None:
    printed = subprocess.run([sys.executable, "-m", "app.settings"], capture_output=True, text=True, check=True)
    assert printed.stdout == table() + "\n"
    assert printed.stderr == ""


def test_calibrating_when_idle_needs_a_folder() -> None:
    with pytest.raises(ValueError, match=r"name the folder for profiles in magcache\.profile_dir"):
        Settings(magcache=MagCacheSettings(calibrate="idle"))
    assert Settings(magcache=MagCacheSettings(calibrate="idle", profile_dir="profiles")).magcache.calibrate == "idle"


@pytest.mark.parametrize(
    ("profile_dir", "home", "folder"),
    [
        ("$HF_HOME/profiles", None, "/ann/.cache/huggingface/profiles"),
        ("$HF_HOME/profiles", "/models", "/models/profiles"),
        ("~/profiles", None, "/ann/profiles"),
        ("/data", None, "/data"),
    ],
)
def test_where_profiles_are_kept(
    monkeypatch: pytest.MonkeyPatch, profile_dir: str, home: str | None, folder: str
) -> None:
    monkeypatch.setenv("HOME", "/ann")
    monkeypatch.delenv("HF_HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HF_HOME", home)
    assert MagCacheSettings(profile_dir=profile_dir).profile_folder == Path(folder)
    assert MagCacheSettings().profile_folder is None


@pytest.mark.parametrize("sooner", ["hang_timeout_s", "start_timeout_s"])
def test_time_limits_out_of_order_are_refused(sooner: str) -> None:
    limits = {"hang_timeout_s": 9.0, "start_timeout_s": 9.0, "collective_timeout_s": 50.0, sooner: 50.0}
    with pytest.raises(ValidationError, match=f"{sooner} is 50 and collective_timeout_s 50; raise collective_"):
        Settings.model_validate(limits)
