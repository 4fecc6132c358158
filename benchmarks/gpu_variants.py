"""What `benchmarks.gpu` measures, in the order in which it does: what matters most comes first, since time may end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ORDER = (
    # What the card can do at most.
    "peaks/matmul",
    "peaks/copy",
    "peaks/attention flash",
    "peaks/attention cudnn",
    "peaks/attention fa3",
    "peaks/attention xformers",
    # A step in bfloat16, compiled, by each attention kernel, then with the fastest; and bare diffusers likewise.
    "bf16/1 row, flash",
    "bf16/1 row, cudnn",
    "bf16/1 row, fa3",
    "bf16/4 rows",
    "diffusers/compiled",
    "diffusers/compiled, its MagCache",
    # 8-bit weights.
    "peaks/matmul fp8",
    "fp8/1 row",
    "fp8/kernels of a computed step",
    "fp8/4 rows",
    # Whole images of 28 steps, by schedule.
    "schedules/authors",
    "schedules/14 computed",
    "schedules/9 computed",
    "schedules/7 computed",
    "bf16/kernels of a computed step",
    "bf16/1 row, fixed size",
    # Small images, and what launching costs.
    "small/1 row",
    "small/4 rows",
    "small/8 rows",
    "graphs/computed step",
    "graphs/computed step, small",
    "graphs/reused step",
    # The other models, whole or in tiles.
    "vae/decode",
    "vae/decode, compiled",
    "vae/decode, compiled for any size",
    "vae/decode, tiled",
    "t5/1 prompt",
    "t5/4 prompts",
    "ranks/tp 2 equals tp 1",
    # Without the compiler.
    "bf16/1 row, eager",
    "diffusers/eager",
)


def chosen(only: Sequence[str], skip: Iterable[str] = ()) -> list[str]:
    """The variants whose names begin with one of ``only`` (all, when it is empty), without those in ``skip``.

    Raises:
        ValueError: no variant begins so.
    """
    for start in only:
        if not any(name.startswith(start) for name in ORDER):
            groups = ", ".join(dict.fromkeys(name.partition("/")[0] for name in ORDER))
            raise ValueError(f"no variant begins with {start!r}; groups are {groups}")
    done = set(skip)
    return [name for name in ORDER if name not in done and (not only or name.startswith(tuple(only)))]
