"""Warm-up before the first request: run and time a few steps of blank images.

The one-time costs of a kind of step (compiling, picking kernels, growing the allocator's pools) are paid here and not
by the first request, and a step that does not fit into memory fails here.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from app.engine.checkpoint_files import CheckpointError
from app.engine.engine import Engine
from app.engine.lora import WITHOUT
from app.messages.conditioning import Conditioning, PromptEmbeddings
from app.messages.jobs import COND, DenoiseJob
from app.messages.plans import BranchStep, RowStep, StepPlan, chained
from app.messages.results import StepTime

REPEATS = 3
"""The first is not counted, and of the others the fastest: other processes are starting on the machine."""
COMPUTE = BranchStep(COND, compute=True)
REUSE = BranchStep(COND, compute=False, weights=(1.0,))


def warm_up(engine: Engine, job: DenoiseJob, text_tokens: int, max_rows: int) -> tuple[StepTime, ...]:
    """Run steps of images like ``job``, without true CFG: one row alone and, with ``max_rows`` above 1, two at once.

    A step of an image of another size is run and not timed, and so are steps with adapters where the engine has them,
    so that all kinds of compiled code are there. The steps that are timed are recorded, where graphs are in use.

    All ranks of a group do this at the same time. The engine is left in its initial state.

    Raises:
        CheckpointError: what a step gives is not finite.
    """
    count = min(max_rows, 2)
    blank = [_blank(engine, text_tokens)] * (count + 1)
    if engine.loras is not None:
        for plan in _history(replace(job, loras=(WITHOUT,)), count):
            engine.execute(plan, blank[: len(plan.admit)])
    admission, *steps, last = _history(job, count)
    seconds: list[list[float]] = []
    for repeat in range(REPEATS):
        engine.restart()
        engine.execute(admission, blank)
        # The first compiles what the second may record, and the last replays that.
        with engine.graphs.recording() if repeat == 1 else nullcontext():
            seconds.append([engine.execute(plan).seconds for plan in steps])
    engine.execute(last)
    if not all(torch.isfinite(row.latents).all() for row in engine.rows.values()):
        raise CheckpointError(
            "a step of a blank prompt gives values that are not finite: the weights are damaged (download "
            f"them again), or dtype {str(engine.dtype).removeprefix('torch.')} is too small for them"
        )
    engine.restart()
    fastest = map(min, zip(*seconds[1:], strict=True))
    return tuple(
        StepTime(len(plan.rows), plan.rows[0].branches[0].compute, best)
        for plan, best in zip(steps, fastest, strict=True)
    )


def _history(job: DenoiseJob, count: int) -> list[StepPlan]:
    """Admission of ``count`` rows like ``job`` and one of another size, steps of those rows, and one of the other."""
    rows = tuple(replace(job, row_id=f"warmup/{number}") for number in range(count))
    # Since the usual size may have compiled code of its own.
    other = replace(job, row_id="warmup/other", width=job.width + 32)
    return chained([StepPlan(0, "", admit=(*rows, other)), *_steps(rows), _step([other], COMPUTE)])


def _steps(rows: Sequence[DenoiseJob]) -> list[StepPlan]:
    """One row alone and then all, each time computed and then reused; always the first step, which every job has."""
    return [_step(rows[:count], branch) for count in range(1, len(rows) + 1) for branch in (COMPUTE, REUSE)]


def _step(rows: Sequence[DenoiseJob], branch: BranchStep) -> StepPlan:
    return StepPlan(0, "", rows=tuple(RowStep(row.row_id, 0, (branch,)) for row in rows))


def _blank(engine: Engine, text_tokens: int) -> Conditioning:
    config = engine.transformer.config
    pooled = config.get("pooled_projection_dim")  # FLUX.2 takes none
    return Conditioning(
        PromptEmbeddings(
            torch.zeros(text_tokens, config.joint_attention_dim),
            None if pooled is None else torch.zeros(pooled),
        )
    )
