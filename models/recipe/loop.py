"""What every training stage shares: the budget that paces it, atomic checkpoints and the average of weights."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

SEED = 20240817
CHECKPOINT_EVERY_S = 60.0


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it, else float32: emulating it takes several times as long."""
    known = torch.cpu.get_capabilities()
    multiplies = device.type != "cpu" or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if multiplies else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    # Without the cache of cast weights, which threads would share; each weight is used once in a forward anyway.
    enabled = dtype(device) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@dataclass
class Budget:
    """Time or steps, whichever ends first. Learning rates follow `fraction`, so every stage ends annealed."""

    seconds: float
    steps: int | None = None
    step: int = 0
    elapsed_s: float = 0.0
    _since: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        spent = self.elapsed_s / self.seconds
        return min(1.0, max(spent, self.step / self.steps) if self.steps else spent)

    def tick(self) -> None:
        """Count one step. Time stands still between processes: only what ticks measure is spent."""
        now = time.monotonic()
        self.step, self.elapsed_s, self._since = self.step + 1, self.elapsed_s + now - self._since, now

    def state(self) -> dict[str, float]:
        return {"step": self.step, "elapsed_s": self.elapsed_s}

    def resume(self, state: dict[str, float]) -> None:
        self.step, self.elapsed_s = int(state["step"]), float(state["elapsed_s"])
        self._since = time.monotonic()

    def run(self, name: str, checkpoint: Callable[[], None] = lambda: None) -> Iterator[tuple[int, "tqdm[Any]"]]:
        """Steps until the budget is spent, under a progress bar in per mille of it.

        ``checkpoint`` is called every `CHECKPOINT_EVERY_S` and at the end, always between steps.
        """
        saved_s = self.elapsed_s
        with tqdm(total=1000, desc=name, unit="‰", mininterval=5.0) as bar:
            self._since = time.monotonic()
            while self.fraction < 1:
                yield self.step, bar
                self.tick()
                bar.update(int(1000 * self.fraction) - bar.n)
                if self.elapsed_s - saved_s > CHECKPOINT_EVERY_S:
                    saved_s = self.elapsed_s
                    checkpoint()
        checkpoint()


def flat_then_linear(fraction: float, flat: float = 0.3, floor: float = 0.02) -> float:
    """The learning rate's factor: 1 for a share `flat` of the budget, then straight down to `floor`."""
    return 1.0 if fraction < flat else floor + (1 - floor) * (1 - fraction) / (1 - flat)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: an interrupted run resumes from the last complete file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load(path: Path, device: torch.device) -> dict[str, Any]:
    return torch.load(path, map_location=device, weights_only=True)


class Stateful(Protocol):
    """A part of a stage that can be put aside and taken up again: modules, optimizers and averages."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Checkpoint:
    """The file from which a stage goes on: its named parts, single or several in a list, and its budget."""

    def __init__(self, path: Path, budget: Budget, **parts: Stateful | Sequence[Stateful]) -> None:
        self._path = path
        self._budget = budget
        self._parts = parts

    def resume(self, device: torch.device) -> None:
        """Take up what was saved, if anything was."""
        if not self._path.exists():
            return
        state = load(self._path, device)
        for name, part in self._parts.items():
            if isinstance(part, Sequence):
                for one, saved in zip(part, state[name], strict=True):
                    one.load_state_dict(saved)
            else:
                part.load_state_dict(state[name])
        self._budget.resume(state["budget"])

    def save(self) -> None:
        """Keep the parts as they are now."""
        parts = {
            name: [one.state_dict() for one in part] if isinstance(part, Sequence) else part.state_dict()
            for name, part in self._parts.items()
        }
        save(self._path, parts | {"budget": self._budget.state()})


class Average:
    """The exponential moving average of a module's parameters, with a warm-up so that it forgets the random start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = [parameter.detach() for parameter in module.parameters()]
        self.shadow = [parameter.clone() for parameter in self.live]

    def state_dict(self) -> list[torch.Tensor]:
        return self.shadow

    def load_state_dict(self, state: list[torch.Tensor]) -> None:
        self.shadow = state

    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, self.live, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for parameter, average in zip(module.parameters(), self.shadow, strict=True):
                parameter.copy_(average)
