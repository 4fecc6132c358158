"""What to say of a field that this API does not have: other programs' names first, similar ones after them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from app.api.schemas import EditsRequest, ImagesRequest, LoraBody, MagCacheBody
from app.settings import unknown_name

Refusal = Callable[[dict[str, Any]], str | None]
"""Why a request with these fields would be refused; None when it would not."""

# Ours -> what diffusers, the other image APIs and the web interfaces call it.
_OTHER_NAMES: Mapping[str, str] = {
    "num_inference_steps": "steps num_steps inference_steps sampling_steps sample_steps sampler_steps ddim_steps "
    "step_count",
    "n": "num_images_per_prompt num_images batch_size num_outputs number_of_images image_count num_samples samples "
    "n_samples n_iter num_results",
    "guidance_scale": "cfg guidance distilled_cfg distilled_cfg_scale distilled_guidance guidance_strength",
    "true_cfg_scale": "true_cfg true_guidance_scale negative_guidance_scale",
    "prompt": "text text_prompt positive_prompt positive input inputs query caption description",
    "negative_prompt": "negative neg_prompt prompt_negative negative_text",
    "seed": "noise_seed random_seed manual_seed generator rng_seed",
    "size": "image_size resolution dimensions img_size",
    "model": "model_name model_id checkpoint sd_model_checkpoint ckpt engine",
    "output_format": "format image_format file_format file_type extension output_type",
    "output_compression": "output_quality jpeg_quality jpg_quality compression image_quality",
    "response_format": "return_type response_type return_format",
    "strength": "strength denoise denoising_strength image_strength prompt_strength img2img_strength",
    "deadline_s": "deadline timeout timeout_s max_seconds",
    "partial_images": "previews num_previews",
    "lora": "loras lora_weights lora_adapters adapters",
}
_LORA_NAMES: Mapping[str, str] = {
    "name": "id path model file lora lora_name adapter adapter_name",
    "scale": "weight strength strength_model lora_scale multiplier",
}
_NO_SUCH_THING: Mapping[str, str] = {
    "the sampler is flow-match Euler, as FLUX was trained, and no request changes it": "sampler sampler_name "
    "sampler_index scheduler schedule_type schedule sigmas timesteps eta karras use_karras_sigmas shift",
    "the size is given as WIDTHxHEIGHT in pixels": "aspect_ratio ratio ar",
    "weights are loaded when the service starts": "controlnet control_image vae",
    'the adapters of a form are JSON in one field, lora=[{"name": "…"}]': "lora[][name] lora[name] lora[][scale]",
    "the scale of an adapter stands beside its name in lora": "lora_scale lora_scales lora_strength adapter_weights "
    "joint_attention_kwargs cross_attention_kwargs",
    "there is no such filter": "safety_checker enable_safety_checker disable_safety_checker safety_tolerance nsfw",
}
# Of the edits endpoint: what is said there, and the names.
_OF_EDITS: Mapping[str, str] = {
    "images come in the field image": "image images image_url image_urls init_image init_images input_image "
    "input_images source_image source_images reference_image reference_images",
    "a mask comes in the field mask": "mask masks mask_url mask_image inpaint_mask",
    "no model here reads a markup: say in the prompt what to change, and where": "markup",
    # A field of its own there.
    "": "input_fidelity",
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_MEANT = {_plain(other): ours for ours, others in _OTHER_NAMES.items() for other in others.split()}
_EDIT_WORDS = {_plain(other): words for words, others in _OF_EDITS.items() for other in others.split()}
_WORDS = {_plain(other): words for words, others in _NO_SUCH_THING.items() for other in others.split()}


def explain_file(name: str) -> str:
    """What to say of a file of an edit whose name means nothing here."""
    return f"unknown file {name[:80]!r}: {_EDIT_WORDS.get(_plain(name)) or 'images come in the field image'}"


def explain_unknown(
    path: tuple[str, ...], body: Mapping[str, Any], schema: type[ImagesRequest], refusal: Refusal
) -> str:
    """A sentence on the unknown field at ``path`` of ``body``: what to write instead, if there is anything.

    A field that would itself be refused with this value is never offered; the sentence then says why it would be.
    """
    name = ".".join(path)
    if path[0] == "lora":
        return _explain_of_lora(int(path[1]), path[2], body["lora"], refusal)
    if len(path) > 1:
        value = body[path[0]][path[1]]
        return unknown_name(
            "field",
            name,
            [f"{path[0]}.{inner}" for inner in MagCacheBody.model_fields],
            lambda full: refusal({path[0]: {full.partition(".")[2]: value}}) is None,
        )
    unknown, value, plain = f"unknown field {name[:80]!r}; ", body[name], _plain(name)
    if plain in ("width", "height", "imagewidth", "imageheight"):
        size = _size(body)
        return unknown + (refusal({"size": size}) or f'did you mean size: "{size}"?')
    own = {_plain(field): field for field in [*schema.model_fields, "cfg_scale"]}
    nested = {_plain(field): field for field in MagCacheBody.model_fields}
    if plain in nested:
        inner = nested[plain]
        return unknown + (refusal({"magcache": {inner: value}}) or f"did you mean 'magcache.{inner}'?")
    if plain in _EDIT_WORDS and not issubclass(schema, EditsRequest):
        return unknown + "images to edit go to POST /v1/images/edits"
    if _EDIT_WORDS.get(plain):
        return unknown + _EDIT_WORDS[plain]
    if plain in _WORDS:
        return unknown + _WORDS[plain]
    if meant := own.get(plain) or _MEANT.get(plain):
        if meant not in own.values():
            return unknown + f"{meant} belongs to POST /v1/images/edits"
        return unknown + (refusal({meant: value}) or f"did you mean {meant!r}?")
    return unknown_name("field", name, own.values(), lambda field: refusal({field: value}) is None)


def _explain_of_lora(index: int, name: str, asked: list[dict[str, Any]], refusal: Refusal) -> str:
    """As `explain_unknown`, of the field ``name`` in the adapter at ``index``."""
    own = {_plain(other): ours for ours, others in _LORA_NAMES.items() for other in [ours, *others.split()]}
    rest = {field: value for field, value in asked[index].items() if field in LoraBody.model_fields}

    def fits(field: str) -> bool:
        corrected = rest | {field: asked[index][name]}
        return field not in rest and refusal({"lora": [corrected]}) is None

    meant = own.get(_plain(name))
    if meant is not None and fits(meant):
        return f"unknown field 'lora.{index}.{name[:80]}'; did you mean 'lora.{index}.{meant}'?"
    return unknown_name(
        "field",
        f"lora.{index}.{name}",
        [f"lora.{index}.{field}" for field in LoraBody.model_fields],
        lambda full: fits(full.rpartition(".")[2]),
    )


def _size(body: Mapping[str, Any]) -> str:
    """The sides that ``body`` names, as `size` has them; a side that is missing keeps its name."""
    sides = {_plain(name).removeprefix("image"): value for name, value in body.items()}
    width, height = (str(sides.get(side, side.upper()))[:20].removesuffix(".0") for side in ("width", "height"))
    return f"{width}x{height}"
