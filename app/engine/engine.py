"""Execute step plans on one rank: embed all rows, run the blocks on those that compute, add residuals to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path

import torch
from diffusers import ModelMixin

from app.engine.attention import positions
from app.engine.attention_backends import AttentionShape, check_attention, choose_attention, prefer, set_attention
from app.engine.epilogues import join_products
from app.engine.families import Edits
from app.engine.forward import Forward
from app.engine.geometry import Geometry
from app.engine.graphs import CudaRecorder, Graphs, Pass, Tensors
from app.engine.inpainting import Inpainting
from app.engine.loading import load_transformer
from app.engine.lora import Loras
from app.engine.lora_linears import RowAdapters, applied
from app.engine.modulation import BranchModulation, Modulation, Recent
from app.engine.process_groups import RankGroups
from app.engine.rows import BatchKey, Branch, Row
from app.engine.sampling import FlowMatchSampler, mix_noise
from app.engine.stopwatch import Stopwatch
from app.engine.tuning import Tuning, tune, use_compile_cache
from app.errors import PlanMismatchError
from app.messages.conditioning import Conditioning, PromptEmbeddings, SourceImage
from app.messages.jobs import COND, UNCOND, DenoiseJob
from app.messages.loras import LoraUse
from app.messages.plans import FIRST_DIGEST, BranchStep, RowStep, StepPlan, plan_digest
from app.messages.results import StepResult
from magcache_core import get_strategy
from magcache_core.row_sums import MeasuredStep, RowMeasurement
from magcache_core.strategies import Rotary


@dataclass(frozen=True)
class BatchItem:
    """One CFG branch of one row in a forward pass."""

    row: Row
    branch: Branch
    row_step: RowStep
    step: BranchStep


class Engine:
    """One rank: its shard of the transformer and the rows under way.

    Attributes:
        graphs: of the passes that recur; empty until the warm-up records some.
    """

    def __init__(
        self,
        model: Path,
        groups: RankGroups = RankGroups(),  # noqa: B008 - frozen
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tuning: Tuning = Tuning(),  # noqa: B008 - frozen
        transformer: ModelMixin | None = None,
        single_file: Path | None = None,
        loras: Path | None = None,
    ) -> None:
        """Load this rank's shard of ``model`` (a folder in diffusers layout), or take ``transformer`` as it is.

        With ``single_file`` the transformer's weights are those of that file, in BFL's layout. With ``loras`` jobs may
        name adapters of that folder, once they are loaded.

        Raises:
            CheckpointError, ValueError: see `load_transformer`.
            AttentionError: this machine does not have ``tuning``'s attention backend.
        """
        self.groups = groups
        self.device = torch.device(device)
        self.dtype = dtype
        if transformer is None:
            check_attention(tuning.attention_backend, self.device, dtype)
            transformer = load_transformer(
                model, groups.tensor, self.device, dtype, tuning.quantization, tuning.modulation_on_host, single_file
            )
            tune(transformer, tuning, groups.sequence)
        heads, channels = transformer.config.num_attention_heads, transformer.config.attention_head_dim
        sharing = groups.tensor.size * groups.sequence.size
        shape = AttentionShape(tuning.usual.tokens, max(heads // sharing, 1), channels)
        self.attention = choose_attention(tuning.attention_backend, shape, self.device, dtype, groups)
        set_attention(transformer, self.attention)
        if tuning.compile and tuning.compile_cache is not None:
            use_compile_cache(tuning.compile_cache, self.attention)
        self.transformer = transformer
        # Before the modulation takes its linears out.
        self.loras = None if loras is None else Loras(loras, model, transformer, groups.tensor, self.device, dtype)
        if tuning.compile and self.device.type == "cuda":
            join_products(transformer)  # of what adapters and 8 bits left plain
        self._modulation = Modulation(transformer, groups.tensor, self.device)
        self._recent = Recent()
        self.strategy = get_strategy(self.transformer)
        self._forward = Forward(transformer, self.strategy, self._modulation, groups.sequence)
        self.graphs = Graphs(CudaRecorder(self.device) if tuning.cuda_graphs else None)
        self.sampler = FlowMatchSampler(model)
        self.family = self.sampler.family
        self.rows: dict[str, Row] = {}
        self.restart()
        self._rotary = lru_cache(maxsize=64)(self._rotary_embedding)

    def restart(self) -> None:
        """Drop all rows, and expect the first plan of a new history."""
        self.rows.clear()
        self._admitted = 0
        self._sequence = 0
        self._digest = FIRST_DIGEST

    def execute(self, plan: StepPlan, conditioning: Sequence[Conditioning] = ()) -> StepResult:
        """`execute_all` of one plan."""
        (result,) = self.execute_all([plan], conditioning)
        return result

    @torch.inference_mode()
    def execute_all(self, plans: Sequence[StepPlan], conditioning: Sequence[Conditioning] = ()) -> list[StepResult]:
        """Run plans, one after another: of each drop rows, admit rows, take one step of each planned row.

        The device is waited for once, after the last of them: a result means that its step is done.

        Args:
            plans: the next ones in sequence.
            conditioning: the tensors of all that they admit, in order.

        Returns:
            This rank's results; on rank 0 they hold the latents of rows that took their last step, which are freed.

        Raises:
            PlanMismatchError: a plan was lost, repeated or altered on its way.
        """
        clock = Stopwatch(self.device)
        tensors = iter(conditioning)
        results = []
        for plan in plans:
            results.append(self._execute(plan, list(islice(tensors, len(plan.admit)))))
            clock.lap()
        return [replace(result, seconds=seconds) for result, seconds in zip(results, clock.laps(), strict=True)]

    def _execute(self, plan: StepPlan, conditioning: Sequence[Conditioning]) -> StepResult:
        """Start what ``plan`` asks for; how long it takes is not known yet."""
        self._check(plan)
        for row_id in plan.drop:
            self.rows.pop(row_id, None)
        for job, tensors in zip(plan.admit, conditioning, strict=True):
            self.rows[job.row_id] = self._admit(job, tensors)
        by_shape = sorted(plan.rows, key=self._batch_order)
        previews: dict[str, torch.Tensor] = {}
        for _, same_shape in groupby(by_shape, key=self._batch_key):
            previews |= self._step(list(same_shape))
        finished = {step.row_id: self.rows.pop(step.row_id) for step in plan.rows if step.last}
        latents = {row_id: row.latents.cpu() for row_id, row in finished.items()}
        return StepResult(
            rank=self.groups.rank,
            sequence=plan.sequence,
            digest=self._digest,
            seconds=0.0,
            residual_bytes=sum(row.residual_bytes for row in self.rows.values()),
            latents=latents if self.groups.rank == 0 else {},
            previews=previews if self.groups.rank == 0 else {},
            sums={row_id: sums for row_id, row in finished.items() if (sums := row.sums)},
        )

    def _check(self, plan: StepPlan) -> None:
        expected = plan_digest(self._digest, plan)
        if plan.sequence != self._sequence or plan.digest != expected:
            raise PlanMismatchError(
                f"rank {self.groups.rank} expected plan {self._sequence} with digest {expected}, "
                f"got plan {plan.sequence} with digest {plan.digest}"
            )
        self._sequence += 1
        self._digest = expected

    def _batch_key(self, step: RowStep) -> BatchKey:
        return self.rows[step.row_id].batch_key

    def _batch_order(self, step: RowStep) -> tuple[BatchKey, tuple[LoraUse, ...]]:
        """Rows that share a batch together, and among them those with equal adapters."""
        return self._batch_key(step), self.rows[step.row_id].job.loras

    def _admit(self, job: DenoiseJob, conditioning: Conditioning) -> Row:
        adapters = None if self.loras is None else self.loras.hold(job.loras)
        with applied([adapters]):
            return self._new_row(job, conditioning, adapters)

    def _new_row(self, job: DenoiseJob, conditioning: Conditioning, adapters: RowAdapters | None) -> Row:
        geometry = Geometry.of(job.width, job.height)
        # FLUX's schedule is that of all steps; image-to-image enters it late.
        sigmas = self.sampler.sigmas(job.num_inference_steps, geometry.tokens)[job.first_step :]
        branches = {COND: self._branch(conditioning.prompt, sigmas, job)}
        if conditioning.negative is not None:
            branches[UNCOND] = self._branch(conditioning.negative, sigmas, job)
        noise = self.family.layout.noise(
            job.seed, geometry, self.transformer.config.in_channels, self.device, self.dtype
        )
        latents, inpainting = noise, None
        if job.strength is not None:
            (source,) = conditioning.sources
            kept = source.latents.to(noise)
            latents = mix_noise(kept, noise, sigmas[0])
            inpainting = None if source.mask is None else Inpainting.of(kept, noise, source.mask)
        self._admitted += 1
        measurement = None
        if job.is_recorded and self.groups.rank == 0:
            measurement = RowMeasurement(sigmas.tolist(), list(branches), job.true_cfg_scale, conditioning.grams)
        references = conditioning.sources if self.family.edits is Edits.REFERENCES else ()
        return Row(
            job=job,
            number=self._admitted,
            geometry=geometry,
            latents=latents,
            sigmas=sigmas.to(self.device),
            branches=branches,
            references=self._embed_references(references),
            reference_geometries=tuple(Geometry.of(one.width, one.height) for one in references),
            inpainting=inpainting,
            adapters=adapters,
            measurement=measurement,
        )

    def _embed_references(self, references: Sequence[SourceImage]) -> torch.Tensor:
        """This rank's part of (reference tokens, inner_dim), all images one after another."""
        channels = self.transformer.config.in_channels
        tokens = self.groups.sequence.part(torch.cat([torch.empty(0, channels), *(one.latents for one in references)]))
        return self.strategy.embed_image(self.transformer, tokens.to(self.device, self.dtype)[None])[0]

    def _branch(self, prompt: PromptEmbeddings, sigmas: torch.Tensor, job: DenoiseJob) -> Branch:
        tokens = self.groups.sequence.part(prompt.tokens).to(self.device, self.dtype)
        context = self.strategy.context(self.transformer, tokens[None])[0]
        pooled = None if prompt.pooled is None else prompt.pooled.view(torch.uint8).numpy().tobytes()
        key = pooled, tuple(sigmas.tolist()), job.guidance_scale, job.computing, job.loras
        modulation = self._recent.get(key, partial(self._modulate, prompt.pooled, sigmas, job))
        return Branch(len(prompt.tokens), context, modulation.blocks, modulation.output)

    def _modulate(self, pooled: torch.Tensor | None, sigmas: torch.Tensor, job: DenoiseJob) -> BranchModulation:
        """All that depends on noise level, guidance and pooled prompt; ``sigmas`` are on the CPU."""
        # FluxPipeline rounds the timestep (0..1000) to the latents' dtype before it divides by 1000.
        timesteps = ((sigmas[:-1] * 1000).to(self.dtype) / 1000).to(self.device)
        steps = len(timesteps)
        guidance = torch.full((steps,), job.guidance_scale, dtype=torch.float32, device=self.device)
        of_prompt = None if pooled is None else pooled.to(self.device, self.dtype).expand(steps, -1)
        temb = self.strategy.embed_time(
            self.transformer, timesteps, guidance if self.transformer.config.guidance_embeds else None, of_prompt
        )
        computing = list(range(steps)) if job.computing is None else list(job.computing)
        ahead = self._modulation.ahead(torch.stack([temb[step] for step in computing]))
        # Each in memory of its own: code is compiled for where in its memory an argument begins.
        blocks = {step: own.clone() for step, own in zip(computing, ahead, strict=True)}
        return BranchModulation(blocks, self.strategy.output_modulation(self.transformer, temb))

    def _step(self, row_steps: Sequence[RowStep]) -> dict[str, torch.Tensor]:
        """Take one step of rows of equal shapes: forward pass, true CFG, move, inpainting; returns previews."""
        parts = [
            BatchItem(row, row.branches[step.branch], row_step, step)
            for row_step in row_steps
            for row in [self.rows[row_step.row_id]]
            for step in row_step.branches
        ]
        running = [part for part in parts if part.step.runs]
        computed = self._velocities(running) if running else ()
        velocities = iter(computed)
        previews = {}
        for row_step in row_steps:
            row = self.rows[row_step.row_id]
            made = [next(velocities) for step in row_step.branches if step.runs]  # each (image_tokens, channels)
            if row.job.is_recorded and self.groups.branches.rank == 0:
                self._measure(row, row_step.step, made)
            if row_step.estimate:
                estimate = self._correct(row, row_step, made)
            else:
                guided = row.guided(made).float()
                before, after = row.sigmas[row_step.step], row.sigmas[row_step.step + 1]
                # The velocity points from data to noise, so this is where it ends at sigma 0.
                estimate = row.latents.float() - before * guided if row_step.preview else None
                row.latents = (row.latents.float() + (after - before) * guided).to(self.dtype)
            row.latents = row.blended(row.latents, row_step.step + 1)
            if estimate is not None:
                previews[row_step.row_id] = row.blended(estimate, -1).to(self.dtype).cpu()
        return previews

    def _correct(self, row: Row, row_step: RowStep, made: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Move a row that predicts and corrects, from a computed step to the next; the estimate if one is wanted."""
        if row_step.move:
            # A copy, so that a kept row does not hold the whole batch's memory.
            row.keep(row.guided(made).clone(), len(row_step.move))
            row.latents = row.displaced(row_step.move).to(self.dtype)
        return row.displaced(row_step.estimate) if row_step.preview else None

    def _velocities(self, parts: Sequence[BatchItem]) -> torch.Tensor:
        """`_velocity` of all ``parts``, of which each copy of the shard computes its own."""
        owners = [part.row.owner(part.step.branch, self.groups.branches.size) for part in parts]
        own = [part for part, owner in zip(parts, owners, strict=True) if owner == self.groups.branches.rank]
        none = parts[0].row.latents[None][:0]
        return self.groups.branches.merge(self._velocity(own) if own else none, owners)

    def _velocity(self, parts: Sequence[BatchItem]) -> torch.Tensor:
        """Predicted velocities, (parts, image_tokens, channels), each computed or with a reused residual."""
        computing = [part for part in parts if part.step.compute]
        reusing = [part for part in parts if not part.step.compute]
        if not reusing:
            return self._computed(parts)
        if not computing:
            return self._reused(parts)
        made = {True: iter(self._computed(computing)), False: iter(self._reused(reusing))}
        return torch.stack([next(made[part.step.compute]) for part in parts])

    def _computed(self, parts: Sequence[BatchItem]) -> torch.Tensor:
        """Run the block stack, and keep the residuals that will be reused; velocities as of `_velocity`."""
        velocities, residuals = self._run(
            partial(self._forward.computed, self._rotary(*parts[0].row.batch_key)),
            parts,
            [part.row.latents for part in parts],
            [part.branch.context for part in parts],
            [part.row.references for part in parts],
            [part.branch.modulation_at(part.row_step.step) for part in parts],
            [part.branch.output_modulation[part.row_step.step] for part in parts],
        )
        for part, residual in zip(parts, residuals, strict=True):
            if part.step.residuals_kept > 0:
                # A copy, so that a kept row does not hold the whole batch's memory.
                part.branch.store(residual.clone(), part.step.residuals_kept)
        return velocities

    def _reused(self, parts: Sequence[BatchItem]) -> torch.Tensor:
        """Add stored residuals instead; velocities as of `_velocity`."""
        (velocities,) = self._run(
            self._forward.reused,
            parts,
            [part.row.latents for part in parts],
            [part.branch.reuse(part.row.job.row_id, part.step) for part in parts],
            [part.branch.output_modulation[part.row_step.step] for part in parts],
        )
        return velocities

    def _run(self, wanted: Pass, parts: Sequence[BatchItem], *rows: Sequence[torch.Tensor]) -> Tensors:
        """A pass of `Forward`, replayed where one of these sizes was recorded."""
        adapters = [part.row.adapters for part in parts]
        # A pass with adapters adds those of its rows, whichever they are: a recorded one would add the first ones.
        adapted = any(one is not None for one in adapters)
        key = None if adapted else (parts[0].step.compute, parts[0].row.batch_key, len(parts))
        with prefer(self.attention), applied(adapters):
            return self.graphs.run(key, wanted, rows)

    def _measure(self, row: Row, step: int, velocities: Sequence[torch.Tensor]) -> None:
        """Measure what the branches of a recorded row computed at a step: on rank 0, with all ranks' tokens."""
        branches = list(row.branches.values())
        residuals = [self.groups.sequence.gather(one.residuals[0][None], row.geometry.tokens) for one in branches]
        if row.measurement is None:
            return
        hidden = self.strategy.embed_image(self.transformer, row.latents[None])

        def replay(branch: Branch, residual: torch.Tensor) -> torch.Tensor:
            modulation = branch.output_modulation[step][None]
            projected: torch.Tensor = self.strategy.project(self.transformer, hidden + residual, modulation)
            return projected

        row.measurement.add(
            [
                MeasuredStep(residual, velocity[None], partial(replay, branch))
                for branch, residual, velocity in zip(branches, residuals, velocities, strict=True)
            ]
        )

    def _rotary_embedding(self, geometry: Geometry, text_tokens: int, references: tuple[Geometry, ...]) -> Rotary:
        """Positions of this rank's tokens: its parts of the text, of the image and of the references."""
        ids = self.family.layout.position_ids(geometry, text_tokens, references).to(self.device)
        segments = text_tokens, geometry.tokens, sum(one.tokens for one in references)
        own = torch.cat([self.groups.sequence.part(segment) for segment in ids.split(segments)])
        sizes = self.groups.sequence.part_sizes(*segments)
        return positions(self.transformer, self.transformer.pos_embed(own), tuple(sizes))
