"""A calibration's rows in the request table: they step when no client's image is there, and lose nothing."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from app.control.admission import AdmissionController
from app.control.schedule import SchedulePlanner
from app.control.scheduler import StepScheduler
from app.engine.geometry import Geometry
from app.engine.sampling import FlowMatchSampler
from app.messages.calibration import CalibrationRun
from app.messages.jobs import DenoiseJob
from app.messages.results import StepResult
from app.settings import Settings
from magcache_core import Plan, decisions
from tests.control.simulated_ranks import SimulatedRanks
from tests.local_group import MEASURED, MODEL, job
from tests.magcache_core.slow_least_squares import products

LIMITS = Settings(max_batch_rows=2)
PLANNER = SchedulePlanner(LIMITS, FlowMatchSampler(MODEL))


def background(number: int, schedule: str = "CC.C", reuse: str = "residual") -> DenoiseJob:
    return job(f"calibration/{number}", steps=len(schedule), calibration=CalibrationRun(schedule, reuse))


def table() -> AdmissionController:
    return AdmissionController(LIMITS, PLANNER, MEASURED, lambda: 0.0)


@settings(max_examples=60)
@given(
    clients=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=12),
    runs=st.lists(st.text("C.", max_size=6), min_size=1, max_size=4),
)
def test_a_calibration_steps_only_alone_and_goes_on_where_it_was(
    clients: list[tuple[int, int]], runs: list[str]
) -> None:
    """``clients``: by image, the tick before which it comes and its steps."""
    scheduler = StepScheduler(LIMITS, lambda: 0.0)
    jobs = {one.row_id: one for one in (background(i, f"C{marks}") for i, marks in enumerate(runs))}
    for one in jobs.values():
        scheduler.submit(one, PLANNER.schedules(one))
    coming = sorted(clients, reverse=True)
    under_way, done = set[str](), dict[str, int]()
    tick = 0
    while coming or not scheduler.empty:
        while coming and coming[-1][0] <= tick:
            client = job(f"client/{len(coming)}", steps=coming.pop()[1])
            under_way.add(client.row_id)
            scheduler.submit(client, PLANNER.schedules(client))
        plan = scheduler.next_plan()
        tick += 1
        if plan is None:
            continue
        assert plan.background == (not under_way), "a client's image has the ranks for itself, and waits for nothing"
        if plan.background:
            (row,) = plan.rows
            assert row.step == done.get(row.row_id, 0), "no step is lost or repeated"
            assert [one.row_id for one in plan.admit] == [row.row_id] * (row.step == 0)
            assert row.branches[0].compute == (jobs[row.row_id].calibration.schedule[row.step] == "C")
            done[row.row_id] = row.step + 1
        else:
            assert {row.row_id for row in plan.rows} <= under_way
            under_way -= {row.row_id for row in plan.rows if row.last}
    assert done == {row_id: one.num_inference_steps for row_id, one in jobs.items()}


def test_clients_find_the_table_as_if_no_calibration_ran() -> None:
    ranks, alone = SimulatedRanks(), SimulatedRanks()
    measured = background(0, "C" * 6)
    ranks.submit(measured)
    ranks.tick()
    asked = job("client/0", steps=6)
    with_it, without = ranks.submit(asked), alone.submit(asked)
    assert (with_it.eta_s, with_it.position) == (without.eta_s, without.position)
    counts = ranks.admission.counts
    assert (ranks.admission.scheduler.waiting, ranks.admission.scheduler.running) == (1, 0)
    ranks.run()
    alone.run()
    assert ranks.admission.load(asked)["eta_s"] == alone.admission.load(asked)["eta_s"]
    assert counts.computed_seconds == alone.admission.counts.computed_seconds
    assert (counts.admitted, alone.admission.counts.admitted) == (1, 1)


def test_a_message_has_one_computed_step_of_a_calibration() -> None:
    admission = table()
    entry = admission.submit(background(0, "C..CC."))
    formed = [admission.next_message(lambda _: entry.shape) for _ in range(4)]
    steps = [[sent.plan.rows[0].step for sent in message] for message in formed]
    assert steps == [[0], [1, 2, 3], [4], [5]]
    assert all(sent.seconds == 0 and sent.plan.background for message in formed for sent in message)
    for sent in formed[0]:
        admission.on_results(sent, [StepResult(0, 0, sent.plan.digest, 9.0, 0, {})])
    assert (admission.costs.gap_s, admission.counts.calibration_seconds) == (0.0, 9.0)


def test_a_calibration_is_dropped_like_any_row() -> None:
    scheduler = StepScheduler(LIMITS, lambda: 0.0)
    one, other = background(0), background(1)
    for each in (one, other):
        scheduler.submit(each, PLANNER.schedules(each))
    scheduler.next_plan()
    assert scheduler.in_background
    assert scheduler.cancel(one.row_id)
    plan = scheduler.next_plan()
    assert plan is not None
    assert (plan.drop, [row.row_id for row in plan.rows]) == ((one.row_id,), [other.row_id])
    assert scheduler.cancel(other.row_id)
    assert not scheduler.in_background


def test_a_run_follows_the_schedule_that_it_names() -> None:
    corrected = PLANNER.schedules(background(0, "C.C.CC", "corrected"))["cond"]
    assert corrected.text == "C.C.CC"
    assert corrected.residuals_kept == 0
    assert corrected.decisions[0].velocity is not None
    fitted = job("a/0", steps=6, calibration=CalibrationRun("C.C.CC", "least_squares", products=products(6)))
    sigmas = FlowMatchSampler(MODEL).sigmas(6, Geometry.of(fitted.width, fitted.height).tokens).tolist()
    expected = decisions(Plan("C.C.CC", "least_squares", products=products(6)), sigmas)
    assert PLANNER.schedules(fitted)["cond"].decisions == expected != corrected.decisions
    recorded = job("a/0", steps=3, calibration=CalibrationRun("CCC", record=True))
    assert PLANNER.schedules(recorded)["cond"].residuals_kept == 1
