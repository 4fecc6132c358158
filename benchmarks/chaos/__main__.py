"""Kill and stop the processes of a service under load, and count what clients see of it: ``make chaos``.

Serves flux-tiny on this machine (its own Ray, on a port of its own) with `spare_group` and two API processes, once with
the text encoders and the VAE in them, and once with processes of their own. Clients are OpenAI's, with its default
retries, and a plain one that never asks twice; each image is compared with the one made before any fault, within one
level of 255. API processes and proxies are killed under clients behind Envoy, too. As root it fills file systems.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.chaos.clients import pixels, plain
from benchmarks.chaos.faults import CutWeights, FullDisk, Kill, Pause
from benchmarks.chaos.report import broken, late, line, merged, table
from benchmarks.chaos.serving import Placement, behind, files, has_small_disks, refusal_of_nan, serving
from benchmarks.chaos.trial import Faults, Trial, kind_of, run
from benchmarks.chaos.victims import VICTIMS
from benchmarks.fits import put
from scripts.serve_process import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
DOCUMENT = ROOT / "docs" / "operations.md"
BODIES = [
    {"prompt": prompt, "seed": seed}
    for prompt in ("a red circle on a blue background", "a green square on a yellow background")
    for seed in range(4)
]
IN_API = (
    Kill("rank", 0), Kill("rank", 1), Kill("coordinator"), Kill("replica"), Kill("api"), Kill("proxy"),
    Kill("controller"),
)  # fmt: skip
APART = (Kill("encoder"), Kill("decoder"))
BEHIND_ENVOY = (Kill("api"), Kill("proxy"))
TWICE = (
    (Kill("rank", 0), Kill("rank", 1)), (Kill("rank", 0), Kill("coordinator")), (Kill("coordinator"), Kill("replica")),
    (Kill("rank", 1), Kill("api")), (Kill("controller"), Kill("rank", 0)),
)  # fmt: skip
DISKS = (FullDisk("ray", 10.0), FullDisk("profiles", 10.0))
CUT_S = 30.0
NAN = "nan"
KINDS = (*VICTIMS, "twice", "pause", "weights", "disk", NAN)
GCS_S = 75.0
"""Ray's processes wait for the GCS for 60 s, and end."""


@dataclass(frozen=True)
class Session:
    """A service, what is done to it, and what its clients ask it through; nothing or ``envoy``."""

    placement: Placement
    trials: list[Faults]
    through: str = ""


def plan(rounds: int, only: Sequence[str], pause_s: float) -> list[Session]:
    """The trials, by service: kills ``rounds`` times each, in turn, and all else once; of ``only`` some kinds."""
    in_api: list[Faults] = [(kill,) for _ in range(rounds) for kill in IN_API]
    in_api += TWICE
    in_api += [(Pause(victim, pause_s),) for victim in ("rank", "coordinator", "replica", "api")]
    in_api += [(Kill("rank", 0), Pause("rank", pause_s)), (CutWeights(CUT_S),), *((disk,) for disk in DISKS)]
    apart: list[Faults] = [(kill,) for _ in range(rounds) for kill in APART]
    sessions = [
        Session("api", in_api),
        Session("api", [(kill,) for _ in range(rounds) for kill in BEHIND_ENVOY], through="envoy"),
        Session("cpu", apart),
        Session("api", [(Kill("gcs"),)]),
    ]
    chosen = [
        replace(each, trials=[faults for faults in each.trials if not only or kind_of(faults) in only])
        for each in sessions
    ]
    return [session for session in chosen if session.trials]


def trials(folder: Path, planned: Sequence[Session], port: int) -> Iterator[Trial]:
    """Serve and commit what is planned; what follows a fault that does not heal is left out."""
    for session in planned:
        possible = [
            faults for faults in session.trials if has_small_disks(folder) or not isinstance(faults[0], FullDisk)
        ]
        with serving(folder, session.placement, port) as served, behind(session.through, served) as url:
            with plain(served.service.url) as ask:
                expected = [pixels(ask(body)) for body in BODIES]
            for faults in possible:
                watched_s = GCS_S if kind_of(faults) == "gcs" else 0.0
                trial = replace(run(served, url, faults, BODIES, expected, watched_s), through=session.through)
                yield trial
                if trial.by_hand:
                    break


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and keep the table; 1 if an image was lost by OpenAI's client, wrong, or something did not heal."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, default=[], help="faults of these kinds only")
    parser.add_argument("--rounds", type=int, default=10, help="kills of each kind (10)")
    parser.add_argument("--short", action="store_true", help="one kill, of a coordinator: does it run?")
    parser.add_argument("--pause-s", type=float, default=60.0, help="how long SIGSTOP lasts (60)")
    parser.add_argument("--port", type=int, default=8019)
    parser.add_argument("--write", action="store_true", help="replace these rows of the table in operations.md")
    args = parser.parse_args(arguments)
    only, rounds = (("coordinator",), 1) if args.short else (args.only, args.rounds)
    planned = plan(rounds, only, args.pause_s)
    count = sum(len(session.trials) for session in planned)
    made: list[Trial] = []
    failed: list[str] = []
    with files() as folder:
        for trial in trials(folder, planned, args.port):
            made.append(trial)
            print(f"[{len(made)}/{count}] {line(trial)}", flush=True)
        if not only or NAN in only:
            said = refusal_of_nan(folder, args.port)
            if said is None or "proj_out.weight holds values that are not finite" not in said:
                failed.append("weights that are NaN: the start does not refuse them by name")
    print(table(made))
    if args.write:
        known = [Trial(**one) for one in json.loads(RESULTS.read_text(encoding="utf-8"))["trials"]]
        kept = merged(known, made)
        RESULTS.write_text(json.dumps({"trials": [asdict(trial) for trial in kept]}, indent=1) + "\n", encoding="utf-8")
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(put(document, "chaos", table(kept), "benchmarks.chaos"), encoding="utf-8")
    failed += broken(made)
    print("\n".join([*late(made), *failed]) or "every goal is reached")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
