"""The whole recipe: python -m models.recipe --work DIR --out models/flux-tiny."""

import argparse
import os
from pathlib import Path

import torch

from . import distill, evaluate, export, latents, layout, loop, polish, text, transformer, vae

# Minutes on two CPU cores, as the shipped weights took them.
MINUTES = {"vae": 15.0, "text": 8.0, "layout": 6.0, "transformer": 42.0, "distill": 9.0, "polish": 9.0}
STAGES = ("vae", "text", "layout", "latents", "transformer", "distill", "polish", "export", "evaluate")
QUICK_STEPS = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.recipe", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; a second run resumes from here")
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder to write")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="all of them by default, in order")
    parser.add_argument(
        "--minutes",
        nargs="+",
        default=[],
        metavar="STAGE=N",
        help="training times, instead of " + " ".join(f"{name}={value:g}" for name, value in MINUTES.items()),
    )
    parser.add_argument("--scenes", type=int, default=latents.SCENES, help="scenes to encode (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=0, help="each number encodes other scenes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--quick", action="store_true", help=f"every stage for {QUICK_STEPS} steps only")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    device = loop.pick_device()
    minutes = MINUTES | {name: float(value) for name, value in (item.split("=") for item in args.minutes)}

    def budget(stage: str) -> loop.Budget:
        return loop.Budget(60 * minutes[stage], QUICK_STEPS if args.quick else None)

    for stage in [stage for stage in STAGES if stage in args.stages]:
        if stage == "vae":
            vae.train(args.work, budget(stage), device)
        elif stage == "text":
            text.train(args.work, budget(stage), device)
        elif stage == "layout":
            layout.train(args.work, budget(stage), device)
        elif stage == "latents":
            latents.train(args.work, 100 if args.quick else args.scenes, device, args.chunk)
        elif stage == "transformer":
            transformer.train(args.work, budget(stage), device)
        elif stage == "distill":
            distill.train(args.work, budget(stage), device)
        elif stage == "polish":
            polish.train(args.work, budget(stage), device)
        elif stage == "export":
            export.from_work(args.work, args.out, device)
        else:
            evaluate.evaluate(args.out, device, *((4, 2) if args.quick else (evaluate.CAPTIONS, evaluate.STEPS)))


if __name__ == "__main__":
    main()
