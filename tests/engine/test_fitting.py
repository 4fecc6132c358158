"""Parts that do not fit each other, and schedulers that sampling would not follow, are refused before the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.schedulers import scheduling_flow_match_euler_discrete

from app.engine.checkpoint import check_checkpoint
from app.engine.checkpoint_files import CheckpointError
from app.engine.sampling import FlowMatchSampler
from benchmarks.make_checkpoint import make_checkpoint
from tests.engine.damage import copy_of_flux_tiny, edit

SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return copy_of_flux_tiny(tmp_path / "model")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("flux.2-klein-4b", "tiny", tmp_path_factory.mktemp("klein") / "model")


@pytest.mark.parametrize("inputs", [384, 128, 96])
def test_a_transformer_with_further_inputs_is_refused(model: Path, inputs: int) -> None:
    """FLUX.1-Fill has 384 channels, the Control models (Canny, Depth) 128, and all give 64."""
    config = FluxTransformer2DModel.load_config(model / "transformer")
    made = FluxTransformer2DModel.from_config(config | {"in_channels": inputs, "out_channels": 64})
    made.save_pretrained(model / "transformer")
    message = (
        rf"takes {inputs} channels \(in_channels\) and gives 64, as FLUX\.1-Fill, -Canny and -Depth do, .+: use the"
    )
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(model, 1)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "transformer",
            {"in_channels": 128},
            r"takes 128 channels .+, and 16 latent channels of the VAE make 64: take",
        ),
        ("vae", {"latent_channels": 4}, r"takes 64 channels .+, and 4 latent channels of the VAE make 16: take both"),
        ("transformer", {"patch_size": 2}, r"takes 64 channels \(in_channels\) and gives 256"),
        ("transformer", {"joint_attention_dim": 64}, r"joint_attention_dim is 64, and text_encoder_2 gives .+ of 128"),
        (
            "transformer",
            {"pooled_projection_dim": 64},
            r"pooled_projection_dim is 64, and text_encoder gives .+ of 128",
        ),
        ("vae", {"shift_factor": None}, r"vae/config\.json: shift_factor is None, and FLUX\.1's VAE has a number: use"),
        ("transformer", {"axes_dims_rope": [4, 6, 6]}, r"axes_dims_rope is .+; the sum must be attention_head_dim, 32"),
        ("transformer", {"axes_dims_rope": None}, r"axes_dims_rope is None; the sum must be attention_head_dim, 32"),
        ("vae", {"scaling_factor": float("nan")}, r"vae/config\.json: scaling_factor is nan"),
        ("vae", {"block_out_channels": []}, r"vae/config\.json does not describe a AutoencoderKL: list index out of"),
        ("text_encoder", {"hidden_size": 0}, r"text_encoder/config\.json does not describe a CLIPTextModel"),
        ("vae", {"scaling_factor": "x"}, r"vae/config\.json: scaling_factor is 'x'"),
        (
            "vae",
            {"in_channels": 4},
            r"the VAE makes latents of 1/8 of the size from 4 channels; FLUX's are 1/8, from 3",
        ),
        (
            "vae",
            {"block_out_channels": [16, 32, 64]}
            | {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
            r"the VAE makes latents of 1/4 of the size",
        ),
    ],
)
def test_parts_of_different_models_are_refused(model: Path, file: str, values: dict, message: str) -> None:
    edit(model / file / "config.json", **values)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(model, 1)


def test_kontext_without_guidance_is_refused(model: Path) -> None:
    edit(model / "model_index.json", _class_name="FluxKontextPipeline")
    edit(model / "transformer" / "config.json", guidance_embeds=False)
    with pytest.raises(CheckpointError, match=r"the transformer has no guidance embedding, unlike FLUX\.1-Kontext's"):
        check_checkpoint(model, 1)


def test_the_other_sizes_qwen3_is_refused(klein: Path, tmp_path: Path) -> None:
    """klein-9B's encoder beside klein-4B's transformer."""
    model = Path(shutil.copytree(klein, tmp_path / "model"))
    edit(model / "text_encoder" / "config.json", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"joint_attention_dim is 96, and text_encoder gives embeddings of 192"):
        check_checkpoint(model, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            r"class 'FlowMatchHeunDiscreteScheduler'; sampling needs .+",
        ),
        (
            {"stochastic_sampling": True},
            r"with stochastic_sampling noise is added at each step, which is not served: rem",
        ),
        ({"invert_sigmas": True}, r"with invert_sigmas sampling runs from 0 to 1, which is not served: remove it"),
        ({"num_train_timesteps": 500}, r"num_train_timesteps is 500; FLUX's are 1000"),
        (
            {"use_flow_sigmas": True},
            r"use_flow_sigmas is True, which FlowMatchEulerDiscreteScheduler does not know: rem",
        ),
        ({"algorithm_type": "dpmsolver++"}, r"algorithm_type is 'dpmsolver\+\+', which .+ does not know: remove it"),
        (
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            r"no noise schedule \(Only one of .+\): use the sch",
        ),
        (
            {"time_shift_type": "cubic"},
            r"no noise schedule \(`time_shift_type` must either be 'exponential' or 'linear'",
        ),
        ({"base_shift": None}, r"gives no noise schedule \(unsupported operand"),
        ({"max_image_seq_len": 256}, r"gives no noise schedule \(float division by zero\): use the scheduler folder"),
        ({"shift_terminal": -0.5}, r"its noise schedule, .+, does not fall from 1 to 0: use the"),
    ],
)
def test_a_scheduler_that_sampling_would_not_follow_is_refused(model: Path, values: dict, message: str) -> None:
    edit(model / SCHEDULER, **values)
    with pytest.raises(CheckpointError, match=rf"scheduler_config\.json.*{message}"):
        check_checkpoint(model, 1)


def test_beta_sigmas_need_scipy(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling_flow_match_euler_discrete, "is_scipy_available", lambda: False)
    edit(model / SCHEDULER, use_beta_sigmas=True)
    with pytest.raises(CheckpointError, match=r"no noise schedule \(Make sure to install scipy"):
        check_checkpoint(model, 1)


def test_the_pipelines_listed_scheduler_counts_as_well(model: Path) -> None:
    edit(model / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    with pytest.raises(CheckpointError, match=r"model_index\.json: scheduler is 'DPMSolverMultistepScheduler'; this"):
        check_checkpoint(model, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"time_shift_type": "linear"},
        {"shift_terminal": 0.02},
        {"use_dynamic_shifting": False, "shift": 2.0},
        {"prediction_type": None},
    ],
)
def test_options_that_sampling_follows_are_served(model: Path, values: dict) -> None:
    """As diffusers' pipeline does: it gives the scheduler evenly spaced sigmas, and the shift for the image's size."""
    edit(model / SCHEDULER, **values)
    check_checkpoint(model, 1)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
    config = scheduler.config
    mu = calculate_shift(64, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    scheduler.set_timesteps(sigmas=[1 - step / 12 for step in range(12)], mu=mu)
    assert FlowMatchSampler(model).sigmas(12, 64).tolist() == pytest.approx(scheduler.sigmas.tolist())
