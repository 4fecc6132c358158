"""Attention kernels by name or by trial: one for all ranks, and an error at the start where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn.attention import SDPBackend

from app.engine import attention_backends
from app.engine.attention_backends import (
    AttentionBackend,
    AttentionError,
    AttentionShape,
    attend,
    check_attention,
    choose_attention,
    prefer,
)
from app.engine.engine import Engine
from app.engine.parallel import TensorParallelGroup
from app.engine.process_groups import RankGroups
from app.engine.tuning import Tuning
from app.settings import Settings
from tests.local_group import MODEL, execute, job, plans, random_conditioning
from tests.ranks import on_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(tokens=12, heads=2, channels=32)
TIMES = {"native": 3.0, "cudnn": 1.0, "flash": 2.0}


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


@pytest.fixture
def _order_stays() -> Iterator[None]:
    before = order()
    yield
    assert order() == before


@pytest.fixture
def _runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here can run a CUDA kernel, so that what the choice says is believed."""
    monkeypatch.setattr(attention_backends, "_check_runs", lambda *_: None)


def choose(
    asked: AttentionBackend, seconds_of: Callable[[str], float] | None = None, device: torch.device = CUDA
) -> AttentionBackend:
    return choose_attention(asked, SHAPE, device, torch.bfloat16, RankGroups(), seconds_of)


@pytest.mark.usefixtures("_order_stays")
def test_the_named_kernel_is_tried_first() -> None:
    for backend, kernel in [("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)]:
        with prefer(backend):
            assert order()[0] == kernel.value
    before = order()
    with prefer("native"):
        assert order() == before


@pytest.mark.usefixtures("_order_stays")
def test_the_blocks_run_in_that_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for backend in ("flash", "native"):
        engine = Engine(MODEL, tuning=Tuning(backend))
        assert engine.attention == backend
        blocks = engine.strategy.blocks
        note = lambda *given, blocks=blocks: (seen.append(order()[0]), blocks(*given))[1]  # noqa: E731
        monkeypatch.setattr(engine.strategy, "blocks", note)
        asked = job("a/0", steps=1)
        execute(engine, plans([asked]), {"a/0": random_conditioning(asked)})
        monkeypatch.undo()
    assert seen == [SDPBackend.FLASH_ATTENTION.value, order()[0]]


def test_a_cpu_has_nothing_to_choose_from() -> None:
    assert Engine(MODEL).attention == "native"


@pytest.mark.usefixtures("_runs")
def test_auto_is_the_fastest_that_runs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose("auto", TIMES.__getitem__) == "cudnn"
    assert "attention_backend auto is cudnn (native 3e+03 ms, cudnn 1e+03 ms, flash 2e+03 ms)" in caplog.text

    def no_cudnn(backend: str) -> float:
        if backend == "cudnn":
            raise RuntimeError("No available kernel")
        return TIMES[backend]

    assert choose("auto", no_cudnn) == "flash"
    assert choose("auto", lambda _: 1.0) == "native", "no change without a gain"


@pytest.mark.usefixtures("_runs")
def test_packages_are_tried_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(attention_backends, "find_spec", lambda name: name == "flash_attn_interface" or None)
    choose("auto", lambda name: tried.append(name) or 1.0)
    assert tried == ["native", "cudnn", "flash", "fa3"]


@pytest.mark.usefixtures("_runs")
def test_float32_has_torchs_own_kernels_only() -> None:
    chosen = choose_attention("auto", SHAPE, CUDA, torch.float32, RankGroups(), lambda name: {"native": 1.0}[name])
    assert chosen == "native"


class OneOfTwo(RankGroups):
    """A rank whose first rank chose cuDNN."""

    def of_first_rank(self, number: int, device: torch.device) -> int:
        return number if self.rank == 0 else get_args(AttentionBackend).index("cudnn")


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_take_what_rank_0_chose(rank: int) -> None:
    measured: list[str] = []

    def seconds_of(backend: str) -> float:
        measured.append(backend)
        return TIMES[backend]

    assert (
        choose_attention("auto", SHAPE, CUDA, torch.bfloat16, OneOfTwo(TensorParallelGroup(rank, 2)), seconds_of)
        == "cudnn"
    )
    assert bool(measured) == (rank == 0), "others wait for it"


def _numbers(groups: RankGroups) -> list[int]:
    told: list[int] = [0, 0]
    torch.distributed.all_gather_object(told, groups.of_first_rank(5 + groups.rank, CPU))
    return told


def test_the_first_ranks_number_reaches_all(tmp_path: Path) -> None:
    assert on_ranks((1, 2, 1), tmp_path, _numbers) == [5, 5]


def test_a_cpu_runs_flash_and_gives_the_same() -> None:
    inputs = SHAPE.inputs(CPU, torch.float32)
    torch.testing.assert_close(attend("flash", *inputs), attend("native", *inputs))


def test_attention_is_checked_before_anything_is_loaded() -> None:
    with pytest.raises(AttentionError, match="attention_backend 'xformers' needs CUDA, and the ranks run on cpu: set"):
        Engine(Path("nowhere"), tuning=Tuning(attention_backend="xformers"))
    with pytest.raises(AttentionError, match="'flash' has no float32 kernels: set dtype to bfloat16"):
        check_attention("flash", CUDA, torch.float32)
    for backend in ("auto", "native", "flash"):
        check_attention(backend, CPU, torch.float32)
    check_attention("xformers", CUDA, torch.float32)


@pytest.mark.parametrize(("backend", "package"), [("fa3", "flash_attn_interface"), ("xformers", "xformers")])
def test_a_missing_package_is_named(backend: AttentionBackend, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "check_attention", lambda *_: None)  # as if this were CUDA
    with pytest.raises(
        AttentionError, match=f"attention_backend '{backend}' needs the package '{package}' on every no"
    ):
        choose(backend, device=CPU)


def test_a_kernel_that_the_card_lacks_is_said() -> None:
    with pytest.raises(AttentionError, match="'cudnn' has no kernel for this card and precision, or set auto"):
        attention_backends._check_runs("cudnn", CPU, torch.float32, SHAPE)


def test_a_kernel_is_not_tried_with_a_single_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_cudnn(_: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if key.shape[1] == 1:
            raise RuntimeError("cudnn SDPA does not support key/value sequence length 1")
        return value

    monkeypatch.setattr(attention_backends, "attend", as_cudnn)
    attention_backends._check_runs("cudnn", CPU, torch.bfloat16, SHAPE)


def test_the_settings_name_the_same_backends() -> None:
    field = Settings.model_fields["attention_backend"]
    assert get_args(field.annotation) == get_args(AttentionBackend)
