"""Show a profile: ``python -m magcache_core.profile show FILE`` prints it and draws ratios and schedule as a PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from magcache_core.planner import plan
from magcache_core.profile_data import Profile
from magcache_core.profile_store import load_profile, profile_names
from magcache_core.state import predicted_error, schedule


def describe(profile: Profile, steps: int | None = None) -> str:
    """The profile as text, with the schedule of its recommended settings at ``steps`` steps."""
    config = profile.config(steps)
    marks = schedule(config)
    guidance = "" if profile.guidance_scale is None else f", guidance {profile.guidance_scale:g}"
    lines = [
        f"{profile.name}@{profile.version}: {profile.model} ({profile.transformer})",
        f"  measured at {profile.steps} steps, {profile.width}x{profile.height}{guidance}",
        f"  settings: threshold {profile.threshold:g}, max skip {profile.max_skip_steps}, "
        f"retention {profile.retention_ratio:g}, protected steps {list(profile.protected_steps) or 'none'}",
        f"  schedule at {config.num_inference_steps} steps: {marks}",
        f"  computes {marks.count('C')} of {len(marks)}, predicted error {predicted_error(config):.3f}",
    ]
    if profile.budget is not None:
        planned = plan(profile, steps, budget=profile.budget if steps in (None, profile.steps) else marks.count("C"))
        lines.append(f"  planned ({planned.reuse}): {planned.schedule}, predicted error {planned.predicted_error:.3g}")
    for name, curve in profile.branches.items():
        known = "with costs of reuse" if curve.costs is not None else "ratios only"
        lines.append(f"  {name} ({known}): {' '.join(f'{ratio:.5g}' for ratio in curve.norm_ratios)}")
    lines += [f"  {key}: {value}" for key, value in profile.provenance.items()]
    return "\n".join(lines)


def draw(profile: Profile, path: Path, steps: int | None = None) -> None:
    """Draw the curves and the recommended schedule to ``path`` (PNG)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    config = profile.config(steps)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5), sharex=True, gridspec_kw={"height_ratios": (4, 1)}, layout="constrained"
    )
    for name in profile.branches:
        top.plot(profile.config(steps, branch=name).ratios, marker="o", markersize=3, label=name)
    top.axhline(1.0, color="grey", linewidth=0.8)
    top.set_ylabel("ratio of residual norms")
    top.legend()
    top.set_title(f"{profile.name}, {config.num_inference_steps} steps")
    for i, mark in enumerate(schedule(config)):
        bottom.bar(i, 1, width=0.9, color="tab:blue" if mark == "C" else "lightgrey")
    bottom.set_yticks([])
    bottom.set_xlabel("step (blue computes, grey reuses)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m magcache_core.profile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names of the profiles that ship with the package")
    show = commands.add_parser("show", help="print a profile and draw it")
    show.add_argument("profile", help="name of a shipped profile, or a file")
    show.add_argument("--steps", type=int, help="step count of the schedule; the profile's by default")
    show.add_argument("--png", type=Path, help="image to write; NAME.png by default")
    args = parser.parse_args(argv)
    if args.command == "list":
        print("\n".join(profile_names()))
        return
    profile = load_profile(args.profile)
    print(describe(profile, args.steps))
    path = args.png or Path(f"{profile.name}.png")
    draw(profile, path, args.steps)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main()
