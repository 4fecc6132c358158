"""Trials as a table against the goals, and what of them must never happen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.chaos.trial import Trial

GOALS_S = {
    "rank": 8.0,
    "coordinator": 8.0,
    "encoder": 5.0,
    "decoder": 5.0,
    "replica": 15.0,
    "api": 2.0,
    "controller": 2.0,
    "twice": 40.0,
}
"""Longest time without an image, by kind of fault, on a machine with nothing else to do."""
ALONE = frozenset({"gcs", "proxy"})
"""Of these a single machine has one: clients that come before it is there again are refused, unless a gateway waits."""
ENDS = frozenset({"gcs"})
"""Without these the service ends by itself, for what started it to start it again."""


def line(trial: Trial) -> str:
    """A trial on one line."""
    lost = sum(trial.lost.values()) + sum(trial.refused.values())
    found = [f"gap {trial.gap_s:g} s", f"{lost} without an image" if lost else "", "WRONG" if trial.wrong else ""]
    found += ["not healed" if trial.by_hand else "", "; ".join(trial.details)]
    return f"{_name(trial)}: {', '.join(filter(None, found))}"


def merged(known: Sequence[Trial], made: Sequence[Trial]) -> list[Trial]:
    """The trials ``known``, those of a row of ``made`` replaced by these; rows of one fault stand together."""
    faults = list(dict.fromkeys(trial.fault for trial in (*known, *made)))
    rows = {_name(trial) for trial in made}
    kept = [*(trial for trial in known if _name(trial) not in rows), *made]
    return sorted(kept, key=lambda trial: (faults.index(trial.fault), trial.through))


def _name(trial: Trial) -> str:
    return f"{trial.fault}, behind {trial.through.title()}" if trial.through else trial.fault


def table(trials: Iterable[Trial]) -> str:
    """Equal faults together, in Markdown."""
    by_fault: dict[str, list[Trial]] = {}
    for trial in trials:
        by_fault.setdefault(_name(trial), []).append(trial)
    lines = [
        "| fault | times | lost, official client | lost, plain client | refused after it | wrong | longest gap | goal "
        "| by hand |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fault, same in by_fault.items():
        cells: list[object] = [len(same)]
        cells += [sum(one.lost.get(client, 0) for one in same) for client in ("official", "plain")]
        cells += [sum(sum(one.refused.values()) for one in same), sum(one.wrong for one in same)]
        goal = GOALS_S.get(same[0].kind)
        cells += [f"{max(one.gap_s for one in same):.1f} s", "" if goal is None else f"{goal:g} s"]
        cells.append("yes" if any(one.by_hand for one in same) else "no")
        lines.append(f"| {fault} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def broken(trials: Sequence[Trial]) -> list[str]:
    """What must never happen: a wrong image, work for the operator, or one that a client does not get.

    A plain client, which never asks twice, may lose what no part of the service can make again for it.
    """
    found = []
    for one in trials:
        name = _name(one)
        if one.wrong:
            found.append(f"{name}: {one.wrong} wrong images")
        missed = {client: one.lost.get(client, 0) + one.refused.get(client, 0) for client in ("official", "plain")}
        if missed["official"] and (one.kind not in ALONE or one.through):
            found.append(f"{name}: {missed['official']} images that OpenAI's client did not get")
        if missed["plain"] and (one.kind == "api" or one.through):
            found.append(f"{name}: {missed['plain']} images that a plain client did not get")
        if one.by_hand and one.kind not in ENDS:
            found.append(f"{name}: does not heal by itself")
    return found


def late(trials: Sequence[Trial]) -> list[str]:
    """Gaps above their goals; on a busy machine that says nothing."""
    return [
        f"{_name(one)}: {one.gap_s:g} s without an image, the goal is {GOALS_S[one.kind]:g} s"
        for one in trials
        if one.gap_s > GOALS_S.get(one.kind, float("inf"))
    ]
