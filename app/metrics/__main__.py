"""``python -m app.metrics`` prints docs/metrics.md, made from the catalogue."""

from __future__ import annotations

from app.metrics.catalogue import CATALOGUE, COMMON, Owner, Spec

_OWNERS: dict[Owner, str] = {
    "api": "The API",
    "encoder": "The prompt encoder",
    "guard": "The quality guard",
    "calibration": "Calibrations",
    "coordinator": "Each coordinator",
}

_HEAD = """\
# Metrics

Made from `app/metrics/catalogue.py` by `make metrics`: edit it there.

`GET /metrics` has the metrics of all API processes, the prompt encoder's, the quality guard's where it is on, those of
calibrations, and those of all coordinators, which are found by name and asked directly. The format is Prometheus' text,
or OpenMetrics when `Accept` asks for it; there, the buckets marked with *id* carry the `request_id` of a request that
fell into them, which is the `X-Request-Id` of its reply. Ray's and Ray Serve's own metrics are exported by Ray.

A counter begins at 0 when its owner starts: a coordinator when its group is built, the others with their Serve replica.
All labels are bounded: `rank` by `tensor_parallel_size` times `sequence_parallel_size`, `replica` and `process` by the
replicas that Serve starts, `profile` by what was calibrated, `steps` and `computed` by
`sampling.max_inference_steps`, the rest by the lists below. `process` is an API process (`api_replicas`), or
`encoder-…` where the encoder has its own: whichever API process is asked answers for all, and queries sum over them.

`make monitoring` watches a running service with Prometheus, the rules and the alerts of `k8s/base/rules.yaml`. The
dashboards in `k8s/base/dashboards` are made by `scripts/dashboards`; this is what they show of flux-tiny under a mix of
requests, drawn by `python -m scripts.dashboards.render`:

![The panels of both dashboards](images/dashboards.png)
"""


def document() -> str:
    """The text of docs/metrics.md."""
    parts = [_HEAD]
    for owner, title in _OWNERS.items():
        common = " and ".join(f"`{name}`" for name in COMMON[owner])
        parts.append(f"\n## {title}\n\nEach carries {common}.\n")
        parts.append("| metric | type | unit | labels | meaning |\n|---|---|---|---|---|")
        parts.extend(_row(spec) for spec in CATALOGUE if spec.owner == owner)
    parts.append("\n## Buckets\n\n| histogram | upper bounds |\n|---|---|")
    for spec in CATALOGUE:
        if spec.kind == "histogram":
            bounds = ", ".join(f"{bound:g}" for bound in spec.buckets)
            parts.append(f"| `{spec.name}` | {bounds}{' (*id*)' if spec.exemplars else ''} |")
    return "\n".join(parts) + "\n"


def _row(spec: Spec) -> str:
    labels = "; ".join(
        f"`{name}`: {', '.join(values)}" if values else f"`{name}`" for name, values in spec.labels.items()
    )
    return f"| `{spec.series}` | {spec.kind} | {spec.unit} | {labels} | {spec.help} |"


if __name__ == "__main__":
    print(document(), end="")
