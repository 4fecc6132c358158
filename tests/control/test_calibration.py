"""What a calibration runs, against `magcache_core.calibrate` on the shipped model, and how it goes on after a cut."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.calibration import Outcome, Run, Subject, calibration, expected_runs
from app.control.findings import Findings, from_bytes, to_bytes
from app.engine.engine import Engine
from app.engine.sampling import FlowMatchSampler
from app.messages.calibration import CalibrationJob, CalibrationRun
from app.messages.conditioning import Conditioning
from app.settings import Settings
from magcache_core import Profile
from magcache_core import calibrate as pipelines
from magcache_core.measure import probes
from magcache_core.run_sums import RunMeasurement
from magcache_core.trials import FINALISTS, as_served, mean_error
from tests.local_group import MODEL, TEXT_TOKENS, decode, embed, form, job, load_pipeline

STEPS = 6
PROMPTS = ("a red circle on a blue background", "a green square", "a yellow star")
JOB = CalibrationJob("calibration-1", PROMPTS, STEPS, 64, 64, 3.5, 3, (3, 5), trial_runs=2, moves=2)
SIGMAS = tuple(FlowMatchSampler(MODEL).sigmas(STEPS, 16).tolist())
SUBJECT = Subject("own", "models/flux-tiny", "FluxTransformer2DModel", SIGMAS, {"dtype": "float32"})


class EngineRuns:
    """Runs on an engine in this process, as the service's group does them."""

    def __init__(self, pipeline: FluxPipeline, true_cfg_scale: float = 1.0) -> None:
        self._pipeline = pipeline
        self._scale = true_cfg_scale
        self._engine = Engine(MODEL)

    def outcome(self, run: Run) -> Outcome:
        asked = job(
            "run/0", size=(64, 64), steps=STEPS, seed=0, calibration=run.calibration, true_cfg_scale=self._scale
        )
        negative = embed(self._pipeline, "") if self._scale > 1 else None
        conditioning = Conditioning(embed(self._pipeline, run.prompt), negative, grams=run.grams)
        self._engine.restart()
        for plan in form([asked], Settings()).plans:
            result = self._engine.execute(plan, [conditioning] if plan.admit else [])
        (latents,) = result.latents.values()
        image = None
        if run.decoded:
            image = as_served(torch.from_numpy(decode(self._pipeline, latents, asked)).permute(2, 0, 1))
        return Outcome(latents, 0.5, result.sums.get("run/0", {}), image)


class InventedRuns:
    """Outcomes that depend on what is run and nothing else, in no time; it counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[Run] = []

    def outcome(self, run: Run) -> Outcome:
        self.asked.append(run)
        key = f"{run.prompt} {run.calibration.schedule} {run.calibration.reuse}"
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]))
        latents, image = torch.randn(4, 3, generator=generator), torch.rand(3, 8, 8, generator=generator)
        sums = {}
        if run.calibration.record:
            measurement = RunMeasurement(SIGMAS, gram=run.grams.get("cond"))
            for _ in range(STEPS):
                residual = torch.randn(1, 4, 6, generator=generator)
                measurement.add(residual, residual[..., :3], lambda other: other[..., :3])
            sums = {"cond": measurement.sums}
        return Outcome(latents, 1.0, sums, image if run.decoded else None)


def follow(
    runs: EngineRuns | InventedRuns, asked: CalibrationJob, findings: Findings, most: float = math.inf
) -> Profile | None:
    """The profile, or None when it takes more than ``most`` runs."""
    going = calibration(asked, SUBJECT, findings)
    try:
        run = next(going)  # none where all of them are known
        while most > 0:
            run = going.send(runs.outcome(run))
            most -= 1
    except StopIteration as end:
        profile: Profile = end.value
        return profile
    return None


@pytest.mark.parametrize(("negative", "scale"), [(None, 1.0), ("", 4.0)])
def test_it_is_the_calibration_of_a_pipeline(negative: str | None, scale: float) -> None:
    pipeline = load_pipeline()
    asked = replace(JOB, negative_prompt=negative, true_cfg_scale=scale)
    found = follow(EngineRuns(pipeline, scale), asked, Findings())
    same = pipelines.CalibrationJob(
        PROMPTS, STEPS, 64, 64, negative_prompt=negative, true_cfg_scale=scale, max_sequence_length=TEXT_TOKENS
    )
    measured = pipelines.calibrate(pipeline, same, "own", "models/flux-tiny", progress=False)
    measured = replace(measured, reuse="corrected", budget=3)
    expected = pipelines.try_out(pipeline, same, measured, runs=2, moves=2, budgets=[3, 5], progress=False)
    split = {"chosen_on_first": 2, "judged_on_last": 0}
    assert found is not None
    assert replace(found, branches={}, trials=(), provenance={}) == replace(
        expected, branches={}, trials=(), provenance={}
    )
    assert set(found.branches) == set(expected.branches) == ({"cond"} if negative is None else {"cond", "uncond"})
    for branch, curve in found.branches.items():
        assert curve.norm_ratios == pytest.approx(expected.branches[branch].norm_ratios, rel=1e-3)
        costs, known = curve.costs, expected.branches[branch].costs
        assert costs is not None
        assert known is not None
        torch.testing.assert_close(costs.sensitivity, known.sensitivity, rtol=5e-3, atol=0)
        torch.testing.assert_close(costs.velocities, known.velocities, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(costs.segments["fitted"], known.segments["fitted"], rtol=5e-3, atol=1e-3)
    # The moves of one search go on where the other budget's ended; here each budget has a search of its own.
    assert [trial.computed for trial in found.trials] == [trial.computed for trial in expected.trials] == [3, 5]
    errors = [trial.error for trial in found.trials]
    assert errors == pytest.approx([trial.error for trial in expected.trials], rel=0.2)
    assert dict(found.provenance) == {
        "source": "measured by the service",
        "runs": 3,
        "dtype": "float32",
        "trials": split,
    }
    assert expected.provenance["trials"] == split


JUDGED = replace(JOB, prompts=(*PROMPTS, "a blue circle", "two red stars"), judge_runs=2)


def test_held_out_prompts_judge_and_nothing_else() -> None:
    runs, findings = InventedRuns(), Findings()
    profile = follow(runs, JUDGED, findings)
    assert profile is not None
    held_out = JUDGED.prompts[3:]
    by_judges = [run for run in runs.asked if run.prompt in held_out]
    assert {run.prompt for run in runs.asked if run.calibration.record} == set(PROMPTS)
    assert profile.provenance["runs"] == 3
    assert profile.provenance["trials"] == {"chosen_on_first": 2, "judged_on_last": 2}
    assert all(run.decoded for run in by_judges)
    for asked in (runs.asked, by_judges):
        fitted = [run.calibration for run in asked if run.calibration.reuse == "least_squares"]
        assert fitted
        assert all(len(run.products) == STEPS for run in fitted)
    assert len(by_judges) == 2 + 2 * 2 * FINALISTS, "the uncached images, and three schedules of two budgets"
    assert len(runs.asked) <= expected_runs(JUDGED)
    for trial in profile.trials:
        chosen = {key: mean_error(torch.tensor(errors)) for key, errors in findings.errors.items()}
        same = [key for key in chosen if key[0].count("C") == trial.computed]
        closest = sorted(same, key=chosen.__getitem__)[:FINALISTS]
        judged = {key: mean_error(torch.tensor(findings.judged[key])) for key in closest}
        assert judged[trial.schedule, trial.reuse] == min(judged.values())
        assert trial.error <= min(judged.values())
    assert [trial.error for trial in profile.trials] == sorted((trial.error for trial in profile.trials), reverse=True)


def test_when_time_is_over_what_was_closest_is_judged_all_the_same() -> None:
    every = replace(JUDGED, moves=6)
    judged = []
    for budget_s in range(8, 40):
        findings = Findings()
        profile = follow(InventedRuns(), replace(every, budget_s=float(budget_s)), findings)
        assert profile is not None
        assert all(len(errors) == JUDGED.judge_runs for errors in findings.judged.values())
        assert all((trial.schedule, trial.reuse) in findings.judged for trial in profile.trials)
        assert findings.seconds <= budget_s + 2 * JUDGED.judge_runs + 1
        judged.append(len(findings.judged))
    assert {1, FINALISTS} < set(judged)


def test_it_looks_for_the_fewest_steps_that_reach_each_floor() -> None:
    profile = follow(InventedRuns(), replace(JOB, budgets=(3,), floors_db=(99.0,)), Findings())
    assert profile is not None
    assert [trial.computed for trial in profile.trials] == [3, 4, 5], "none reaches it"
    easy = follow(InventedRuns(), replace(JOB, budgets=(3,), floors_db=(1.0,)), Findings())
    assert easy is not None
    assert [trial.computed for trial in easy.trials] == [1, 3], "the fewest that can be do"


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 40), max_size=6), asked=st.sampled_from([JOB, JUDGED]))
def test_cut_short_it_goes_on_and_finds_the_same(cuts: list[int], asked: CalibrationJob) -> None:
    whole = InventedRuns()
    expected = follow(whole, asked, Findings())
    runs, findings = InventedRuns(), Findings()
    for most in cuts:
        if follow(runs, asked, findings, most) is not None:
            break
        kept = from_bytes(to_bytes(findings, asked), asked)
        assert kept is not None
        findings = kept
    found = follow(runs, asked, findings)
    assert found is not None
    assert expected is not None
    assert found.version == expected.version

    def references(of: InventedRuns) -> int:
        return sum(run.calibration == CalibrationRun("C" * STEPS) for run in of.asked)

    # Nothing but the references is run twice, and each of those once after a cut.
    assert references(runs) <= references(whole) + (2 + asked.judge_runs) * len(cuts)
    assert len(runs.asked) - references(runs) == len(whole.asked) - references(whole)
    assert findings.runs == len(runs.asked)


def test_each_run_is_run_once() -> None:
    runs = InventedRuns()
    profile = follow(runs, JOB, Findings())
    assert profile is not None
    recorded = [run for run in runs.asked if run.calibration.record]
    assert [run.prompt for run in recorded] == list(PROMPTS)
    assert [not run.grams for run in recorded] == [True, False, False]
    assert [run.decoded for run in recorded] == [True, True, False]
    probed = runs.asked[len(PROMPTS) :][: len(probes(STEPS))]
    assert [run.calibration.schedule.index(".") for run in probed] == list(probes(STEPS))
    keys = [(run.prompt, run.calibration) for run in runs.asked]
    assert len(set(keys)) == len(keys) <= expected_runs(JOB)
    assert [trial.computed for trial in profile.trials] == [3, 5]


def test_it_ends_with_what_it_has_when_time_is_over() -> None:
    hurried = InventedRuns()
    profile = follow(hurried, replace(JOB, budget_s=1.0), Findings())
    assert profile is not None
    assert (profile.provenance["runs"], profile.trials) == (1, ()), "one run is recorded, half of the time is over"
    assert len(hurried.asked) == 1 + len(probes(STEPS))
    profiles = []
    for budget_s in range(6, 40):
        slow = follow(InventedRuns(), replace(JOB, budget_s=float(budget_s), moves=6), Findings())
        assert slow is not None
        profiles.append(slow)
    found = [[trial.computed for trial in profile.trials] for profile in profiles]
    assert sorted(map(tuple, found)) == list(map(tuple, found)), "more time never finds less"
    assert (found[0], found[found.index([3])], found[-1]) == ([], [3], [3, 5]), "the first budget is tried first"
    known = [trial.error for profile in profiles for trial in profile.trials if trial.computed == 3]
    assert known == sorted(known, reverse=True), "the best so far counts, though the search was not over"
    assert len(set(known)) > 1
