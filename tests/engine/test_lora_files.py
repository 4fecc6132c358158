"""Reading adapters: every layout gives what diffusers' converters give, and a damaged or foreign file says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_fal_kontext_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
)
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file

from app.engine.lora_files import LowRank, check_lora, lora_digest, read_lora
from app.engine.lora_names import LoraError, Target, targets
from app.engine.single_file import bfl_modules
from tests.engine.lora_cases import RANK, Pair, flux_tiny, random_adapter, save_peft

KNOWN = targets(flux_tiny())
LINEAR = "transformer_blocks.1.ff.net.2"


@pytest.fixture(scope="module")
def dev() -> FluxTransformer2DModel:
    """FLUX.1-dev's geometry, which diffusers' converters take for granted."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def joint(transformer: FluxTransformer2DModel, chosen: Callable[[str], bool]) -> dict[str, Pair]:
    """A random adapter of rank 1, by module of BFL's layout."""
    known = targets(transformer)
    generator = torch.Generator().manual_seed(3)
    made = {}
    for module, _ in bfl_modules(transformer):
        target: Target | None = known.get(module.replace(".", "_"))
        if target is not None and chosen(module):
            outputs = sum(target.outputs.values())
            made[module] = (
                torch.randn(1, target.inputs, generator=generator),
                torch.randn(outputs, 1, generator=generator),
            )
    return made


def same(ours: dict[str, LowRank], theirs: dict[str, torch.Tensor]) -> None:
    """The products are the same; diffusers may put alpha into the other half."""
    names = {key.removeprefix("transformer.").split(".lora_")[0] for key in theirs}
    assert set(ours) == names
    plain = {key.removeprefix("transformer."): value for key, value in theirs.items()}
    for name, one in ours.items():
        down, up = plain[f"{name}.lora_A.weight"], plain[f"{name}.lora_B.weight"]
        # One row and one column say all of a product of rank 1, and much of any other.
        assert torch.allclose(one.up[:1] @ one.down, up[:1] @ down, rtol=1e-5), name
        assert torch.allclose(one.up @ one.down[:, :1], up @ down[:, :1], rtol=1e-5), name


def test_kohyas_layout_is_read_as_diffusers_does(dev: FluxTransformer2DModel, tmp_path: Path) -> None:
    tensors = {}
    # The final layer's alpha, which diffusers passes over, is left out.
    for module, (down, up) in joint(dev, lambda name: name.split(".")[0] != "time_in").items():
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if "final_layer" not in module:
            tensors[f"{name}.alpha"] = torch.tensor(0.25)
    save_file(tensors, tmp_path / "kohya.safetensors")
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    same(read_lora(tmp_path / "kohya.safetensors", targets(dev)), theirs)


def test_bfls_layout_is_read_as_diffusers_does(dev: FluxTransformer2DModel, tmp_path: Path) -> None:
    tensors = {}
    for module, (down, up) in joint(dev, lambda name: "blocks" in name or name == "final_layer.linear").items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, tmp_path / "bfl.safetensors")
    theirs = _convert_fal_kontext_lora_to_diffusers(dict(tensors))
    same(read_lora(tmp_path / "bfl.safetensors", targets(dev)), theirs)


def test_pefts_configuration_scales_as_in_peft(tmp_path: Path) -> None:
    adapter = random_adapter(flux_tiny(), 1, lambda name: ".ff." in name)
    pattern = {"transformer_blocks.1.ff.net.2": 12}
    path = save_peft(tmp_path / "a.safetensors", adapter, lora_alpha=6, r=RANK, alpha_pattern=pattern)
    read = read_lora(path, KNOWN)
    for name, one in read.items():
        scale = 4.0 if name == LINEAR else 2.0
        assert torch.equal(one.down, adapter[name][0] * scale), name
    path = save_peft(tmp_path / "b.safetensors", adapter, lora_alpha=6, r=RANK, use_rslora=True)
    assert torch.allclose(read_lora(path, KNOWN)[LINEAR].down, adapter[LINEAR][0] * 6 / RANK**0.5)


def test_text_encoders_parts_are_passed_over_and_said(tmp_path: Path) -> None:
    path = save_peft(tmp_path / "a.safetensors", random_adapter(flux_tiny(), 1, lambda name: name == LINEAR))
    assert not check_lora(path, KNOWN).text_encoder
    more = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 4)}
    save_file(load_file(path) | more, path)
    assert check_lora(path, KNOWN).text_encoder
    assert set(read_lora(path, KNOWN)) == {LINEAR}


def test_the_header_says_rank_and_size(tmp_path: Path) -> None:
    save_peft(tmp_path / "a.safetensors", random_adapter(flux_tiny(), 1, lambda name: name.endswith("proj_mlp")))
    info = check_lora(tmp_path / "a.safetensors", KNOWN)
    assert (info.rank, info.linears, info.weights) == (RANK, 4, 4 * RANK * (192 + 768))
    assert not info.text_encoder


def test_a_replaced_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_peft(path, random_adapter(flux_tiny(), 1, lambda name: name == LINEAR))
    digest = lora_digest(path)
    assert set(read_lora(path, KNOWN, digest)) == {LINEAR}
    save_peft(path, random_adapter(flux_tiny(), 2, lambda name: name == LINEAR))
    with pytest.raises(LoraError, match=r"a\.safetensors was replaced since it was listed: reload"):
        read_lora(path, KNOWN, digest)


DOWN, UP = f"transformer.{LINEAR}.lora_A.weight", f"transformer.{LINEAR}.lora_B.weight"
GOOD = {DOWN: torch.ones(2, 768), UP: torch.ones(192, 2)}


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({DOWN: torch.ones(2, 768)}, "no up part of transformer_blocks_1_ff_net_2"),
        (GOOD | {UP: torch.ones(192, 3)}, r"shapes \(2, 768\) and \(192, 3\).*\(192, 2\).*another model"),
        (GOOD | {DOWN: torch.ones(0, 768), UP: torch.ones(192, 0)}, "rank must be at least 1"),
        (GOOD | {f"transformer.{LINEAR}.alpha": torch.ones(2)}, "not a single number"),
        ({key.replace("blocks.1", "blocks.7"): one for key, one in GOOD.items()}, "belongs to another model"),
        (GOOD | {DOWN.replace("lora_A", "lora_down"): torch.ones(2, 768)}, "holds both"),
        (
            GOOD
            | {
                f"double_blocks.1.img_mlp.2.lora_{part}.weight": one.clone()
                for part, one in zip("AB", GOOD.values(), strict=True)
            },
            f"changes {LINEAR} twice",
        ),
        ({"text_encoder.a.lora_A.weight": torch.ones(1, 1)}, "changes no part of the transformer"),
        (GOOD | {"transformer.x_embedder.dora_scale": torch.ones(1)}, "is a DoRA"),
    ],
)
def test_what_cannot_be_applied_is_known_from_the_header(
    tensors: dict[str, torch.Tensor], reason: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    for read in (check_lora, read_lora):
        with pytest.raises(LoraError, match=rf"(?s)a\.safetensors.*{reason}"):
            read(tmp_path / "a.safetensors", KNOWN)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    save_file(GOOD | {UP: torch.full((192, 2), value)}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match=r"lora_B.*not finite"):
        read_lora(tmp_path / "a.safetensors", KNOWN)


@pytest.mark.parametrize("config", ["{", json.dumps({"transformer.use_dora": True})])
def test_a_dora_or_damaged_configuration_is_refused(config: str, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "a.safetensors", {"lora_adapter_metadata": config})
    with pytest.raises(LoraError, match="lora_adapter_metadata"):
        check_lora(tmp_path / "a.safetensors", KNOWN)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:-8])
    for read in (check_lora, read_lora):
        with pytest.raises(LoraError, match=r"a\.safetensors cannot be read"):
            read(path, KNOWN)


def test_diffusers_takes_the_same_layout_for_kohyas(tmp_path: Path) -> None:
    """The pipeline's own choice of converter, not only the converter."""
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lora_down.weight": torch.randn(3, 192), f"{name}.lora_up.weight": torch.randn(576, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = FluxLoraLoaderMixin.lora_state_dict(tmp_path, weight_name="a.safetensors")
    same(read_lora(tmp_path / "a.safetensors", KNOWN), theirs)
