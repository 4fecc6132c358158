"""What a step costs on one card, what the cache, the compiler and fp8 save there, and what bare diffusers takes.

    bash benchmarks/gpu_run.sh                                            # on a machine with a GPU
    python -m benchmarks.gpu --only bf16 diffusers                        # some of it
    python -m benchmarks.gpu --scale tiny --device cpu --size 64 --small 32        # the same path, small

Weights are random and drawn on the device: a step's time does not depend on them, and neither do MagCache's decisions.
The variants (`benchmarks.gpu_variants`) run one after another in a process of their own, and the report is written
after each. One that fails or takes too long is named in ``left_out``, and the rest goes on in a new process, since an
error on a GPU often leaves the process unusable. Figures of one run are comparable with each other; those of two
machines are not.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu_process import Worker
from benchmarks.gpu_variants import chosen

RESULTS = Path(__file__).parent / "results" / "gpu.json"
OWN = ("out", "only", "resume", "budget_s", "variant_s")
"""Options that say how to run, not what is measured."""


class Run:
    """One run: which variants are left, and the report, which is on disk after each of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._ends = time.monotonic() + args.budget_s
        self._stopped = ""
        self._settings = {name: value for name, value in vars(args).items() if name not in OWN}
        self._earlier: dict[str, Any] = {"machine": "", "results": {}}
        if args.resume is not None:
            self._earlier = json.loads(args.resume.read_text(encoding="utf-8"))
        self._todo = chosen(args.only, self._earlier["results"])
        self.report: dict[str, Any] = {
            "machine": self._earlier["machine"],
            "date": time.strftime("%Y-%m-%d"),
            "model": f"flux.1-dev at scale {args.scale}, random weights",
            "settings": self._settings,
            "results": dict(self._earlier["results"]),
            "left_out": {},
        }

    def stop(self, number: int, _: FrameType | None = None) -> None:
        """End soon, because of signal ``number``."""
        self._stopped = f"the run was stopped by {signal.Signals(number).name}"

    def all(self) -> None:
        """Measure until nothing is left to measure, or no time to do it."""
        while self._todo and not self._over() and self._one_process():
            pass
        self._leave_out(self._stopped or f"no time was left of {self._args.budget_s:g} s")

    def _over(self) -> bool:
        return bool(self._stopped) or time.monotonic() > self._ends

    def _one_process(self) -> bool:
        """Measure with one process until all is done or something goes wrong; whether another should go on."""
        worker = Worker(self._settings, self._todo, self.report["results"], self._args.out.with_suffix(".log"))
        began, failed, ready = time.monotonic(), "", False
        while self._todo and not worker.ended and not failed and not self._over():
            line = worker.next(timeout_s=0.5)  # so that a signal is noticed
            if line is None:
                if time.monotonic() - began > self._args.variant_s:
                    failed = f"it took more than {self._args.variant_s:g} s"
                continue
            if "machine" in line:
                failed = self._other_machine(line["machine"])
                ready = not failed
            else:
                self._note(line, time.monotonic() - began)
            began = time.monotonic()
        ended = worker.end()
        if not self._todo or self._over():
            return False
        if not ready:
            self._leave_out(failed or ended)
        elif failed or not worker.gave_error:
            self._note({"variant": self._todo[0], "error": failed or ended}, time.monotonic() - began)
        return True

    def _other_machine(self, machine: str) -> str:
        """Why this process's results don't belong into the report; empty when they do."""
        self.report["machine"] = self.report["machine"] or machine
        if self.report["machine"] != machine:
            return f"this machine is {machine}, the report to resume was made on {self.report['machine']}"
        return ""

    def _note(self, line: dict[str, Any], seconds: float) -> None:
        """Take in what became of a variant, and write the report."""
        name = line["variant"]
        self._todo.remove(name)
        if "error" in line:
            self.report["left_out"][name] = line["error"]
        else:
            self.report["results"][name] = line["result"] | {"took_s": round(seconds, 1)}
        self._write()
        print(f"{name}: {_short(line)}", flush=True)

    def _leave_out(self, why: str) -> None:
        self.report["left_out"] |= dict.fromkeys(self._todo, why)
        self._todo.clear()
        self._write()

    def _write(self) -> None:
        out: Path = self._args.out
        new = out.with_suffix(".new")
        new.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        new.replace(out)  # so that the file is whole at every moment


def _short(line: dict[str, Any]) -> str:
    """A variant's figures in a line."""
    if "error" in line:
        return f"left out: {line['error']}"
    said = []
    for name, value in line["result"].items():
        if isinstance(value, float):
            said.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str):
            said.append(f"{name} {value}")
    return ", ".join(said)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="START", help="the variants whose names begin so")
    parser.add_argument("--resume", type=Path, metavar="REPORT", help="measure what this report of the machine lacks")
    parser.add_argument("--scale", choices=("full", "1/8", "tiny"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--size", type=int, default=1024, help="side of the square image in pixels")
    parser.add_argument("--small", type=int, default=512, help="side of the small image")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--compiler", default="inductor", help="torch.compile's backend")
    parser.add_argument("--repeats", type=int, default=2, help="images per figure; the fastest counts")
    parser.add_argument("--budget-s", type=float, default=450.0, help="end after so many seconds, whatever is left")
    parser.add_argument("--variant-s", type=float, default=150.0, help="longest time for one variant")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the report; a log of the same name stands beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure; returns the process's exit code."""
    args = parse(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    previous = {number: signal.signal(number, run.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        run.all()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(f"{len(run.report['results'])} variants measured, {len(run.report['left_out'])} left out: {args.out}")
    return 0 if run.report["results"] else 1


if __name__ == "__main__":
    sys.exit(main())
