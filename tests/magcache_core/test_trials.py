"""Schedules that were tried out, against runs of the same pipeline."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from magcache_core import (
    Plan,
    Profile,
    Trial,
    apply_mag_cache,
    choose,
    evenly_spaced,
    fewest_steps,
    fill,
    load_profile,
    plan,
    remove_mag_cache,
)
from magcache_core.calibrate import calibrate, try_out
from magcache_core.correct import evenly_corrected
from magcache_core.planner import corrected_plans, whole_plan
from magcache_core.profile_data import ProfileError, parse, to_json
from magcache_core.trials import FINALISTS, finalists, never_rising, search
from tests.magcache_core.prompt_pipe import STEPS, PromptPipe, embeddings, job


@pytest.fixture
def tried(pipe: FluxPipeline) -> Profile:
    jobs = job(batch=1)
    measured = calibrate(PromptPipe(pipe), jobs, "tiny", "test/tiny", progress=False)
    return try_out(PromptPipe(pipe), jobs, measured, runs=2, moves=2, progress=False)


LEVELS = 1.01
"""Images are compared in 256 levels: one level of one of their 3,072 values moves `drift` by 0.2 %, and the processor
decides which way a value is rounded."""


def drift(pipe: FluxPipeline, followed: Plan) -> float:
    """How far both images are from the uncached ones, geometric mean of the root mean squares."""
    tokens, pooled = zip(*map(embeddings, ("a", "b")), strict=True)

    def run() -> torch.Tensor:
        images: torch.Tensor = pipe(
            prompt_embeds=torch.stack(tokens),
            pooled_prompt_embeds=torch.stack(pooled),
            num_inference_steps=STEPS,
            width=32,
            height=32,
            guidance_scale=3.5,
            generator=[torch.Generator("cpu").manual_seed(0) for _ in range(2)],
            output_type="pt",
        ).images
        return (images.clamp(0, 1) * 255).round() / 255

    reference = run()
    apply_mag_cache(pipe.transformer, followed)
    moved = run()
    remove_mag_cache(pipe.transformer)
    return (moved - reference).square().flatten(1).mean(dim=1).sqrt().clamp(min=1e-5).log().mean().exp().item()


def test_no_candidate_was_closer(pipe: FluxPipeline, tried: Profile) -> None:
    assert [trial.computed for trial in tried.trials] == list(range(fewest_steps(tried), STEPS))
    errors = [trial.error for trial in tried.trials]
    assert errors == sorted(errors, reverse=True)
    bare = replace(tried, trials=())
    for trial in tried.trials:
        found = drift(pipe, plan(tried, budget=trial.computed))
        assert trial.error <= found * LEVELS
        for mode, even in (("linear", evenly_spaced), ("corrected", evenly_corrected)):
            for other in (
                plan(bare, budget=trial.computed, reuse=mode),
                fill(bare, even(STEPS, trial.computed), mode),
            ):
                assert found <= drift(pipe, other) * LEVELS


def test_a_plan_comes_from_a_trial_unless_more_is_asked_for(tried: Profile) -> None:
    for trial in tried.trials:
        made = plan(tried, budget=trial.computed)
        assert made == fill(tried, trial.schedule, trial.reuse)
    assert plan(tried, budget=STEPS).predicted_error == 0.0
    assert plan(tried, max_error=0.0).computed == STEPS
    bare = replace(tried, trials=())
    assert plan(tried, max_error=0.5) == plan(bare, max_error=0.5)
    for asked in ({"reuse": "linear"}, {"steps": STEPS - 1}, {"retention_ratio": 0.2}, {"max_skip_steps": 3}):
        assert plan(tried, budget=4, **asked) == plan(bare, budget=4, **asked)
    assert plan(tried, STEPS + 4, budget=6) == fill(tried, "C.C.C.C.C.C.", "linear")
    assert choose(tried, STEPS + 4, budget=7) == plan(bare, STEPS + 4, budget=7)
    recommending = replace(tried, budget=4)
    assert choose(recommending) == plan(tried, budget=4)
    cheapest = plan(bare, STEPS + 4, max_error=plan(bare, budget=4).predicted_error)
    assert choose(recommending, STEPS + 4) == plan(tried, STEPS + 4, budget=cheapest.computed)


def test_trials_survive_the_file(tried: Profile) -> None:
    read = parse(to_json(tried), "it")
    assert [(trial.schedule, trial.reuse) for trial in read.trials] == [
        (trial.schedule, trial.reuse) for trial in tried.trials
    ]
    assert [trial.error for trial in read.trials] == pytest.approx([trial.error for trial in tried.trials], rel=1e-3)
    assert read.tail(2, STEPS).trials == ()
    for wrong in (Trial("C.", "linear", 1.0), Trial("C......X", "linear", 1.0), Trial("C.......", "no", 1.0)):
        with pytest.raises(ProfileError, match="trial"):
            parse(to_json(replace(tried, trials=(wrong,))), "it")


def test_refining_tries_only_what_is_named_and_never_forgets_a_better_one(pipe: FluxPipeline, tried: Profile) -> None:
    again = try_out(PromptPipe(pipe), job(batch=1), tried, runs=2, moves=4, budgets=[4], progress=False)
    for before, after in zip(tried.trials, again.trials, strict=True):
        assert after.error <= before.error * (1 + 1e-6)
        if after.computed != 4:
            assert (after.schedule, after.reuse) == (before.schedule, before.reuse)


def test_candidates_weigh_predictions_differently(tried: Profile) -> None:
    found = list(corrected_plans(tried, 4))
    assert len(found) == 5
    assert {(one.computed, one.reuse) for one in found} == {(4, "corrected")}
    assert plan(replace(tried, trials=()), budget=4, reuse="corrected") in found
    bare = replace(tried, branches={"cond": replace(tried.branch(), costs=None)})
    assert list(corrected_plans(bare, 4)) == []
    assert whole_plan(bare, 4) is None
    whole = whole_plan(tried, 4)
    assert (whole.computed, whole.reuse, whole.schedule[0]) == (4, "corrected", "C")


def test_a_plan_that_is_the_best_as_a_whole_is_tried(tried: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fill(tried, "CC....CC", "corrected")
    monkeypatch.setattr("magcache_core.trials.whole_plan", lambda profile, budget: whole)
    trying = search(replace(tried, trials=()), moves=0, budgets=[4])
    asked = [next(trying)]
    with suppress(StopIteration):
        while True:
            asked.append(trying.send(1.0))
    assert whole in asked


def test_other_step_counts_are_even_below_two_fifths_and_planned_beyond(tried: Profile) -> None:
    corrected = replace(tried, reuse="corrected")
    for steps, budget in ((STEPS + 4, 4), (STEPS + 12, 7)):
        assert plan(corrected, steps, budget=budget) == fill(corrected, evenly_corrected(steps, budget), "corrected")
    for steps, budget in ((STEPS + 2, 4), (STEPS + 4, 5)):
        assert plan(corrected, steps, budget=budget) == plan(corrected, steps, budget=budget, reuse="corrected")


def test_held_out_runs_decide_between_the_closest(pipe: FluxPipeline) -> None:
    jobs = job(batch=1)
    split = replace(jobs, prompts=(*jobs.prompts[:2], "c"), held_out=1)
    measured = calibrate(PromptPipe(pipe), split, "tiny", "test/tiny", progress=False)
    assert measured.provenance["runs"] == len(split.runs) == 2 * split.seeds
    ran: list[str] = []

    class Noted(PromptPipe):
        @wraps(PromptPipe.__call__)  # calibration asks for the signature
        def __call__(self, **arguments: Any) -> Any:
            ran.extend(arguments["prompt"])
            return super().__call__(**arguments)

    chosen = try_out(PromptPipe(pipe), replace(split, held_out=0), measured, 2, 1, [4], progress=False)
    judged = try_out(Noted(pipe), split, measured, runs=2, moves=1, budgets=[4], progress=False)
    assert judged.provenance["trials"] == {"chosen_on_first": 2, "judged_on_last": split.seeds}
    assert ran.count("c") == (1 + FINALISTS) * split.seeds
    assert judged.trials[0].error != chosen.trials[0].error, "it is that of the held-out images"


def test_the_best_of_a_number_are_its_finalists_and_errors_never_rise() -> None:
    tried = [Trial("CC..", "linear", error) for error in (0.3, 0.1, 0.2, 0.4)]
    others = [Trial("CCC.", "linear", 0.15), Trial("C...", "linear", 0.5)]
    assert [trial.error for trial in finalists([*tried, *others], 2)] == [0.1, 0.2, 0.3]
    rising = never_rising([others[0], tried[1], others[1]])
    assert [(trial.computed, trial.error) for trial in rising] == [(1, 0.5), (2, 0.1), (3, 0.1)]


def test_a_search_cut_short_goes_on_where_it_was(tried: Profile) -> None:
    bare = replace(tried, trials=())

    def judge(candidate: Plan) -> float:
        return 1.0 / (1 + sum(i * i for i, mark in enumerate(candidate.schedule) if mark == "C"))

    def drive(known: dict[tuple[str, str], float], most: int) -> tuple[Trial, ...] | None:
        trying = search(bare, moves=3)
        try:
            candidate = next(trying)
            while True:
                key = candidate.schedule, candidate.reuse
                if key not in known:
                    if len(known) == most:
                        return None
                    known[key] = judge(candidate)
                candidate = trying.send(known[key])
        except StopIteration as end:
            return end.value

    whole = drive({}, 10_000)
    assert whole is not None
    known: dict[tuple[str, str], float] = {}
    for most in range(5, 10_000, 5):
        if (found := drive(known, most)) is not None:
            assert found == whole
            assert most > 10
            return


def test_least_squares_are_tried_with_the_profiles_inner_products() -> None:
    profile = replace(load_profile("flux-tiny"), trials=())
    found = [plan(profile, budget=10, reuse="least_squares")]
    trying = search(profile, moves=3, budgets=[10])
    candidate = next(trying)
    trials: tuple[Trial, ...] = ()
    while not trials:
        found.append(candidate)
        try:
            candidate = trying.send(0.1 if candidate.reuse == "least_squares" else 0.2)
        except StopIteration as end:
            trials = end.value
    fitted = [one for one in found if one.reuse == "least_squares"]
    assert len(fitted) > 3, "planned, evenly spaced, and moved"
    assert {one.products for one in fitted} == {found[0].products}
    assert [trial.reuse for trial in trials] == ["least_squares"]
    assert found[0].schedule in {one.schedule for one in fitted[1:]}
