"""A calibration: what to measure, the runs that do, and how far it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from magcache_core.plan_data import Products


@dataclass(frozen=True)
class CalibrationRun:
    """What a row in the background does: a calibration's, or the quality guard's. It steps only while there is no
    client's image.

    Attributes:
        schedule: one character per step, ``C`` computes, ``.`` reuses.
        reuse: how reused steps are filled in, one of `magcache_core.REUSE_MODES` but ``fitted``.
        products: of velocities, that ``least_squares`` weighs them by.
        record: its steps are measured (`magcache_core.run_sums`); all of them compute.
    """

    schedule: str
    reuse: str = "residual"
    record: bool = False
    products: Products = ()


@dataclass(frozen=True)
class CalibrationJob:
    """What to calibrate, and how long that may take.

    Attributes:
        prompts: all run from noise of seed 0; all but the last ``judge_runs`` are recorded.
        guidance_scale: distilled guidance.
        computed_steps: what the profile recommends.
        budgets: numbers of computed steps to try schedules for, the most important first.
        trial_runs: how many of the recorded prompts each schedule is tried on.
        moves: schedules to try beside the candidates of each number of computed steps.
        budget_s: seconds of its runs, waits for clients' images included, after which it ends with what it has.
        negative_prompt: of all runs, where true CFG runs; else None.
        true_cfg_scale: 1 where it does not run.
        judge_runs: how many of the last prompts decide between the schedules that came closest; 0 for none.
        floors_db: mean PSNRs for which the fewest computed steps are looked for, after ``budgets``.
    """

    id: str
    prompts: tuple[str, ...]
    steps: int
    width: int
    height: int
    guidance_scale: float
    computed_steps: int
    budgets: tuple[int, ...]
    trial_runs: int = 4
    moves: int = 6
    budget_s: float = 1800.0
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    judge_runs: int = 0
    floors_db: tuple[float, ...] = ()

    @property
    def recorded_prompts(self) -> tuple[str, ...]:
        """Those of the recorded runs."""
        return self.prompts[: len(self.prompts) - self.judge_runs]


@dataclass(frozen=True)
class CalibrationStatus:
    """How far a calibration is.

    Attributes:
        state: ``running``, ``done``, ``cancelled`` or ``failed``.
        phase: ``record``, ``probe`` or ``try``: what it runs now, or ran last.
        runs: images that it has run, those before an interruption included.
        expected_runs: how many it will have run at its end, as far as that is known.
        seconds: time of these runs.
        profile: ``NAME@VERSION`` once it is done.
        message: what made it fail.
    """

    id: str
    state: Literal["running", "done", "cancelled", "failed"]
    phase: str
    runs: int
    expected_runs: int
    seconds: float
    profile: str | None = None
    message: str | None = None

    @property
    def progress(self) -> float:
        """Share of its runs that are done; 1 once it is done, and not before."""
        return 1.0 if self.state == "done" else min(self.runs / self.expected_runs, 0.999)
