"""``python -m app.calibrate --url URL``: have a running service calibrate its model, and watch.

The service measures with the ranks that serve, while no client's image is there, and plans with the profile from then
on. What is found is kept: run it again to go on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOOK_S = 1.0
"""Time between two looks at the progress."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _arguments(argv)
    service = _Service(args.url, args.key)
    try:
        started = service.ask("POST", "/v1/calibrations", _body(args))
        try:
            ended = _watch(service, started, args.look)
        except KeyboardInterrupt:
            ended = service.ask("DELETE", f"/v1/calibrations/{started['id']}")
    except (OSError, ValueError) as error:
        sys.exit(f"calibration: {error}")
    if ended["status"] != "done":
        sys.exit(f"calibration {ended['id']} was {ended['status']}: {ended['message'] or 'what it found is kept'}")
    print(f"profile {ended['profile']} after {ended['runs']} runs, {ended['seconds']:.0f} s")


class _Service:
    def __init__(self, url: str, key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON reply; ValueError with the service's own words when it refuses, OSError when it can't be reached."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            content = error.read().decode(errors="replace")
            try:
                message = json.loads(content)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = content[:200]
            raise ValueError(f"{error.code} {message}") from error
        return answer


def _watch(service: _Service, status: dict[str, Any], look_s: float) -> dict[str, Any]:
    """Show the progress until the calibration ends."""
    with tqdm(total=status["expected_runs"], unit="run", desc="record") as bar:
        while status["status"] == "running":
            time.sleep(look_s)
            status = service.ask("GET", f"/v1/calibrations/{status['id']}")
            bar.total = status["expected_runs"]
            bar.set_description(status["phase"], refresh=False)
            bar.update(status["runs"] - bar.n)
    return status


def _body(args: argparse.Namespace) -> dict[str, Any]:
    prompts = None
    if args.prompts is not None:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    fields = {
        "prompts": prompts,
        "num_inference_steps": args.steps,
        "size": args.size,
        "guidance_scale": args.guidance,
        "negative_prompt": args.negative_prompt,
        "true_cfg_scale": args.true_cfg_scale,
        "computed_steps": args.computed_steps,
        "trial_runs": args.trials,
        "judge_runs": args.judge,
        "moves": args.moves,
        "budget_minutes": args.budget_minutes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m app.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="the service, for example http://127.0.0.1:8000")
    parser.add_argument("--key", default=os.environ.get("FLUX_API_KEY"), help="API key; by default $FLUX_API_KEY")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line; by default a packaged list")
    parser.add_argument("--steps", type=int, help="denoising steps; the service's default by default")
    parser.add_argument("--size", metavar="WxH", help="pixels; the service's default size by default")
    parser.add_argument("--guidance", type=float, help="distilled guidance; the service's default by default")
    parser.add_argument("--negative-prompt", help="run true CFG with it and measure its branch; may be empty")
    parser.add_argument("--true-cfg-scale", type=float, help="scale of true CFG; as in requests for images by default")
    parser.add_argument("--computed-steps", type=int, help="computed steps to recommend; 10 of 28 in proportion")
    parser.add_argument("--trials", type=int, metavar="RUNS", help="prompts to try schedules on, 4; 0 only predicts")
    parser.add_argument("--judge", type=int, metavar="RUNS", help="last prompts that judge the closest schedules, 4")
    parser.add_argument("--moves", type=int, help="schedules to try beside the candidates, 6")
    parser.add_argument("--budget-minutes", type=float, help="time of its runs after which it ends as it is, 30")
    parser.add_argument("--look", type=float, default=LOOK_S, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
