"""What the coordinator tells all ranks to do, as a history with a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from app.messages.jobs import DenoiseJob


@dataclass(frozen=True)
class BranchStep:
    """What one CFG branch of a row does at one step.

    ``weights`` are empty when the branch computes; else the factors of its last computed residuals, newest first, or
    none where the row's velocities are reused and nothing runs.
    ``residuals_kept`` is how many computed residuals the branch has to keep afterwards for its later reuse.
    """

    branch: str
    compute: bool
    weights: tuple[float, ...] = ()
    residuals_kept: int = 1

    @property
    def runs(self) -> bool:
        """Whether the transformer, or its ends around a reused residual, run."""
        return self.compute or bool(self.weights)


@dataclass(frozen=True)
class RowStep:
    """One row in a plan: run ``step``, counted from the job's first, with a decision per branch.

    With ``last`` the result has its latents, with ``preview`` its x0 estimate at this step.

    A row that predicts and corrects velocities (`magcache_core.correct`) has factors of its last computed guided
    velocities, newest first: ``move``, at a computed step, of what is added to the latents for this step and the
    reused ones after it; and ``estimate``, at every step, of what is added to the latents for an x0 estimate.
    """

    row_id: str
    step: int
    branches: tuple[BranchStep, ...]
    last: bool = False
    preview: bool = False
    move: tuple[float, ...] = ()
    estimate: tuple[float, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """One plan for all ranks: first drop rows, then admit rows, then step rows.

    ``digest`` hashes this plan and all before it, which exposes a rank that missed a plan or got another one.
    The conditioning tensors of ``admit`` are sent beside the plan, in its order. A plan in the ``background`` steps a
    row of a calibration, and no client's image.
    """

    sequence: int
    digest: str
    admit: tuple[DenoiseJob, ...] = ()
    rows: tuple[RowStep, ...] = ()
    drop: tuple[str, ...] = ()
    background: bool = False


FIRST_DIGEST = "0" * 16


def plan_digest(previous: str, plan: StepPlan) -> str:
    """The digest of ``plan`` after a history with digest ``previous``; the plan's own digest field is ignored."""
    rows = ";".join(map(_row_text, plan.rows))
    content = f"{previous} {plan.sequence} {plan.admit!r} {plan.drop!r} {plan.background} {rows}"
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def chained(plans: Iterable[StepPlan]) -> list[StepPlan]:
    """``plans`` as a complete history: numbered from 0, each with its digest."""
    made: list[StepPlan] = []
    digest = FIRST_DIGEST
    for sequence, plan in enumerate(plans):
        numbered = replace(plan, sequence=sequence)
        digest = plan_digest(digest, numbered)
        made.append(replace(numbered, digest=digest))
    return made


def _row_text(row: RowStep) -> str:
    # Ranks hash every plan between steps, and a dataclass's own repr takes five times as long.
    parts = ",".join(f"{b.branch} {b.compute} {b.weights} {b.residuals_kept}" for b in row.branches)
    return f"{row.row_id!r} {row.step} {row.last} {row.preview} {row.move} {row.estimate} {parts}"
