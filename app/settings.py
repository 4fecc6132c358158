"""Every setting of the service: typed, documented, validated; an unknown key is refused with the nearest valid name.

``python -m app.settings`` prints the table of all settings. The defaults serve the small model that comes with
the repository.
"""

from collections.abc import Iterator
from math import prod
from typing import Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from app.setting_sections import (
    AutoscalingSettings,
    Device,
    ElasticSettings,
    HttpSettings,
    KeySettings,
    MagCacheSettings,
    PositiveInt,
    QualityGuardSettings,
    QualitySettings,
    SamplingSettings,
    Section,
    TelemetrySettings,
    TextEncoderSettings,
    VaeSettings,
    unknown_name,
)

__all__ = [
    "AutoscalingSettings",
    "ElasticSettings",
    "HttpSettings",
    "KeySettings",
    "MagCacheSettings",
    "QualityGuardSettings",
    "QualitySettings",
    "SamplingSettings",
    "Settings",
    "TelemetrySettings",
    "TextEncoderSettings",
    "VaeSettings",
    "describe",
    "table",
    "unknown_name",
]


class Settings(Section):
    """All settings of one application: the `args` of an application in a Serve config file."""

    model: str = Field(
        default="models/flux-tiny",
        min_length=1,
        description="Local folder in diffusers' layout, or a Hugging Face hub id.",
    )
    transformer: str | None = Field(
        default=None,
        min_length=1,
        description="One safetensors file in BFL's layout (flux1-dev.safetensors, or ComfyUI's) whose transformer is "
        "served in place of the one of `model`, which gives all other parts.",
    )
    revision: str | None = Field(
        default=None,
        min_length=1,
        description="Commit, tag or branch of a model on the hub; null is its newest, which may change under you.",
    )
    served_model_name: str | list[str] | None = Field(
        default=None,
        min_length=1,
        description="The model's name over HTTP; null is the last part of `model`. Of a list the first is the name, "
        "and the others are aliases that requests may name as well, for example `gpt-image-1`.",
    )
    device: Device = Field(default="cpu", description="Where the transformer's ranks run.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Precision of weights and activations; bfloat16 for FLUX on GPUs."
    )
    attention_backend: Literal["auto", "native", "cudnn", "flash", "fa3", "xformers"] = Field(
        default="auto",
        description="Attention kernels: torch's, in its own order (`native`), cuDNN's first or flash first; or of the "
        "packages flash_attn_interface (`fa3`, FlashAttention 3) and xformers. `auto` tries on rank 0 which is "
        "fastest at the default size, and all ranks use that; on `cpu` it is native.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the blocks, and the VAE's decoder where that runs on a GPU: both are faster, and their "
        "start waits for it, minutes the first time. One row of the default size has kernels of its own, all others "
        "share theirs.",
    )
    cuda_graphs: bool = Field(
        default=False,
        description="Record the steps of one and of two images of the default size as CUDA graphs in the warm-up, and "
        "replay them: for steps whose launches take longer than their work (small images, many ranks, reused steps). "
        "Takes the memory of such a step of two images once more; images with adapters or references run without.",
    )
    compile_cache_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder in which ranks and VAE keep compiled kernels, so that the next start finds them; null is "
        "`flux-compiled` in `HF_HOME`, beside the downloaded models.",
    )
    quantization: Literal["fp8"] | None = Field(
        default=None,
        description="`fp8` keeps the sharded weights in 8-bit floating point, half of bfloat16's memory; on `cuda` it "
        "needs dtype bfloat16, `compile` and compute capability 8.9.",
    )
    modulation_on_host: bool = Field(
        default=False,
        description="Keep the weights of the blocks' modulation in host memory (FLUX.1: 6.6 GB, divided among the "
        "ranks) and stream them to the GPU when an image is admitted, the only time that they are read.",
    )
    loras: str | None = Field(
        default=None,
        min_length=1,
        description="Folder of low-rank adapters (LoRA) as safetensors files that requests may name, on a volume that "
        "all nodes with ranks mount; read at the start and by `POST /v1/loras/reload`. `~` stands for the home "
        "folder. null takes none.",
    )
    loras_bytes: PositiveInt = Field(
        default=1 << 30,
        description="Memory that adapters may take on a rank. Those used longest ago leave first; an image whose "
        "adapters do not fit beside those of other images waits for them.",
    )
    max_loras: int = Field(default=4, ge=1, le=16, description="Most adapters that one request may name.")
    max_lora_scale: float = Field(
        default=4.0, gt=0.0, description="Largest `scale` of an adapter in a request, and, negative, the smallest."
    )
    tensor_parallel_size: PositiveInt = Field(
        default=1, description="Ranks that share one transformer; must divide its attention heads (FLUX.1: 24)."
    )
    sequence_parallel_size: PositiveInt = Field(
        default=1,
        description="Copies of those shards that share the tokens of an image (Ulysses); a group has as many ranks as "
        "both sizes multiplied. Exchanges far less than tensor parallelism, and holds the weights once a copy: for "
        "cards without NVLink that hold the model, or for more cards than the heads divide into.",
    )
    cfg_parallel: bool = Field(
        default=False,
        description="Run the two branches of true CFG on different halves of the group, which has twice as many ranks "
        "then; images without a negative prompt alternate between the halves.",
    )
    num_replicas: PositiveInt = Field(
        default=1, description="Tensor-parallel groups; each holds a whole copy of the model."
    )
    api_replicas: PositiveInt = Field(
        default=1,
        description="Processes that serve HTTP; with two, one that dies leaves the other. Each has its own encoder and "
        "decoder where these are placed in the API, and its own `http.max_decoded_bytes`.",
    )
    placement_group_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        default="PACK",
        description="How the ranks of a group lie on nodes: PACK, on as few as possible, since they exchange "
        "activations at every layer; SPREAD, on as many as there are. STRICT_ waits for nodes that allow just that.",
    )
    threads_per_rank: int = Field(
        default=0, ge=0, description="CPU threads of one rank's torch; 0 leaves torch's choice."
    )
    cpus_per_rank: float = Field(default=1.0, ge=0.0, description="Logical CPUs that Ray reserves for one rank.")
    cpus_per_helper: float = Field(
        default=0.25,
        ge=0.0,
        description="Logical CPUs that Ray reserves for the API, and for the encoder and the decoder where they have a "
        "process of their own.",
    )
    gpus_per_rank: float = Field(
        default=1.0,
        gt=0.5,
        le=1.0,
        description="Share of a GPU that Ray reserves for one rank on `cuda`; above a half, so that no two share one.",
    )
    gpus_per_helper: float = Field(
        default=0.1,
        ge=0.0,
        le=1.0,
        description="Share of a GPU that Ray reserves for the encoder and for the decoder where they run on `cuda`.",
    )
    resources_timeout_s: float = Field(
        default=5.0,
        ge=0.0,
        description="Time that the start waits for the cluster to have the CPUs and GPUs needed before it fails; raise "
        "it where nodes join late or an autoscaler adds them.",
    )
    max_batch_rows: PositiveInt = Field(
        default=8, description="Most images under way at once; bounds the memory of latents and residuals."
    )
    max_batch_tokens: PositiveInt = Field(
        default=2304,
        description="Most image and text tokens that one step computes, both CFG branches counted. Bounds a step's "
        "time and activations. Images under way have twice as many at most, and more than once only when urgent ones "
        "join.",
    )
    max_waiting_pictures: PositiveInt = Field(
        default=256, description="Images that wait in one group's queue before new ones are refused with 429."
    )
    patience_s: float = Field(
        default=60.0,
        gt=0.0,
        description="Queue order: each image is due this long after its arrival, or at its deadline if that is "
        "sooner, and a level of priority is worth as much. A higher one goes first until the other has waited longer.",
    )
    plans_in_flight: int = Field(
        default=3, ge=1, le=64, description="Messages of step plans sent ahead of their results."
    )
    max_ongoing_requests: PositiveInt = Field(
        default=320,
        description="Images that Serve hands to a replica at once; room for max_batch_rows and max_waiting_pictures, "
        "so that they wait where their order is decided.",
    )
    max_queued_requests: PositiveInt = Field(
        default=256, description="Images that wait for a replica before new ones are refused as busy."
    )
    hang_timeout_s: float = Field(
        default=120.0,
        gt=0.0,
        description="Time after which a rank that has not finished the plans sent to it counts as hung, and its group "
        "is rebuilt; well above plans_in_flight times the slowest step.",
    )
    start_timeout_s: float = Field(
        default=600.0,
        gt=0.0,
        description="Time after which a rank or coordinator that starts is given up when it makes no progress; a rank "
        "that still reads its shard does. Above the time that the warm-up takes, compiling included.",
    )
    collective_timeout_s: float = Field(
        default=900.0,
        gt=0.0,
        description="Timeout of the ranks' collectives (NCCL, gloo), for ranks whose replica is gone; above "
        "hang_timeout_s and start_timeout_s, which say what hangs.",
    )
    rebuild_attempts: int = Field(
        default=3,
        ge=0,
        description="Rebuilds of a tensor-parallel group, one after another, before its replica gives up.",
    )
    spare_group: bool = Field(
        default=False,
        description="Keep a second set of each group's processes (its ranks and the coordinator) that have imported "
        "everything and hold no model: a group that broke is rebuilt sooner by the start of Python and its imports, "
        "5 s of CPU a process. Takes 300 MB of host memory a process and nothing on the GPU. Both sets share what "
        "`cpus_per_rank` and `gpus_per_rank` reserve.",
    )
    idempotency_s: float = Field(
        default=120.0,
        ge=0.0,
        description="Time after its end in which a request that comes again (`Idempotency-Key`, or the same "
        "`X-Request-Id` and body) gets the images of the first one; 0 makes them again.",
    )
    prompt_cache_entries: int = Field(
        default=256, ge=0, description="Prompts whose embeddings the encoder keeps (LRU); 0 keeps none."
    )
    drain_seconds: float = Field(
        default=60.0, ge=0.0, description="Time that a stopping replica has for the requests it already took."
    )
    api_drain_seconds: float = Field(
        default=120.0,
        ge=0.0,
        description="The same for a stopping API process; longer than a model takes to load, since during an update of "
        "the only group its requests wait for the next one.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe line to log."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="`text` lines for people, or one JSON object a line for a log collector."
    )
    sampling: SamplingSettings = Field(default=SamplingSettings(), description="Request defaults and limits.")
    text_encoder: TextEncoderSettings = Field(default=TextEncoderSettings(), description="The text encoders.")
    vae: VaeSettings = Field(default=VaeSettings(), description="The VAE.")
    magcache: MagCacheSettings = Field(default=MagCacheSettings(), description="The server's MagCache policy.")
    elastic: ElasticSettings = Field(default=ElasticSettings(), description="Quality under load.")
    quality: QualitySettings = Field(default=QualitySettings(), description="What `quality` means.")
    quality_guard: QualityGuardSettings = Field(
        default=QualityGuardSettings(), description="What quality is measured and held."
    )
    http: HttpSettings = Field(default=HttpSettings(), description="Limits on one HTTP request; streams.")
    keys: KeySettings = Field(default=KeySettings(), description="Limits of each API key.")
    telemetry: TelemetrySettings = Field(default=TelemetrySettings(), description="Traces of requests.")
    autoscaling: AutoscalingSettings = Field(
        default=AutoscalingSettings(), description="How the number of groups follows the load."
    )

    @field_validator("served_model_name")
    @classmethod
    def _printable(cls, value: str | list[str] | None) -> str | list[str] | None:
        names = [value] if isinstance(value, str) else value or []
        for name in names:
            if not name or not name.isprintable():
                raise ValueError(f"served_model_name is {name!r}; use printable characters only, and at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"served_model_name is {value!r}; give each name once")
        return value

    @field_validator("model")
    @classmethod
    def _has_a_name(cls, value: str) -> str:
        if not value.strip("/. "):
            raise ValueError(f"model is {value!r}; name a folder or a hub id, for example 'models/flux-tiny'")
        return value

    @model_validator(mode="after")
    def _half_precision_needs_a_gpu(self) -> Self:
        if self.dtype == "float16" and self.device == "cpu":
            raise ValueError("dtype is 'float16' on device 'cpu', where it is slow and overflows; choose 'float32'")
        return self

    @model_validator(mode="after")
    def _time_limits_are_in_order(self) -> Self:
        """The limit whose message says what hangs must be reached first; docs/operations.md lists all of them."""
        for sooner in ("hang_timeout_s", "start_timeout_s"):
            limit = getattr(self, sooner)
            if limit >= self.collective_timeout_s:
                raise ValueError(
                    f"{sooner} is {limit:g} and collective_timeout_s {self.collective_timeout_s:g}; raise "
                    f"collective_timeout_s above {sooner}"
                )
        return self

    @model_validator(mode="after")
    def _kernels_exist(self) -> Self:
        if self.attention_backend in ("cudnn", "fa3", "xformers") and self.device != "cuda":
            raise ValueError(
                f"attention_backend is {self.attention_backend!r}, which needs CUDA, and device is {self.device!r}; "
                "choose 'auto'"
            )
        half_only = self.attention_backend in ("cudnn", "flash", "fa3") and self.device == "cuda"
        if half_only and self.dtype == "float32":
            raise ValueError(
                f"attention_backend is {self.attention_backend!r}, which has no float32 kernels on CUDA; "
                "set dtype to 'bfloat16'"
            )
        if self.cuda_graphs and self.device != "cuda":
            raise ValueError(f"cuda_graphs is true, and device is {self.device!r}, which has none; set it to false")
        if self.quantization == "fp8" and self.device == "cuda" and self.dtype != "bfloat16":
            raise ValueError(f"quantization is 'fp8' and dtype {self.dtype!r}; set dtype to 'bfloat16'")
        if self.quantization == "fp8" and self.device == "cuda" and not self.compile:
            raise ValueError(
                "quantization is 'fp8' and compile is false: operator by operator, fp8 moves nearly three times the "
                "bytes of bfloat16 and is slower; set compile to true"
            )
        return self

    @model_validator(mode="after")
    def _calibrations_have_a_folder(self) -> Self:
        if self.magcache.calibrate == "idle" and self.magcache.profile_dir is None:
            raise ValueError("magcache.calibrate is 'idle'; name the folder for profiles in magcache.profile_dir")
        return self

    @model_validator(mode="after")
    def _autoscaling_has_a_range(self) -> Self:
        if self.max_replicas < self.num_replicas:
            raise ValueError(
                f"autoscaling.max_replicas is {self.max_replicas}; raise it to at least num_replicas, "
                f"{self.num_replicas}"
            )
        return self

    @property
    def ranks(self) -> int:
        """Ranks of one group."""
        return prod(self.parallel_sizes)

    @property
    def parallel_sizes(self) -> tuple[int, int, int]:
        """How many ranks share the weights, an image's tokens, and its CFG branches."""
        return self.tensor_parallel_size, self.sequence_parallel_size, 2 if self.cfg_parallel else 1

    @property
    def max_replicas(self) -> int:
        """Most tensor-parallel groups that may run at once."""
        return self.autoscaling.max_replicas or self.num_replicas

    @model_validator(mode="after")
    def _batch_holds_the_largest_image(self) -> Self:
        tokens = 2 * self.image_tokens(self.sampling.max_pixels)
        if self.max_batch_tokens < tokens:
            raise ValueError(
                f"max_batch_tokens is {self.max_batch_tokens}; the largest image with true CFG has {tokens} tokens: "
                "raise max_batch_tokens, or lower sampling.max_pixels or sampling.max_sequence_length"
            )
        return self

    @model_validator(mode="after")
    def _images_wait_in_the_coordinator(self) -> Self:
        needed = self.max_batch_rows + self.max_waiting_pictures
        if self.max_ongoing_requests < needed:
            raise ValueError(
                f"max_ongoing_requests is {self.max_ongoing_requests}; raise it to at least {needed}, max_batch_rows "
                "and max_waiting_pictures together, or lower those"
            )
        return self

    def image_tokens(self, pixels: int) -> int:
        """Image and text tokens of one CFG branch of an image: a token stands for 16 x 16 pixels."""
        return pixels // 256 + self.sampling.max_sequence_length

    @property
    def default_image_tokens(self) -> int:
        """Tokens of an image of the default size, without its text's."""
        return self.sampling.default_width * self.sampling.default_height // 256

    @property
    def model_name(self) -> str:
        """The model's name over HTTP and in metrics."""
        return self.model_names[0]

    @property
    def model_names(self) -> list[str]:
        """The model's name and its aliases."""
        named = self.served_model_name or self.model.rstrip("/").rpartition("/")[2]
        return [named] if isinstance(named, str) else named

    @property
    def encoder_runs_on(self) -> Device:
        """Where the text encoders run, offloaded between prompts or not."""
        placement = self.text_encoder.placement
        return self.device if placement is None else "cuda" if placement in ("gpu", "offload") else "cpu"

    @property
    def decoder_runs_on(self) -> Device:
        """Where the VAE runs."""
        placement = self.vae.placement
        return self.device if placement is None else "cuda" if placement == "gpu" else "cpu"

    @property
    def decoder_is_compiled(self) -> bool:
        """Whether the VAE decodes with compiled code; on a CPU its compiler takes minutes."""
        return self.compile and self.decoder_runs_on == "cuda"

    @property
    def encoder_is_in_api(self) -> bool:
        """Whether the text encoders have no deployment of their own."""
        return self.text_encoder.placement == "api"

    @property
    def decoder_is_in_api(self) -> bool:
        """Whether the VAE has no deployment of its own."""
        return self.vae.placement == "api"


def describe(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """``(name, default, description)`` of every setting, nested ones with dots, in the order of declaration."""
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from describe(type(field.default), f"{prefix}{name}.")
        else:
            default = "null" if field.default is None else str(field.default)
            default = default.lower() if isinstance(field.default, bool) else default
            yield prefix + name, default, field.description or ""


def table() -> str:
    """All settings as a Markdown table."""
    rows = [f"| `{name}` | `{default}` | {description} |" for name, default, description in describe()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(table())
