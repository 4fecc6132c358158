"""Which kernels compute attention: by name, or the fastest of those that the device has, tried at the start.

Torch has several for CUDA and picks one by an order of its own, which differs by release and card; on Hopper cuDNN's
is nearly twice as fast as flash. Other packages bring kernels of their own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import inf
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from app.engine.process_groups import RankGroups

logger = logging.getLogger(__name__)

AttentionBackend = Literal["auto", "native", "cudnn", "flash", "fa3", "xformers"]
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
"""Backends that are torch's own, by the kernel that they try first."""
PACKAGES = {"fa3": ("flash_attn_interface", "_flash_3"), "xformers": ("xformers", "xformers")}
"""Those of other packages: what they import, and diffusers' name for them."""
NEED_CUDA = ("cudnn", *PACKAGES)
NO_FLOAT32 = ("cudnn", "flash", "fa3")
"""On CUDA; a CPU's flash kernel has float32."""
TRIES = 5
"""Timed runs of each backend, of which the fastest counts; two before them do not."""
CHECKED_TOKENS = 128
"""Of the attention that must run before a backend is taken."""


class AttentionError(ValueError):
    """A backend that this machine cannot run; the message names the setting and what to do."""


@dataclass(frozen=True)
class AttentionShape:
    """The attention that is timed: joint tokens, and the heads and their channels on one rank."""

    tokens: int
    heads: int
    channels: int

    def inputs(self, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        """Queries, keys and values of one row, each (1, tokens, heads, channels)."""
        return [torch.randn(1, self.tokens, self.heads, self.channels, device=device, dtype=dtype) for _ in range(3)]


def check_attention(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse, before anything is loaded, a backend that has no kernels for this device or precision.

    Raises:
        AttentionError: see above.
    """
    if backend in NEED_CUDA and device.type != "cuda":
        raise AttentionError(
            f"attention_backend {backend!r} needs CUDA, and the ranks run on {device.type}: set auto or native"
        )
    if backend in NO_FLOAT32 and device.type == "cuda" and dtype is torch.float32:
        raise AttentionError(
            f"attention_backend {backend!r} has no float32 kernels: set dtype to bfloat16, or attention_backend to auto"
        )


def choose_attention(
    asked: AttentionBackend,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    groups: RankGroups,
    seconds_of: Callable[[str], float] | None = None,
) -> AttentionBackend:
    """The backend that all ranks of ``groups`` use: ``asked`` if it runs here, or with ``auto`` the fastest on rank 0.

    Ranks may not choose on their own: kernels differ in rounding, and an image must not depend on which rank had which.

    Args:
        shape: what is tried.
        seconds_of: how long a backend takes; the default runs it.

    Raises:
        AttentionError: ``asked``, or what rank 0 chose, does not run on this rank.
    """
    check_attention(asked, device, dtype)
    names = get_args(AttentionBackend)
    chosen = asked
    if asked == "auto" and device.type != "cuda":
        return "native"  # there is nothing to choose from
    if asked == "auto":
        measure = seconds_of or partial(_seconds, inputs=shape.inputs(device, dtype))
        here = _fastest(dtype, measure) if groups.rank == 0 else "native"
        chosen = names[groups.of_first_rank(names.index(here), device)]
    if chosen != "native":
        _check_runs(chosen, device, dtype, shape)
    return chosen


def prefer(backend: AttentionBackend) -> AbstractContextManager[Any]:
    """Torch's attention tries the kernel of ``backend`` first in here, and its others where that one can't run."""
    if backend not in SDPA:
        return nullcontext()
    first = SDPA[backend]
    order = [first, *(one for one in SDPA.values() if one is not first)]
    return sdpa_kernel([*order, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


def attend(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention by the kernel of ``backend`` and no other; all are (rows, tokens, heads, channels).

    Raises:
        RuntimeError: this device, precision or environment has no such kernel.
    """
    kernel = sdpa_kernel(SDPA[backend]) if backend in SDPA else nullcontext()
    with kernel:
        attended: torch.Tensor = dispatch_attention_fn(query, key, value, backend=_dispatched(backend))
    return attended


def set_attention(transformer: Any, backend: AttentionBackend) -> None:
    """Make the attentions of ``transformer`` call ``backend``'s package; torch's own need nothing but `prefer`."""
    if backend in PACKAGES:
        noisy = logging.getLogger("diffusers.models.modeling_utils")
        level = noisy.level
        noisy.setLevel(logging.ERROR)  # it warns at each start that the dispatcher is experimental
        transformer.set_attention_backend(PACKAGES[backend][1])
        noisy.setLevel(level)


def _fastest(dtype: torch.dtype, seconds_of: Callable[[str], float]) -> AttentionBackend:
    """Of the backends that run here."""
    took: dict[AttentionBackend, float] = {}
    for name in _candidates(dtype):
        try:
            took[name] = seconds_of(name)
        except Exception as error:  # whatever a package raises, it is no candidate
            logger.info("attention_backend %s does not run here: %s", name, error)
    chosen: AttentionBackend = min(took, key=took.__getitem__) if took else "native"
    said = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in took.items())
    logger.info("attention_backend auto is %s (%s)", chosen, said)
    return chosen


def _candidates(dtype: torch.dtype) -> list[AttentionBackend]:
    """What may run on CUDA; ``native`` first, so that it is taken where another is no faster."""
    names: tuple[AttentionBackend, ...] = get_args(AttentionBackend)
    return [
        name
        for name in names
        if name != "auto"
        and not (name in NO_FLOAT32 and dtype is torch.float32)
        and not (name in PACKAGES and find_spec(PACKAGES[name][0]) is None)
    ]


def _seconds(backend: str, inputs: list[torch.Tensor]) -> float:
    best = inf
    for attempt in range(TRIES + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        attend(backend, *inputs)
        torch.cuda.synchronize()
        if attempt >= 2:
            best = min(best, time.perf_counter() - started)
    return best


def _check_runs(backend: AttentionBackend, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> None:
    # cuDNN's kernel refuses a single token.
    inputs = replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS)).inputs(device, dtype)
    needs = "has no kernel for this card and precision"
    if backend in PACKAGES:
        needs = f"needs the package {PACKAGES[backend][0]!r} on every node, for this card, torch and CUDA: install it"
    try:
        attend(backend, *inputs)
    except Exception as error:  # a package may be there without kernels, and fails as it likes
        raise AttentionError(f"attention_backend {backend!r} {needs}, or set auto ({error})") from error


def _dispatched(backend: str) -> AttentionBackendName:
    return AttentionBackendName(PACKAGES[backend][1] if backend in PACKAGES else "native")
