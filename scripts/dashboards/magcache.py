"""The *MagCache* dashboard: what was not computed, what that saved and cost, and how the ranks keep up."""

from __future__ import annotations

from scripts.dashboards.panels import (
    FLUX,
    GROUP,
    RATE,
    Dashboard,
    Panel,
    Query,
    Row,
    distribution,
    mean,
    quantiles,
    rate,
    share,
)


def _by_decile(decision: str, window: str) -> str:
    """The share of the steps in each tenth of the schedules that had this decision."""
    return (
        f'sum by (decile) (increase(flux_schedule_steps_total{{{GROUP}, decision="{decision}"}}[{window}]))'
        f" / sum by (decile) (increase(flux_schedule_steps_total{{{GROUP}}}[{window}]))"
    )


REUSE = Row(
    "Reuse",
    (
        Panel(
            "Steps reused", "Share of the denoising steps that reused a residual, by CFG branch.",
            "timeseries", "percentunit",
            (Query(share("flux_steps_total", 'decision="reused"', "branch", GROUP), "{{branch}}"),),
        ),
        Panel(
            "Skip ratio per picture", "Each cell counts finished pictures whose steps were reused to that share.",
            "heatmap", "percentunit", distribution("flux_request_skip_ratio", GROUP),
        ),
        Panel(
            "Reuse by position in the schedule",
            "Share of the steps that were reused in each tenth of a picture's schedule; the first ones always compute.",
            "bargauge", "percentunit", (Query(_by_decile("reused", "$__range"), "{{decile}}"),),
        ),
        Panel(
            "Schedule",
            "Each row is a tenth of the schedule, 0 the first; the colour is the share of its steps that was computed.",
            "heatmap", "percentunit", (Query(_by_decile("computed", RATE), "{{decile}}"),),
        ),
    ),
)  # fmt: skip

TIME = Row(
    "Time",
    (
        Panel(
            "Where the ranks' time goes", "Seconds per second spent on computed and on reused steps, all groups.",
            "timeseries", "percentunit",
            (Query(rate("flux_decision_seconds_total", "decision", GROUP), "{{decision}}"),), stacked=True,
        ),
        Panel(
            "Speed-up by reuse", "Time that all steps would have taken if computed, over the time that they took.",
            "timeseries", "none",
            (
                Query(
                    f"1 + {rate('flux_saved_seconds_total', '', GROUP)}"
                    f" / {rate('flux_decision_seconds_total', '', GROUP)}",
                    "times faster",
                ),
            ),
        ),
        Panel(
            "Time saved", "Estimated seconds of the slowest rank that reuse saved within the dashboard's range.",
            "stat", "s", (Query(f"sum(increase(flux_saved_seconds_total{{{GROUP}}}[$__range]))", "saved"),), width=6,
        ),
        Panel(
            "Residuals kept", "Memory that kept residuals take on the rank with the most of them, by group.",
            "timeseries", "bytes", (Query(f"max by (replica) (flux_residual_bytes{{{GROUP}}})", "{{replica}}"),),
            width=18,
        ),
        *(
            panel
            for kind, meaning in (
                ("computed", "Time of a step plan in which some row computed the blocks."),
                ("reused", "Time of a step plan in which all rows reused a residual."),
            )
            for panel in (
                Panel(
                    f"{kind.capitalize()} steps: percentiles", meaning, "timeseries", "s",
                    quantiles("flux_step_duration_seconds", f'{GROUP}, kind="{kind}"'),
                ),
                Panel(
                    f"{kind.capitalize()} steps: distribution", f"{meaning} Each cell counts the plans.", "heatmap",
                    "s", distribution("flux_step_duration_seconds", f'{GROUP}, kind="{kind}"'),
                ),
            )
        ),
    ),
)  # fmt: skip

ERROR = Row(
    "Error",
    (
        Panel(
            "Predicted error: percentiles", "Error that the profile predicts for the reused steps of a picture.",
            "timeseries", "none", quantiles("flux_request_predicted_error", GROUP),
        ),
        Panel(
            "Predicted error: distribution", "Each cell counts finished pictures with so much predicted error.",
            "heatmap", "none", distribution("flux_request_predicted_error", GROUP),
        ),
    ),
)  # fmt: skip

GUARD = Row(
    "Quality guard",
    (
        Panel(
            "Target and estimate",
            "PSNR against the uncached image that nine of ten images are to reach, and what they reach by estimate.",
            "timeseries", "dB",
            (
                Query(f"max(flux_guard_target_db{{{FLUX}}})", "target"),
                Query(f"flux_guard_worst_tenth_db{{{FLUX}}}", "{{profile}}, {{steps}} steps, CFG {{guided}}"),
            ),
            needs="event",
        ),
        Panel(
            "Computed steps that hold it", "What the guard has an image compute that leaves MagCache to the server.",
            "timeseries", "short",
            (Query(f"flux_guard_budget_steps{{{FLUX}}}", "{{profile}}, {{steps}} steps, CFG {{guided}}"),),
            width=6, needs="event",
        ),
        Panel(
            "Samples and changes", "Images compared, dropped and failed per second, and changes of a budget.",
            "timeseries", "short",
            (
                Query(rate("flux_guard_samples_total", "result", FLUX), "{{result}}"),
                Query(rate("flux_guard_changes_total", "direction", FLUX), "budget {{direction}}"),
            ),
            width=6, needs="event",
        ),
        Panel(
            "PSNR of samples", "Each cell counts compared images with so much PSNR against their uncached ones.",
            "heatmap", "dB", distribution("flux_guard_psnr_db", FLUX), needs="event",
        ),
        Panel(
            "SSIM of samples", "Each cell counts compared images with so much structural similarity.",
            "heatmap", "none", distribution("flux_guard_ssim", FLUX), needs="event",
        ),
    ),
)  # fmt: skip

CALIBRATION = Row(
    "Calibration",
    (
        Panel(
            "Progress", "Share of the runs of a calibration that are done, by the profile that it makes.",
            "timeseries", "percentunit",
            (Query(f"max by (profile) (flux_calibration_progress{{{FLUX}}})", "{{profile}}"),),
            width=9, needs="event",
        ),
        Panel(
            "Runs by phase", "Runs per second that record, that show how a displacement grows, and that try schedules.",
            "timeseries", "short",
            (Query(rate("flux_calibration_profile_runs_total", "profile, phase", FLUX), "{{profile}}, {{phase}}"),),
            width=9, needs="event",
        ),
        Panel(
            "Calibrations that ended", "Within the dashboard's range, by how.", "stat", "short",
            (Query(f"sum by (result) (increase(flux_calibrations_total{{{FLUX}}}[$__range]))", "{{result}}"),),
            width=6,
        ),
        Panel(
            "Time of the ranks", "Seconds per second that the ranks spent on images of calibrations and of the guard.",
            "timeseries", "percentunit",
            (Query(rate("flux_calibration_seconds_total", "replica", GROUP), "{{replica}}"),),
        ),
        Panel(
            "Time of the runs",
            "Seconds per second of calibrations' runs, waits for clients' images included; what it exceeds the ranks' "
            "time by is waiting.",
            "timeseries", "percentunit",
            (Query(rate("flux_calibration_profile_seconds_total", "profile", FLUX), "{{profile}}"),),
            needs="event",
        ),
        Panel(
            "Runs in the background", "Images per second that calibrations and the guard ran to their last step.",
            "timeseries", "ops", (Query(rate("flux_calibration_runs_total", "replica", GROUP), "{{replica}}"),),
        ),
    ),
)  # fmt: skip

BATCH = Row(
    "Batch",
    (
        Panel(
            "Rows that compute", "Each cell counts step plans with so many rows in the forward pass.",
            "heatmap", "short", distribution("flux_step_batch_rows", GROUP),
        ),
        Panel(
            "Rows per plan", "Mean rows in a step plan's forward pass; 0 counts where all rows reuse.",
            "timeseries", "short", (Query(mean("flux_step_batch_rows", "replica", GROUP), "{{replica}}"),), width=6,
        ),
        Panel(
            "Tokens per plan", "Mean tokens in a step plan's forward pass; `max_batch_tokens` bounds them.",
            "timeseries", "short", (Query(mean("flux_step_batch_tokens", "replica", GROUP), "{{replica}}"),), width=6,
        ),
    ),
)  # fmt: skip

RANKS = Row(
    "Ranks",
    (
        Panel(
            "Step time by rank", "Mean time of a step plan on each rank; one that stands out keeps the others waiting.",
            "timeseries", "s",
            (Query(mean("flux_rank_step_duration_seconds", "rank, kind", GROUP), "rank {{rank}}, {{kind}}"),),
        ),
        Panel(
            "Straggler gap", "Time of a step plan on the slowest rank less that on the fastest, on average.",
            "timeseries", "s", (Query(mean("flux_straggler_gap_seconds", "kind", GROUP), "{{kind}}"),),
        ),
        Panel(
            "Control-plane gap: percentiles", "Time that a rank with work had to wait for the next step plan.",
            "timeseries", "s", quantiles("flux_plan_wait_seconds", GROUP),
        ),
        Panel(
            "Control-plane gap: distribution",
            "Time that a rank with work had to wait for the next step plan. Each cell counts the plans.",
            "heatmap", "s", distribution("flux_plan_wait_seconds", GROUP),
        ),
        Panel(
            "Rebuilds and mismatches", "Groups built anew, and histories that a rank did not agree with, per group.",
            "timeseries", "short",
            (
                Query(f"sum by (replica) (flux_group_rebuilds_total{{{GROUP}}})", "rebuilds {{replica}}"),
                Query(f"sum by (replica) (flux_digest_mismatches_total{{{GROUP}}})", "mismatches {{replica}}"),
            ),
        ),
        Panel(
            "Digests checked", "Ranks' history digests per second that were compared with the coordinator's.",
            "timeseries", "ops", (Query(rate("flux_digests_checked_total", "replica", GROUP), "{{replica}}"),),
        ),
    ),
)  # fmt: skip

MAGCACHE = Dashboard(
    uid="flux-magcache",
    title="FLUX / MagCache",
    description="Skip ratio, schedules, time computed, reused and saved, predicted error, batch packing and ranks.",
    rows=(REUSE, TIME, ERROR, GUARD, CALIBRATION, BATCH, RANKS),
)
