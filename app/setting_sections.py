"""The sections of the settings, and what all of them share: strict types, frozen values, no unknown key.

`app.settings` puts them together; read them from there.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Device = Literal["cpu", "cuda"]
PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Decibels = Annotated[float, Field(gt=0.0, lt=100.0)]


def unknown_name(kind: str, name: str, valid: Iterable[str], fits: Callable[[str], bool] = lambda name: True) -> str:
    """The message for a name that does not exist: it offers the nearest valid one that ``fits``, or lists them all."""
    names = sorted(valid)
    nearest = next(filter(fits, difflib.get_close_matches(name.lower(), names, n=5, cutoff=0.5)), None)
    advice = f"did you mean {nearest!r}?" if nearest else f"valid names: {', '.join(names)}"
    return f"unknown {kind} {name[:80]!r}; {advice}"


class Section(BaseModel):
    """A group of settings. Strict: ``"2"`` is not ``2``, and ``true`` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_names(cls, data: Any) -> Any:
        unknown = [str(key) for key in data if key not in cls.model_fields] if isinstance(data, dict) else []
        if unknown:
            raise ValueError("; ".join(unknown_name("setting", key, cls.model_fields) for key in unknown))
        return data


class SamplingSettings(Section):
    """What a request gets when it does not say, and what it may ask for at most."""

    default_width: PositiveInt = Field(default=128, description="Width in pixels when a request names no `size`.")
    default_height: PositiveInt = Field(default=128, description="Height in pixels when a request names no `size`.")
    num_inference_steps: PositiveInt = Field(default=28, description="Denoising steps when a request does not say.")
    guidance_scale: float = Field(default=3.5, ge=0.0, description="Distilled guidance when a request does not say.")
    max_sequence_length: int = Field(
        default=32,
        ge=1,
        le=512,
        description="T5 tokens per prompt, padding included; the length the model was trained with.",
    )
    min_side: PositiveInt = Field(default=64, description="Shortest side in pixels that a request may ask for.")
    max_side: PositiveInt = Field(default=256, description="Longest side in pixels that a request may ask for.")
    max_pixels: PositiveInt = Field(
        default=65536, description="Largest width x height that a request may ask for: bounds a step's time and memory."
    )
    side_multiple: PositiveInt = Field(
        default=16, description="Both sides must be multiples of this: 8 for the VAE times 2 for FLUX's patches."
    )
    max_inference_steps: PositiveInt = Field(
        default=100, description="Most denoising steps that a request may ask for."
    )
    max_n: PositiveInt = Field(default=10, description="Most images that one request may ask for (`n`).")

    @field_validator("side_multiple")
    @classmethod
    def _patches(cls, value: int) -> int:
        if value % 16:
            raise ValueError(f"side_multiple is {value}; FLUX's VAE and patches need a multiple of 16")
        return value

    @model_validator(mode="after")
    def _defaults_within_limits(self) -> Self:
        for name in ("min_side", "max_side", "default_width", "default_height"):
            value = getattr(self, name)
            if value % self.side_multiple:
                down = max(value // self.side_multiple, 1) * self.side_multiple
                raise ValueError(
                    f"{name} is {value}; it must be a multiple of {self.side_multiple}, for example {down}"
                )
        if self.min_side > self.max_side:
            raise ValueError(f"min_side is {self.min_side}; it must not exceed max_side, {self.max_side}")
        if self.min_side**2 > self.max_pixels:
            raise ValueError(
                f"max_pixels is {self.max_pixels}; raise it to at least min_side squared, {self.min_side**2}"
            )
        for name in ("default_width", "default_height"):
            value = getattr(self, name)
            if not self.min_side <= value <= self.max_side:
                raise ValueError(
                    f"{name} is {value}; choose one between min_side, {self.min_side}, and max_side, {self.max_side}"
                )
        pixels = self.default_width * self.default_height
        if pixels > self.max_pixels:
            raise ValueError(f"default_width x default_height is {pixels} pixels; raise max_pixels, {self.max_pixels}")
        if self.num_inference_steps > self.max_inference_steps:
            raise ValueError(
                f"num_inference_steps is {self.num_inference_steps}; it must not exceed max_inference_steps, "
                f"{self.max_inference_steps}"
            )
        return self


class MagCacheSettings(Section):
    """The server's MagCache policy; a request may override `enabled` and every `mag_` value."""

    enabled: bool = Field(
        default=True, description="Reuse residuals by default; `false` computes every step unless asked."
    )
    profile: str | None = Field(
        default=None,
        min_length=1,
        description="Calibrated profile: a name that ships with magcache_core or a path to its JSON; null takes, for "
        "each request, the shipped one of this model that is nearest in true CFG, steps, pixels and guidance.",
    )
    profile_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of the profiles that the service calibrates itself, on a volume that all nodes mount; one "
        "that was measured for a request's steps, size and guidance goes before `profile`. `~` and variables of the "
        "environment stand for what they say, `$HF_HOME` for where models are cached. null keeps none.",
    )
    calibrate: Literal["off", "idle", "ask"] = Field(
        default="ask",
        description="Whether the service calibrates its model into `profile_dir` while no client's image is there: "
        "`ask` when `POST /v1/calibrations` asks for it; `idle` also by itself, for its default image and for others "
        "that are asked for again and again, where no profile with measured costs exists; `off` never.",
    )
    mag_threshold: float | None = Field(
        default=None, ge=0.0, description="Accumulated error at which a step must compute; null is the profile's."
    )
    mag_max_skip_steps: int | None = Field(
        default=None, ge=0, description="Most steps reused in a row (K); null is the profile's."
    )
    mag_retention_ratio: Fraction | None = Field(
        default=None, description="Leading share of the steps that always computes; null is the profile's."
    )
    min_computed_share: Share = Field(
        default=0.25,
        description="Least share of the steps that a deadline or a busy server may leave computed, whatever a request "
        "allows.",
    )

    @property
    def profile_folder(self) -> Path | None:
        """The folder that `profile_dir` means on this node."""
        if self.profile_dir is None:
            return None
        environment = {"HF_HOME": "~/.cache/huggingface"} | os.environ
        return Path(Template(self.profile_dir).safe_substitute(environment)).expanduser()


class ElasticSettings(Section):
    """Fewer computed steps under load. A schedule that the client chose itself is lowered only as far as it allows."""

    enabled: bool = Field(default=False, description="Lower the computed steps of new images while the queue is long.")
    start_wait_s: float = Field(
        default=5.0, ge=0.0, description="Queue wait in seconds from which computed steps are lowered."
    )
    full_wait_s: float = Field(
        default=20.0,
        gt=0.0,
        description="Queue wait in seconds at which they are at their floor: the request's `min_computed_steps`, or "
        "`magcache.min_computed_share`.",
    )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.full_wait_s <= self.start_wait_s:
            raise ValueError(f"full_wait_s is {self.full_wait_s:g}; raise it above start_wait_s, {self.start_wait_s:g}")
        return self


class QualitySettings(Section):
    """What each `quality` computes: the fewest steps that reached a PSNR in the profile's trials, else a share of them.

    `auto` follows the `magcache` settings.
    """

    low_floor_db: Decibels | None = Field(
        default=28.0,
        description="Mean PSNR in dB against the uncached images that as many computed steps as `quality: low` takes "
        "reached in trials, the runs of a calibration. Where no trial of the model did, and with null, `low` counts.",
    )
    medium_floor_db: Decibels | None = Field(default=32.0, description="The same for `quality: medium`.")
    high_floor_db: Decibels | None = Field(default=38.0, description="The same for `quality: high` (or `hd`).")
    low: Share = Field(default=0.25, description="Share of the steps that `quality: low` computes without trials.")
    medium: Share = Field(default=0.4, description="Share of the steps that `quality: medium` computes without trials.")
    high: Share = Field(default=0.65, description="Share of the steps that `quality: high` computes without trials.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.low <= self.medium <= self.high:
            raise ValueError(
                f"low, medium and high are {self.low:g}, {self.medium:g}, {self.high:g}; none may exceed the next"
            )
        floors = [floor for floor in (self.low_floor_db, self.medium_floor_db, self.high_floor_db) if floor is not None]
        if floors != sorted(floors):
            shown = ", ".join(f"{floor:g}" for floor in floors)
            raise ValueError(f"the floors of low, medium and high are {shown} dB; none may exceed the next")
        return self


class QualityGuardSettings(Section):
    """Holds `auto`, the requests that leave MagCache to the server, to a quality that is measured on some of them."""

    target_psnr_db: Decibels | None = Field(
        default=None,
        description="PSNR in dB against the uncached image of the same seed that nine of ten images are to reach. A "
        "sample is run again uncached while no client's image is there, and the computed steps rise and fall with what "
        "is seen. null compares nothing.",
    )
    share: Share = Field(default=0.01, description="Share of those images that is compared.")
    margin_db: float = Field(
        default=3.0,
        ge=0.0,
        description="What nine of ten images must have above the target before computed steps are taken away.",
    )
    min_computed_share: Share = Field(default=0.25, description="Least share of the steps that it may leave computed.")
    max_computed_share: Share = Field(default=0.75, description="Largest share of the steps that it may have computed.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.min_computed_share > self.max_computed_share:
            raise ValueError(
                f"min_computed_share is {self.min_computed_share:g}; it must not exceed max_computed_share, "
                f"{self.max_computed_share:g}"
            )
        return self


class TextEncoderSettings(Section):
    """The text encoders: CLIP and T5 for FLUX.1, Qwen3 for FLUX.2-klein."""

    placement: Literal["api", "cpu", "gpu", "offload"] | None = Field(
        default=None,
        description="Where they run: `gpu`; `cpu`, which needs no GPU memory and is slow for a new prompt; `offload`, "
        "which keeps them in host memory and brings them to the GPU for each new prompt; or `api`, on the CPU in the "
        "API's own process, which saves the way to another where the model is small. null is `gpu` where `device` is "
        "`cuda`, else `cpu`.",
    )
    replicas: PositiveInt = Field(
        default=1,
        description="Processes of the encoders, each with a whole copy and a cache of its own: with 2 one may die "
        "unnoticed; with placement `api` there are `api_replicas`.",
    )


class VaeSettings(Section):
    """The VAE, which decodes images and encodes those to edit."""

    placement: Literal["api", "cpu", "gpu"] | None = Field(
        default=None,
        description="Where it runs; `api` is on the CPU in the API's own process. null is `gpu` where `device` is "
        "`cuda`, else `cpu`.",
    )
    tiling: bool = Field(
        default=False,
        description="Work on large images in overlapping tiles: less memory, more time, and tiles may show faintly.",
    )
    replicas: PositiveInt = Field(
        default=1,
        description="Processes of the VAE, each with a whole copy that decodes one image at a time, for groups that "
        "finish images faster than one decodes them; with 2 one may die unnoticed; with placement `api` there are "
        "`api_replicas`.",
    )


class HttpSettings(Section):
    """Limits on what one HTTP request may carry, and how a stream is kept alive."""

    max_body_bytes: int = Field(
        default=1 << 20, ge=1024, description="Largest request body; above it the answer is 413."
    )
    max_prompt_chars: PositiveInt = Field(
        default=32000,
        description="Longest `prompt` or `negative_prompt` in characters; the encoders truncate far below it.",
    )
    max_edit_bytes: int = Field(
        default=32 << 20, ge=1024, description="Largest body of an edit, images included; above it the answer is 413."
    )
    max_source_pixels: int = Field(
        default=1 << 24,
        ge=4096,
        le=1 << 26,
        description="Largest image to edit, width x height, as it is decoded.",
    )
    max_decoded_bytes: int = Field(
        default=1 << 30,
        ge=1 << 20,
        description="Memory that bodies and images to edit may take in one API process, of all requests together: "
        "bodies while they arrive, decoding (16 bytes per pixel, and 8 per pixel of the whole file of WebP and "
        "progressive JPEG files), and pixels until the VAE has encoded them. Beyond it the answer is 429.",
    )
    metadata: bool = Field(
        default=False,
        description="Write the settings of an image, its prompt among them, into its file when a request does not say.",
    )
    heartbeat_s: float = Field(
        default=10.0,
        gt=0.0,
        description="Silence on a stream after which a comment line is sent, well below the idle timeouts of proxies; "
        "also the longest that a stream's first byte waits for news of the request.",
    )
    api_keys_file: str | None = Field(
        default=None,
        min_length=1,
        description="File of API keys, one `NAME KEY` a line, for example a mounted secret; it is read again when it "
        "changes. Then every route but `/health`, `/metrics` and the page wants `Authorization: Bearer KEY`. null asks "
        "for none.",
    )
    metrics_need_key: bool = Field(default=False, description="Have `/metrics` want a key as well.")
    allow_proxy_headers: bool = Field(
        default=False,
        description="Let clients send `x-request-timeout-seconds` and `x-request-disconnect-disabled`, which Ray "
        "Serve's proxy obeys; with the latter a request goes on when its client is gone.",
    )
    cors_origins: list[str] = Field(
        default=[],
        description="Origins of web pages whose scripts may call the service from a browser, for example "
        "`https://app.example.com`; `*` allows all.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", origin):
                raise ValueError(
                    f"cors_origins has {origin!r}; write '*' or SCHEME://HOST[:PORT], for example "
                    "'https://app.example.com'"
                )
        return value


class KeySettings(Section):
    """Limits of each API key of `http.api_keys_file` in each tensor-parallel group."""

    max_waiting_pictures: PositiveInt | None = Field(
        default=None,
        description="Images of one key that wait in one group's queue before its new ones are refused with 429; null "
        "leaves only the limit of the whole queue.",
    )
    megapixel_steps_per_minute: float | None = Field(
        default=None,
        gt=0.0,
        description="Computed work that one key may ask of one group: width x height in millions, times the computed "
        "steps of both CFG branches. A minute's worth may come at once; beyond it the answer is 429. null sets none.",
    )


class TelemetrySettings(Section):
    """Traces of requests."""

    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s]+",
        description="Base URL of an OTLP/HTTP collector that gets spans of each request and its phases, for example "
        "`http://otel-collector:4318`; needs the extra `otlp`. null sends none.",
    )


class AutoscalingSettings(Section):
    """How the number of tensor-parallel groups follows the load; without `max_replicas` it stays at `num_replicas`."""

    max_replicas: PositiveInt | None = Field(
        default=None, description="Most groups; `num_replicas` is then the fewest. null keeps their number fixed."
    )
    target_ongoing_requests: float = Field(
        default=4.0,
        gt=0.0,
        description="Images per group, running or waiting, that autoscaling aims at; about `max_batch_rows`.",
    )
    upscale_delay_s: float = Field(
        default=30.0, ge=0.0, description="Time that the load must ask for more groups before one is added."
    )
    downscale_delay_s: float = Field(
        default=600.0,
        ge=0.0,
        description="Time that the load must ask for fewer groups before one is drained: loading takes minutes.",
    )
