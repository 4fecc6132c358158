"""Passes of sizes that recur, recorded in the warm-up and replayed: one launch takes the place of a thousand.

A CUDA graph repeats kernels with the arguments that they had, so a pass reads its inputs from buffers of its own and
leaves its results in others. All graphs share one pool of memory, since no two run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Tensors = tuple[torch.Tensor, ...]
Pass = Callable[..., Tensors]
"""A function of tensors, each with one entry per row in its first dimension."""
Rows = Sequence[Sequence[torch.Tensor]]
"""The arguments of a `Pass`, each as the entries of its rows."""
Recorder = Callable[[Callable[[], Tensors]], tuple[Callable[[], object], Tensors]]
"""Records a call: what does it again, and the tensors in which its results are then."""


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        """Raises: ValueError: ``device`` has no graphs."""
        if device.type != "cuda":
            raise ValueError(f"cuda_graphs needs CUDA, and the ranks run on {device.type}: set cuda_graphs to false")
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, call: Callable[[], Tensors]) -> tuple[Callable[[], object], Tensors]:
        """See `Recorder`."""
        # Once as it is: libraries make the workspaces of a stream when it first calls them.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            call()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Of this thread only: NCCL's watchdog asks after its events meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            results = call()
        return graph.replay, results


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A pass and its buffers.

    Attributes:
        recorded: the pass itself, which keeps alive what it reads beside its arguments.
    """

    recorded: Pass
    arguments: Tensors
    replay: Callable[[], object]
    results: Tensors

    @classmethod
    def of(cls, record: Recorder, wanted: Pass, rows: Rows) -> _Recorded:
        """Record ``wanted`` for as many rows, of the same sizes, as ``rows`` are."""
        arguments = tuple(torch.stack(list(entries)) for entries in rows)
        return cls(wanted, arguments, *record(lambda: wanted(*arguments)))

    def __call__(self, rows: Rows) -> Tensors:
        """The pass of ``rows``; copies, since the next replay of any graph may overwrite its results."""
        for buffer, entries in zip(self.arguments, rows, strict=True):
            torch.stack(list(entries), out=buffer)
        self.replay()
        return tuple(result.clone() for result in self.results)


class Graphs:
    """The recorded passes of one rank. Whatever was not recorded runs as it is."""

    def __init__(self, record: Recorder | None = None) -> None:
        """Without ``record`` nothing is ever recorded."""
        self._record = record
        self._recorded: dict[Hashable, _Recorded] = {}
        self._recording = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, each new key is recorded; its pass must have run before, so that it is compiled."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def run(self, key: Hashable | None, wanted: Pass, rows: Rows) -> Tensors:
        """``wanted`` of ``rows``.

        Args:
            key: equal keys have equal passes, and rows of equal number and sizes; None for what must not be recorded.
        """
        if key is not None and key not in self._recorded and self._recording and self._record is not None:
            self._recorded[key] = _Recorded.of(self._record, wanted, rows)
        if key in self._recorded:
            return self._recorded[key](rows)
        # A row alone is not copied.
        return wanted(*(entries[0][None] if len(entries) == 1 else torch.stack(list(entries)) for entries in rows))
