"""The rank actor: one process, one shard, one plan after another."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray
import torch

from app.cluster.by_reference import by_reference
from app.cluster.network import use_interface_of
from app.cluster.rank_loras import RankLoras
from app.cluster.rendezvous import Rendezvous, rendezvous_store
from app.logs import configure_logging
from app.lora_folder import lora_folder, lora_targets
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob
from app.messages.plans import StepPlan
from app.messages.results import StepResult, StepTime
from app.model_files import compile_cache, model_folder, transformer_file
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.engine import Engine
    from app.engine.lora_names import Target

logger = logging.getLogger(__name__)

REPORT_S = 1.0
"""How often a loading rank says how far it is."""


class Rank:
    """One rank of a group. Its calls run one at a time, in the order in which the coordinator sends them.

    The engine is imported by the rank's own process: the replica, which starts all ranks, is up 3 s of CPU sooner.
    """

    def __init__(self, settings: Settings, rank: int) -> None:
        """A process that has imported everything and holds no model until `load`."""
        from app.engine import process_groups, tuning, warmup  # noqa: F401

        configure_logging(settings)
        if settings.threads_per_rank:
            torch.set_num_threads(settings.threads_per_rank)
        self._settings = settings
        self._rank = rank
        self._rendezvous: Rendezvous | None = None
        self._engine: Engine | None = None
        self._loras: RankLoras | None = None
        self._finished_s = 0.0

    def lora_targets(self) -> "dict[str, Target]":
        """What adapters may change; this needs no weights."""
        return lora_targets(self._settings)

    def open_rendezvous(self) -> tuple[str, int]:
        """On rank 0: open the place where the ranks meet; returns its host and port."""
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address())
        return self._rendezvous.address

    def close_rendezvous(self) -> None:
        """On rank 0: close it, once collectives have run on all ranks."""
        assert self._rendezvous is not None, "open_rendezvous() comes first"
        self._rendezvous.close()

    def load_and_report(self, rendezvous: tuple[str, int] | None) -> Iterator[int]:
        """`load`, and meanwhile the bytes that this process has read and written: of the checkpoint or a download."""
        with ThreadPoolExecutor(1) as pool:
            yield _moved_bytes()
            loading = pool.submit(self.load, rendezvous)
            while not wait([loading], REPORT_S).done:
                yield _moved_bytes()
            loading.result()
        yield _moved_bytes()

    def load(self, rendezvous: tuple[str, int] | None) -> None:
        """Join the other ranks and load this rank's shard.

        Args:
            rendezvous: where rank 0 opened it; None for a single rank, which needs no process group.
        """
        from app.engine.engine import Engine
        from app.engine.process_groups import RankGroups, join
        from app.engine.tuning import Tuning, UsualRow

        settings = self._settings
        model: Path = model_folder(settings)
        device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        groups = RankGroups()
        if rendezvous is not None:
            use_interface_of(ray.util.get_node_ip_address())
            store = rendezvous_store(rendezvous, settings.start_timeout_s)
            groups = join(self._rank, settings.parallel_sizes, store, device, settings.collective_timeout_s)
        tuning = Tuning(
            attention_backend=settings.attention_backend,
            compile=settings.compile,
            quantization=settings.quantization,
            modulation_on_host=settings.modulation_on_host,
            cuda_graphs=settings.cuda_graphs,
            usual=UsualRow(settings.default_image_tokens, settings.sampling.max_sequence_length),
            compile_cache=compile_cache(settings),
        )
        self._engine = Engine(
            model,
            groups,
            device,
            getattr(torch, settings.dtype),
            tuning,
            single_file=transformer_file(settings),
            loras=lora_folder(settings),
        )
        if self._engine.loras is not None:
            self._loras = RankLoras(self._engine.loras)
        logger.info("rank %d of %d holds its shard of %s", self._rank, settings.ranks, model)

    def warm_up(self, job: DenoiseJob) -> tuple[StepTime, ...]:
        """Take steps of blank images like ``job``, together with the other ranks, and say how long they took."""
        from app.engine.warmup import warm_up

        assert self._engine is not None, "load() comes first"
        settings = self._settings
        times = warm_up(self._engine, job, settings.sampling.max_sequence_length, settings.max_batch_rows)
        alone = {one.compute: one.seconds for one in times if one.rows == 1}
        logger.info("a step of the default size takes %.3g s computed and %.3g s reused", alone[True], alone[False])
        return times

    def attention(self) -> str:
        """The attention backend, the same on all ranks; with ``auto`` the one that was chosen."""
        assert self._engine is not None, "load() comes first"
        return self._engine.attention

    def execute(self, plans: Sequence[StepPlan], *conditioning: Conditioning) -> list[StepResult]:
        """Run plans, one after another; ``conditioning`` holds the tensors of all that they admit, in order."""
        assert self._engine is not None, "load() comes first"
        # A rank that holds rows will be sent another plan: until it comes, the control plane keeps the rank waiting.
        idle_seconds = time.perf_counter() - self._finished_s if self._engine.rows else 0.0
        results: list[StepResult] = []
        for result in self._engine.execute_all(plans, conditioning):
            latents = {row_id: by_reference(tensor) for row_id, tensor in result.latents.items()}
            previews = {row_id: by_reference(tensor) for row_id, tensor in result.previews.items()}
            results.append(replace(result, latents=latents, previews=previews, idle_seconds=idle_seconds))
            idle_seconds = 0.0
        self._finished_s = time.perf_counter()
        return results

    def load_lora(self, name: str, digest: str) -> bool:
        """Begin to load an adapter beside the plans, unless that has begun; whether it is loaded.

        Raises:
            LoraError: it cannot be.
        """
        assert self._loras is not None, "jobs name adapters only where the setting loras names a folder"
        return self._loras.load(name, digest)

    def drop_lora(self, name: str, digest: str) -> None:
        """Free an adapter that no row uses."""
        assert self._loras is not None
        self._loras.drop(name, digest)

    def ping(self) -> int:
        """Answer when everything sent before is done; returns this rank's number."""
        return self._rank


def _moved_bytes() -> int:
    moved = psutil.Process().io_counters()
    return int(moved.read_chars + moved.write_chars)
