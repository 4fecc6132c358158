"""The service calibrates itself while a client asks now and then: ``python -m benchmarks.self_calibration``.

flux-tiny under a name that no profile knows starts with every step computed. The client's latencies are measured
without a calibration and during one; then the profile that came of it and the shipped one are compared on 64 held-out
prompts, at ten computed steps of 28. Exits with an error when the service's own profile is more than 1 dB below the
shipped one.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml

from app.main import build
from app.settings import Settings
from benchmarks.pictures import Generator, draw_prompts
from benchmarks.quality import PROMPT_SEED, STEPS, measure
from benchmarks.serve.systems import CONFIG, MODEL, cluster, running
from magcache_core import choose, load_profile
from magcache_core.calibrate import read_prompts

MARGIN_DB = 1.0
PAUSES_S = (1.0, 6.0)
PROMPT = "a red circle on a blue background"


class Client:
    """Asks for one image after another, with pauses, until it is stopped."""

    def __init__(self, url: str, seed: int) -> None:
        self.replies: list[tuple[float, str | None]] = []  # seconds, and the profile
        self._url = url
        self._draw = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as http:
            while not self._stop.wait(self._draw.uniform(*PAUSES_S)):
                started = time.perf_counter()
                reply = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": len(self.replies)})
                reply.raise_for_status()
                profile = reply.json()["data"][0]["magcache"]["profile"]
                self.replies.append((time.perf_counter() - started, profile))

    def latency(self) -> dict[str, float]:
        """Of the images whose every step computed."""
        seconds = [taken for taken, profile in self.replies if profile is None]
        return {"images": len(seconds)} | {
            name: round(float(np.percentile(seconds, share)), 4) for name, share in (("p50_s", 50), ("p95_s", 95))
        }


def serve_and_calibrate(folder: Path, asked: dict[str, Any], baseline_s: float) -> tuple[Path, dict[str, Any]]:
    """The profile that the service made of itself, and what was seen on the way."""
    model = folder / "uncalibrated"
    shutil.copytree(MODEL, model)
    arguments = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["applications"][0]["args"]
    magcache = arguments["magcache"] | {"profile": None, "profile_dir": str(folder / "profiles")}
    arguments |= {"model": str(model), "served_model_name": "uncalibrated", "magcache": magcache}
    with cluster() as url, running(build(Settings(**arguments))), httpx.Client(base_url=url, timeout=120) as http:
        with Client(url, seed=1) as before:
            time.sleep(baseline_s)
        with Client(url, seed=2) as meanwhile:
            started = time.perf_counter()
            status = http.post("/v1/calibrations", json=asked).raise_for_status().json()
            while status["status"] == "running":
                time.sleep(1.0)
                status = http.get(f"/v1/calibrations/{status['id']}").json()
                print(f"\r{status['phase']} {status['runs']} of {status['expected_runs']}", end="", flush=True)
            seconds = time.perf_counter() - started
            time.sleep(3 * PAUSES_S[1])
        print()
        if status["status"] != "done":
            raise RuntimeError(f"the calibration {status['status']}: {status['message']}")
    (path,) = (folder / "profiles").glob("*.json")
    quiet, busy = before.latency(), meanwhile.latency()
    return path, {
        "calibration_s": round(seconds, 1),
        "runs": status["runs"],
        "latency": {"without": quiet, "during": busy, "p95_ratio": round(busy["p95_s"] / quiet["p95_s"], 3)},
        "first_profile": before.replies[0][1],
        "last_profile": meanwhile.replies[-1][1],
    }


def main() -> int:
    """The command line; 1 when the profile is worse than it may be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.self_calibration", description=__doc__)
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to compare on")
    parser.add_argument("--calibrate-on", type=int, default=16, help="prompts of flux-tiny's own calibration to use")
    parser.add_argument("--trials", type=int, default=12, help="prompts that schedules are tried on")
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--budget-minutes", type=float, default=8.0)
    parser.add_argument(
        "--baseline-s", type=float, default=90.0, help="time to measure latencies without a calibration"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/self_calibration.json"))
    args = parser.parse_args()
    known = read_prompts(Path("benchmarks/flux-tiny-prompts.txt").read_text(encoding="utf-8"))
    asked = {"prompts": list(known[: args.calibrate_on]), "trial_runs": args.trials, "moves": args.moves}
    with tempfile.TemporaryDirectory() as folder:
        path, seen = serve_and_calibrate(Path(folder), asked | {"budget_minutes": args.budget_minutes}, args.baseline_s)
        own = load_profile(path)
    generator = Generator(MODEL, draw_prompts(args.prompts, held_out=True, seed=PROMPT_SEED))
    reference = generator(STEPS)
    figures = {
        name: measure(generator, reference, choose(profile, STEPS))[0]
        for name, profile in (("own", own), ("shipped", load_profile("flux-tiny")))
    }
    document = {
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}, fp32",
        "asked": {**asked, "prompts": args.calibrate_on},
        **seen,
        **figures,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
    short = figures["shipped"]["psnr"] - figures["own"]["psnr"]
    passed = short <= MARGIN_DB
    print(f"{'passed' if passed else 'FAILED'}: {figures['own']['psnr']:.2f} dB, {short:.2f} below the shipped profile")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
