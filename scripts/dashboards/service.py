"""The *Service* dashboard: is it up, is it fast, is it full, and what is in the way."""

from __future__ import annotations

from scripts.dashboards.panels import (
    FLUX,
    GROUP,
    NODE,
    RATE,
    SERVE,
    Dashboard,
    Panel,
    Query,
    Row,
    distribution,
    quantiles,
    rate,
    share,
)

_OK = f'{FLUX}, outcome="ok"'

OVERVIEW = Row(
    "Overview",
    (
        Panel(
            "Groups ready", "Tensor-parallel groups that answer and have not failed; none means that clients get 503.",
            "stat", "short", (Query(f"sum(flux_group_up{{{GROUP}}})", "ready"),), width=4,
        ),
        Panel(
            "Requests per second", "Image requests that ended, whatever became of them.",
            "stat", "reqps", (Query(rate("flux_requests_total", "", FLUX), "requests"),), width=4,
        ),
        Panel(
            "Served", "Share of the requests that were not the client's mistake and got their pictures.",
            "stat", "percentunit",
            (
                Query(
                    f'sum(rate(flux_requests_total{{{FLUX}, outcome="ok"}}[{RATE}]))'
                    f' / sum(rate(flux_requests_total{{{FLUX}, outcome!~"invalid|cancelled"}}[{RATE}]))',
                    "served",
                ),
            ),
            width=4,
        ),
        Panel(
            "Within the objective", "Share of the successful requests answered within 25 s; the objective is 99 %.",
            "stat", "percentunit",
            (
                Query(
                    f'sum(rate(flux_request_duration_seconds_bucket{{{_OK}, le="25.0"}}[{RATE}]))'
                    f" / sum(rate(flux_request_duration_seconds_count{{{_OK}}}[{RATE}]))",
                    "fast enough",
                ),
            ),
            width=4,
        ),
        Panel(
            "Waiting", "Pictures waiting for room in a batch, of all groups.",
            "stat", "short", (Query(f"sum(flux_waiting_pictures{{{GROUP}}})", "waiting"),), width=4,
        ),
        Panel(
            "Steps reused", "Share of the denoising steps that MagCache did not compute.",
            "stat", "percentunit", (Query(share("flux_steps_total", 'decision="reused"', "", GROUP), "reused"),),
            width=4,
        ),
    ),
)  # fmt: skip

TRAFFIC = Row(
    "Traffic and errors",
    (
        Panel(
            "Requests by outcome", "Image requests per second by how they ended; busy is 429, unavailable is 503.",
            "timeseries", "reqps", (Query(rate("flux_requests_total", "outcome", FLUX), "{{outcome}}"),), stacked=True,
        ),
        Panel(
            "Errors by code", "Requests per second that got no pictures, by the error code that their clients saw.",
            "timeseries", "reqps", (Query(rate("flux_request_errors_total", "code", FLUX), "{{code}}"),), stacked=True,
        ),
        Panel(
            "Requests by API key", "Image requests per second by the name of their key, whatever became of them.",
            "timeseries", "reqps", (Query(rate("flux_key_requests_total", "key", FLUX), "{{key}}"),), stacked=True,
            needs="keys",
        ),
        Panel(
            "Pictures finished", "Pictures per second that took their last step, by group.",
            "timeseries", "ops",
            (
                Query(rate("flux_pictures_finished_total", "replica", GROUP), "{{replica}}"),
                Query(rate("flux_pictures_joined_total", "", FLUX), "given again to a retry"),
            ),
        ),
        Panel(
            "Prompt cache", "Prompts per second by whether their embeddings were kept, being computed, or new.",
            "timeseries", "ops", (Query(rate("flux_prompt_cache_lookups_total", "result", FLUX), "{{result}}"),),
            stacked=True,
        ),
    ),
)  # fmt: skip


def _phase(phase: str, meaning: str) -> tuple[Panel, Panel]:
    labels = f'{FLUX}, phase="{phase}"'
    return (
        Panel(
            f"{phase.capitalize()}: percentiles", meaning, "timeseries", "s",
            quantiles("flux_phase_duration_seconds", labels),
        ),
        Panel(
            f"{phase.capitalize()}: distribution", f"{meaning} Each cell counts the pictures that took so long.",
            "heatmap", "s", distribution("flux_phase_duration_seconds", labels),
        ),
    )  # fmt: skip


LATENCY = Row(
    "Latency by phase",
    (
        *_phase("total", "Time from a request's arrival to the finished file."),
        *_phase("queue", "Time that a picture waited for room in a batch."),
        *_phase("encode", "Time of the text encoders; near zero for prompts whose embeddings are kept."),
        *_phase("denoise", "Time of all denoising steps of a picture, shared with the others in its batch."),
        *_phase("decode", "Time from the latents to the picture file."),
    ),
)

QUEUE = Row(
    "Queue",
    (
        Panel(
            "Running and waiting", "Pictures in the batches and before them; the limit is where 429 begins.",
            "timeseries", "short",
            (
                Query(f"sum(flux_running_pictures{{{GROUP}}})", "running"),
                Query(f"sum(flux_waiting_pictures{{{GROUP}}})", "waiting"),
                Query(f"sum(flux_waiting_pictures_limit{{{GROUP}}})", "limit of waiting"),
            ),
        ),
        Panel(
            "Turned away or ended early", "Pictures per second refused, cancelled, too late, or lowered to be in time.",
            "timeseries", "ops",
            (
                Query(rate("flux_pictures_refused_total", "reason", GROUP), "refused: {{reason}}"),
                Query(rate("flux_pictures_cancelled_total", "", GROUP), "cancelled"),
                Query(rate("flux_deadline_misses_total", "", GROUP), "deadline missed"),
                Query(rate("flux_downgrades_total", "reason", GROUP), "fewer computed steps: {{reason}}"),
            ),
        ),
    ),
)  # fmt: skip

ADAPTERS = Row(
    "Adapters (LoRA)",
    (
        Panel(
            "Requests by adapter", "Image requests per second by the low-rank adapters that they name.",
            "timeseries", "reqps", (Query(rate("flux_lora_requests_total", "lora", FLUX), "{{lora}}"),), stacked=True,
            width=8, needs="loras",
        ),
        Panel(
            "Loads", "Adapters that the ranks loaded per second, or failed to; many loads mean that memory is short.",
            "timeseries", "ops", (Query(rate("flux_lora_loads_total", "result", GROUP), "{{result}}"),), width=8,
        ),
        Panel(
            "Memory", "Memory set aside on each rank for the adapters that it keeps, by group.",
            "timeseries", "bytes", (Query(f"max by (replica) (flux_lora_bytes{{{GROUP}}})", "{{replica}}"),), width=8,
        ),
    ),
)  # fmt: skip

SLO = Row(
    "Objective: 99 % within 25 s",
    (
        Panel(
            "Budget burn rate", "How many times faster than allowed slow requests use up the budget; 14.4 pages.",
            "timeseries", "none",
            tuple(
                Query(f"flux:slow_requests:ratio_rate{window}{{{FLUX}}} / 0.01", f"{{{{model}}}}, last {window}")
                for window in ("5m", "30m", "1h", "6h")
            ),
        ),
        Panel(
            "Alerts", "What fires or is about to; the runbook has a section for each name.",
            "table", "none", (Query('ALERTS{alertname=~"Flux.*"}', "{{alertname}}"),), needs="event",
        ),
        Panel(
            "Builds", "Releases that run; more than one line is an upgrade under way.",
            "table", "none", (Query(f"count by (model, version, torch, diffusers, ray) (flux_build_info{{{FLUX}}})"),),
            width=16,
        ),
        Panel(
            "Attention", "The kernels that each group uses, chosen at its start where `attention_backend` is `auto`.",
            "table", "none", (Query(f"max by (replica, backend) (flux_attention_info{{{GROUP}}})"),), width=8,
        ),
    ),
)  # fmt: skip

RAY_SERVE = Row(
    "Ray Serve",
    (
        Panel(
            "Requests per deployment", "Calls per second that each Serve deployment processed.",
            "timeseries", "reqps",
            (Query(rate("ray_serve_deployment_request_counter_total", "deployment", SERVE), "{{deployment}}"),),
        ),
        Panel(
            "Under way per deployment", "Calls that each Serve deployment's replicas are processing.",
            "timeseries", "short",
            (
                Query(
                    f"sum by (deployment) (ray_serve_replica_processing_queries{{{SERVE}}})", "{{deployment}}"
                ),
            ),
        ),
    ),
)  # fmt: skip

GPU = Row(
    "GPUs",
    (
        Panel(
            "GPU utilisation", "Share of the time in which each GPU ran kernels, as Ray reports it in percent.",
            "timeseries", "percent",
            (Query(f"ray_node_gpus_utilization{{{NODE}}}", "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
        ),
        Panel(
            "GPU memory", "Memory in use on each GPU, all processes together.",
            "timeseries", "decmbytes",
            (Query(f"ray_node_gram_used{{{NODE}}}", "{{instance}} GPU {{GpuIndex}}"),), needs="gpu",
        ),
    ),
)  # fmt: skip

SERVICE = Dashboard(
    uid="flux-service",
    title="FLUX / Service",
    description="Traffic, latency by phase, queue, errors, the latency objective, Ray Serve and GPUs.",
    rows=(OVERVIEW, TRAFFIC, LATENCY, QUEUE, ADAPTERS, SLO, RAY_SERVE, GPU),
)
