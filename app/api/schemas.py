"""The OpenAI images dialect as pydantic models, with this service's own fields beside OpenAI's.

Strict: ``"28"`` is not ``28``, ``true`` is no number; ``28.0`` is the integer that it equals. ``null`` counts as absent
everywhere, as OpenAI has it.
"""

from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator

from app.api.backend import OutputFormat

MAX_SEED = 2**64 - 1
DRAW_A_SEED = -1
MOST_URGENT = 10
MAX_PARTIAL_IMAGES = 3
_DAY_S = 86400.0
_EXACT = 2**53
"""Integers up to here are exact as doubles."""

_IGNORED = "Accepted for OpenAI's clients, without effect and with a warning."

Quality = Literal["low", "medium", "high", "auto"]


def integral(value: object) -> object:
    """A float that is an integer as that integer: JSON has one kind of number, and some clients write ``1.0``."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT else value


class MagCacheBody(BaseModel):
    """A request's MagCache settings; what is left out is the server's, and then the profile's."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    enabled: bool | None = Field(default=None, description="Reuse residuals; `false` computes every step.")
    mag_threshold: float | None = Field(
        default=None, ge=0, description="Accumulated error at which a step must compute. Higher is faster and rougher."
    )
    mag_max_skip_steps: int | None = Field(default=None, ge=0, le=1000, description="Most steps reused in a row (K).")
    mag_retention_ratio: float | None = Field(
        default=None, ge=0, le=1, description="Leading share of the steps that always computes."
    )
    computed_steps: int | None = Field(
        default=None,
        ge=1,
        description="Compute exactly this many steps, at the best places; instead of `mag_threshold`.",
    )
    min_computed_steps: int | None = Field(
        default=None,
        ge=1,
        description="The fewest steps to compute when a deadline or a busy server would take some away.",
    )

    _integral = field_validator("mag_max_skip_steps", "computed_steps", "min_computed_steps", mode="before")(integral)


class LoraBody(BaseModel):
    """One low-rank adapter of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="One of those that `GET /v1/loras` lists.")
    scale: float | None = Field(default=None, description="How strongly it acts, 1 by default; may be negative.")


class ImagesRequest(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra={"example": {"prompt": "a red circle on a blue background", "seed": 7}},
    )

    prompt: str = Field(description="What the image shows.")
    model: str | None = Field(default=None, description="The served model's name; may be left out.")
    n: int | None = Field(default=None, ge=1, description="Number of images, 1 by default; image i uses seed + i.")
    size: str | None = Field(default=None, description="`WIDTHxHEIGHT` in pixels, or `auto` for the server's default.")
    response_format: Literal["b64_json", "file", "url"] | None = Field(
        default=None,
        description="`b64_json` (default); `url` for a `data:` URL of the file; or `file` for the bytes of one image.",
    )
    output_format: OutputFormat | None = Field(
        default=None, description="File format, `png` by default. `jpg` is `jpeg`."
    )
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of jpeg and webp, 100 by default; png is lossless."
    )
    negative_prompt: str | None = Field(
        default=None, description="What the image avoids; runs true CFG at the price of a second forward pass a step."
    )
    num_inference_steps: int | None = Field(default=None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(default=None, ge=0, le=100, description="Distilled guidance of FLUX.")
    true_cfg_scale: float | None = Field(
        default=None,
        ge=0,
        le=100,
        validation_alias=AliasChoices("true_cfg_scale", "cfg_scale"),
        description="Strength of `negative_prompt`: 2 by default, no effect at 1 or below. Alias: `cfg_scale`.",
    )
    seed: int | None = Field(
        default=None, ge=DRAW_A_SEED, le=MAX_SEED, description="Drawn and returned when left out or -1."
    )
    magcache: MagCacheBody | None = Field(default=None, description="MagCache settings of this request.")
    lora: list[LoraBody] | None = Field(
        default=None, description="Low-rank adapters of the transformer for this request's images; they add up."
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        default=None,
        description="Share of the steps that compute: the server's presets `low`, `medium` and `high`, or its default "
        "policy, `auto`. `standard` is `auto`; `hd`, `xhigh` and `max` are `high`.",
    )
    priority: int | None = Field(
        default=None,
        ge=-MOST_URGENT,
        le=MOST_URGENT,
        description="Higher goes first when requests wait, 0 by default; those that wait long overtake.",
    )
    deadline_s: float | None = Field(
        default=None,
        gt=0,
        le=_DAY_S,
        description="Seconds from now within which the images are wanted: fewer steps compute if that helps, and 422 "
        "comes at once if it does not.",
    )
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        default=None, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each image in a stream, 0 by default."
    )
    progress: bool | None = Field(
        default=None, description="Have `flux.progress` events of the steps in a stream. OpenAI has no such event."
    )
    metadata: bool | None = Field(
        default=None,
        description="Write prompt, seed, size, steps, schedule and model into the file, where web interfaces read "
        "them: a PNG's text `parameters`, or EXIF's user comment.",
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="FLUX paints opaque images only.")
    moderation: Literal["auto", "low"] | None = Field(
        default=None, description="Accepted and ignored; there is no moderation."
    )
    style: Literal["vivid", "natural"] | None = Field(
        default=None, description="Accepted, without effect and with a warning: describe a style in the prompt."
    )
    complexity: Any = Field(default=None, description=_IGNORED)
    frame_count: Any = Field(default=None, description=_IGNORED)
    frame_duration_ms: Any = Field(default=None, description=_IGNORED)
    svg: Any = Field(default=None, description=_IGNORED)
    user: str | None = Field(default=None, max_length=256, description="Accepted for OpenAI's clients; not used.")
    safety_identifier: str | None = Field(
        default=None, max_length=256, description="Accepted for OpenAI's clients; not used."
    )

    _integral = field_validator(
        "n", "output_compression", "num_inference_steps", "seed", "priority", "partial_images", mode="before"
    )(integral)

    @field_validator("output_format", mode="before")
    @classmethod
    def _jpeg(cls, value: object) -> object:
        return "jpeg" if value == "jpg" else value


class EditsRequest(ImagesRequest):
    """The fields of `POST /v1/images/edits`, beside the images."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "make the circle green", "seed": 7}})

    size: str | None = Field(
        default=None, description="`WIDTHxHEIGHT` in pixels, or `auto` for the shape of the (first) image."
    )
    strength: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="For models that start from the image: how much of it may change, 0.6 by default, with a mask 1; "
        "the share of the steps that run.",
    )
    input_fidelity: Literal["high", "low"] | None = Field(default=None, description="Accepted; without effect.")


# Why a value of an OpenAI field is refused, where the list of valid values does not explain itself.
REASONS = {
    "quality": "for every step, set magcache.enabled to false; for a number of them, magcache.computed_steps",
    "background": "FLUX paints opaque images only",
    "style": "this model has no style switch: describe the style in the prompt",
    "seed": "leave it out, or send -1, for a random one, which the reply names",
}


class MagCacheReply(BaseModel):
    """What MagCache did for one image."""

    enabled: bool
    schedule: str = Field(description="One letter a step: `C` computed, `.` reused.", examples=["CCC..C...C.C"])
    computed: int = Field(description="Computed steps of `schedule`.")
    skipped: int = Field(description="Reused steps of `schedule`.")
    predicted_error: float | None = Field(
        description="Comparable among schedules of one reuse mode; `null` when a reuse is longer than any measured one."
    )
    predicted_psnr_db: float | None = Field(
        description="Mean PSNR in dB that such images have against uncached ones, by the model's trials or what the "
        "quality guard measured; `null` where neither says."
    )
    quality_floor_db: float | None = Field(
        description="PSNR that the `quality` stands for here: trials of so many computed steps reached it on average. "
        "`null` where it is a share of the steps, and without a `quality`."
    )
    negative_schedule: str | None = Field(description="The schedule of the negative prompt's branch under true CFG.")
    lowered_by: Literal["deadline", "load"] | None = Field(description="What took computed steps away, if any.")
    uncached_reason: str | None = Field(description="Why every step was computed though MagCache is on, if so.")
    profile: str | None = Field(description="`NAME@VERSION` of the profile that the schedule was planned with, if any.")
    plan_reason: str | None = Field(description="Why the default is another one than the profile recommends, if so.")


class LoraReply(BaseModel):
    """An adapter that an image was made with."""

    name: str
    scale: float
    digest: str = Field(description="A hash of its file's content.", examples=["4be05c2f1a6d"])


class Timings(BaseModel):
    """Seconds by phase of one image."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    total_s: float


class ImageReply(BaseModel):
    """One image."""

    b64_json: str | None = Field(description="The file, base64; `null` with `response_format: url`.")
    url: str | None = Field(
        description="With `response_format: url` the file as a `data:` URL; also without one for a model named DALL-E."
    )
    seed: int = Field(description="The seed that makes this very image again.")
    magcache: MagCacheReply
    lora: list[LoraReply] = Field(description="The adapters that it was made with.")
    timings: Timings
    eta_s: float = Field(description="Seconds that denoising was estimated to take at its arrival, queue included.")
    queue_position: int = Field(description="Images before it at its arrival, itself counted; 0: there was room.")


class TokenDetails(BaseModel):
    """Input tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """The request's size in tokens, in OpenAI's form."""

    input_tokens: int
    output_tokens: int = Field(description="Tokens of the images: one for 16x16 pixels.")
    total_tokens: int
    input_tokens_details: TokenDetails


class ImagesReply(BaseModel):
    """The reply of `POST /v1/images/generations`."""

    created: int = Field(description="Unix time in seconds.")
    data: list[ImageReply]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Quality
    size: str = Field(examples=["1024x1024"])
    usage: Usage
    warnings: list[str] = Field(description="What was asked for and had no effect.")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=["invalid_request_error", "rate_limit_error", "server_error"])
    param: str | None = Field(description="The field at fault.")
    code: str | None


class ErrorReply(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody


class CancelReply(BaseModel):
    """The reply of `DELETE /v1/requests/{id}`."""

    id: str
    object: Literal["request.cancelled"] = "request.cancelled"
    pictures: int = Field(description="Images that were ended.")


class Capabilities(BaseModel):
    """What the served model takes beside a prompt."""

    images: int = Field(description="Images to edit in one request, at most.")
    strength: bool = Field(description="Whether an edit starts from its image; else the model reads it.")
    mask: bool = Field(description="Whether an edit may have a mask.")
    negative_prompt: bool


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    capabilities: Capabilities | None = Field(description="`null` while the service starts.")


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class LoraCard(BaseModel):
    """One adapter that requests may name."""

    id: str = Field(description="What `lora` names it.", examples=["watercolour"])
    object: Literal["lora"] = "lora"
    rank: int
    bytes: int = Field(description="The memory that it takes on a rank at most.")
    digest: str = Field(description="A hash of its file's content.", examples=["4be05c2f1a6d"])


class RefusedLora(BaseModel):
    """A file of the folder that is not offered."""

    id: str
    reason: str


class LoraList(BaseModel):
    """The adapters of the folder that the operator named."""

    object: Literal["list"] = "list"
    data: list[LoraCard]
    refused: list[RefusedLora] = Field(description="Files of the folder that are not offered.")


class HealthReply(BaseModel):
    """Whether images can be made right now."""

    status: Literal["ok", "unavailable"]
    model: str
    details: dict[str, Any]
