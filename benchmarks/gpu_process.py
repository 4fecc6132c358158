"""The process that measures for `benchmarks.gpu`, seen from outside: started, listened to, ended."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = "benchmarks.gpu_worker"
LAST_LINES = 20
"""How much of what a process said last is looked through for why it ended."""
MESSAGES = ("machine", "variant")


class Worker:
    """`benchmarks.gpu_worker` as a process. Its messages are lines of JSON; what else it says goes to ``log``.

    Attributes:
        ended: it has no more to say.
        gave_error: its last message was that a variant failed, after which it ends by itself.
    """

    def __init__(self, settings: dict[str, Any], variants: Sequence[str], results: dict[str, Any], log: Path) -> None:
        """Start it: ``variants`` are measured in this order, ``results`` are those known already."""
        asked = json.dumps({"settings": settings, "variants": list(variants), "results": results})
        self._log = log
        self.ended = self.gave_error = False
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", WORKER, asked],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                errors="replace",
                start_new_session=True,  # so that the processes that it starts can be ended with it
            )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._log.open("a", encoding="utf-8") as log, self._process.stdout as lines:
            for line in lines:
                if line.startswith(tuple(f'{{"{message}"' for message in MESSAGES)):
                    self._lines.put(json.loads(line))
                else:
                    log.write(line)
        self._lines.put(None)

    def next(self, timeout_s: float) -> dict[str, Any] | None:
        """Its next message; None when there is none within ``timeout_s`` seconds, or none at all any more."""
        try:
            message = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self.ended = True
        else:
            self.gave_error = "error" in message
        return message

    def end(self) -> str:
        """Kill what is left of it; returns how it ended, as far as that is known."""
        code = None
        if self.ended:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(timeout=2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join()
        if code is None:
            return "its process was ended"
        said = deque(self._log.read_text(encoding="utf-8", errors="replace").splitlines(), LAST_LINES)
        reason = next((f": {line.strip()}" for line in reversed(said) if "Error" in line), "")
        return f"its process ended with code {code}{reason}"
