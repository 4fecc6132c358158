"""Runs calibrations with the groups that serve: prompts to the encoder, rows to a group, images from the decoder."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable
from dataclasses import replace
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from app.cluster.client_errors import to_service_error, unwrap_ray_error
from app.cluster.coordinators import Coordinators
from app.cluster.handles import result_of
from app.components.image_file import pixels_of
from app.control import job_file
from app.control.calibration import Outcome, Run, Runs, Subject, calibration, expected_runs
from app.control.findings import Findings, from_bytes, to_bytes
from app.engine.checkpoint_files import read_json
from app.engine.geometry import Geometry
from app.errors import InvalidRequestError, RetryLaterError
from app.messages.calibration import CalibrationJob, CalibrationStatus
from app.messages.conditioning import Conditioning
from app.messages.jobs import DenoiseJob, MagCacheOptions
from app.messages.results import DenoiseResult
from app.metrics import CalibrationMetrics
from app.model_files import model_folder
from app.settings import Settings
from magcache_core import Profile, save_profile
from magcache_core.profile_store import replace_file

if TYPE_CHECKING:
    from app.components.prompt_encoder import PromptEncoder
    from app.components.vae import ImageDecoder

logger = logging.getLogger(__name__)

ATTEMPTS = 60
"""How often a run is tried that finds no group, or a full one, before the calibration fails."""
RETRY_S = 5.0
LOG_EVERY = 20
"""Runs between two lines of progress in the log."""
_KEPT = 32


class Calibrator:
    """One calibration at a time; its findings are in the profile folder after each run, where the next one goes on."""

    def __init__(
        self,
        settings: Settings,
        encoder: "PromptEncoder",
        replica: DeploymentHandle,
        decoder: "ImageDecoder",
        coordinators: Coordinators,
        process: str = "api",
    ) -> None:
        """``process`` is the API process that it is in."""
        self._settings = settings
        self._encoder = encoder
        self._replica = replica
        self._decoder = decoder
        self._coordinators = coordinators
        self._known: dict[str, CalibrationStatus] = {}  # the last ones, by id
        self._task: asyncio.Task[None] | None = None
        self._running: str | None = None
        self._registry = CollectorRegistry()
        self._metrics = CalibrationMetrics(self._registry, settings.model_name, process)

    @property
    def busy(self) -> bool:
        """Whether a calibration is under way."""
        return self._running is not None

    def start(self, job: CalibrationJob) -> CalibrationStatus:
        """Begin ``job``.

        Raises:
            InvalidRequestError: there is no folder for profiles, or a calibration is under way (409).
        """
        folder = self._settings.magcache.profile_folder
        if self._settings.magcache.calibrate == "off":
            raise InvalidRequestError(
                "the service does not calibrate; the operator sets magcache.calibrate to 'ask'",
                code="calibration_off",
                status=HTTPStatus.CONFLICT,
            )
        if folder is None:
            raise InvalidRequestError(
                "the service has no folder for calibrated profiles; the operator sets magcache.profile_dir",
                code="no_profile_dir",
                status=HTTPStatus.CONFLICT,
            )
        if self._running is not None:
            raise InvalidRequestError(
                f"calibration {self._running} is under way; wait for its end, or end it with "
                f"DELETE /v1/calibrations/{self._running}",
                code="calibration_under_way",
                status=HTTPStatus.CONFLICT,
            )
        self._running = job.id
        self._note(CalibrationStatus(job.id, "running", "record", 0, expected_runs(job), 0.0))
        self._task = asyncio.create_task(self._work(job, folder))
        return self._known[job.id]

    def status(self, calibration_id: str) -> CalibrationStatus:
        """How far a calibration is; `InvalidRequestError` (404) where it is not known, or no longer."""
        if calibration_id not in self._known:
            raise InvalidRequestError(
                f"no calibration {calibration_id[:128]!r} is known here; one under way goes on soon after a restart",
                code="calibration_not_found",
                status=HTTPStatus.NOT_FOUND,
            )
        return self._known[calibration_id]

    def interrupted(self) -> CalibrationJob | None:
        """The job that was under way when this service or its process ended; None where there is none."""
        folder = self._settings.magcache.profile_folder
        file = None if folder is None else self._job_file(folder)
        return job_file.from_bytes(file.read_bytes()) if file is not None and file.is_file() else None

    def _job_file(self, folder: Path) -> Path:
        return folder / f".{_name_of(self._settings.model)}.job"

    async def join(self) -> None:
        """Return when no calibration is under way."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def cancel(self, calibration_id: str) -> CalibrationStatus:
        """End a calibration; what it found stays for the next one."""
        status = self.status(calibration_id)
        folder = self._settings.magcache.profile_folder
        if self._running == calibration_id and folder is not None:
            await asyncio.to_thread(self._job_file(folder).unlink, missing_ok=True)
            await self.stop()
        return self._known[status.id]

    async def stop(self) -> None:
        """End the calibration under way, if there is one, so that a service that starts again goes on with it."""
        if self._task is not None:
            self._task.cancel()
            await self.join()

    def metric_families(self) -> list[Metric]:
        """The metrics of the calibrations that it ran."""
        return list(self._registry.collect())

    def _note(self, status: CalibrationStatus) -> None:
        self._known[status.id] = status
        while len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]

    async def _work(self, job: CalibrationJob, folder: Path) -> None:
        try:
            # At once: in a thread it might come after the file's removal.
            replace_file(self._job_file(folder), job_file.to_bytes(job))
            profile = await self._calibrate(job, folder)
        except asyncio.CancelledError:
            self._end(replace(self._known[job.id], state="cancelled"), folder)
        except Exception as error:  # whatever it is, its status says so
            logger.exception("calibration %s failed", job.id)
            message = f"{type(error).__name__}: {error}"
            self._end(replace(self._known[job.id], state="failed", message=message), folder)
        else:
            label, runs = f"{profile.name}@{profile.version}", self._known[job.id].runs
            done = replace(self._known[job.id], state="done", profile=label, expected_runs=runs)
            self._metrics.at(profile.name, done)
            self._end(done, folder)

    def _end(self, status: CalibrationStatus, folder: Path) -> None:
        self._running = None
        self._note(status)
        self._metrics.ended(status)
        logger.info("calibration %s: %s after %d runs, %.0f s", status.id, status.state, status.runs, status.seconds)
        if status.state != "cancelled":  # which it also is when the service stops, to go on later
            self._job_file(folder).unlink(missing_ok=True)

    async def _calibrate(self, job: CalibrationJob, folder: Path) -> Profile:
        model = await asyncio.to_thread(model_folder, self._settings)
        subject = await asyncio.to_thread(_subject, job, self._settings, model)
        file = folder / f".{subject.name}.findings"
        findings = await asyncio.to_thread(_read, file, job)
        if findings.runs:
            logger.info("calibration %s goes on after %d runs", job.id, findings.runs)
            self._note(_status(job, findings))
        runs = calibration(job, subject, findings)
        # Planning candidates takes tens of milliseconds, which other requests should not wait for.
        step = await asyncio.to_thread(_advance, runs, None)
        while isinstance(step, Run):
            outcome = await self._outcome(job, step)
            step = await asyncio.to_thread(_advance, runs, outcome)
            await asyncio.to_thread(_write, file, findings, job)
            status = _status(job, findings)
            self._note(status)
            self._metrics.at(subject.name, status)
            self._metrics.ran(subject.name, findings.phase, outcome.seconds)
            if findings.runs % LOG_EVERY == 0:
                logger.info(
                    "calibration %s: %s, run %d of about %d", job.id, findings.phase, status.runs, status.expected_runs
                )
        path = await asyncio.to_thread(save_profile, step, folder)
        logger.info("calibration %s: profile %s@%s is in %s", job.id, step.name, step.version, path)
        await self._coordinators.call("read_profiles")
        await asyncio.to_thread(file.unlink, missing_ok=True)
        return step

    async def _outcome(self, job: CalibrationJob, run: Run) -> Outcome:
        """Have one image run, again when its group breaks or is full."""
        for attempt in range(1, ATTEMPTS + 1):
            started = time.perf_counter()
            try:
                return await self._run(job, run, attempt, started)
            except Exception as error:
                cause = to_service_error(error, 0.0)
                retried = isinstance(cause, RetryLaterError) or isinstance(
                    unwrap_ray_error(error), (ray.exceptions.ObjectLostError, BackPressureError)
                )
                if not retried or attempt == ATTEMPTS:
                    raise
                logger.warning("calibration %s: a run is tried again: %s", job.id, cause)
                await asyncio.sleep(RETRY_S)
        raise AssertionError("the last attempt returns or raises")

    async def _run(self, job: CalibrationJob, run: Run, attempt: int, started: float) -> Outcome:
        negative = None if job.negative_prompt is None else await self._encoder.encode(job.negative_prompt)
        conditioning = Conditioning(await self._encoder.encode(run.prompt), negative, grams=run.grams)
        row = DenoiseJob(
            request_id=job.id,
            row_id=f"{job.id}/{attempt}-{self._known[job.id].runs}",
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale,
            true_cfg_scale=job.true_cfg_scale,
            seed=0,
            magcache=MagCacheOptions(enabled=False),
            calibration=run.calibration,
        )
        result: DenoiseResult = await result_of(self._replica.denoise.remote(row, conditioning))
        # Finished images of clients are decoded before previews, and so before these.
        file = await self._decoder.preview(result.latents, job.width, job.height, "png", 100) if run.decoded else None
        latents = await result.latents if isinstance(result.latents, Awaitable) else result.latents
        image = None if file is None else await asyncio.to_thread(pixels_of, file)
        return Outcome(latents, time.perf_counter() - started, result.sums, image)


def _status(job: CalibrationJob, findings: Findings) -> CalibrationStatus:
    expected = max(expected_runs(job), findings.runs)
    return CalibrationStatus(job.id, "running", findings.phase, findings.runs, expected, findings.seconds)


def _name_of(model: str) -> str:
    return Path(model.rstrip("/")).name


def _subject(job: CalibrationJob, settings: Settings, model: Path) -> Subject:
    from app.engine.sampling import FlowMatchSampler  # here, as diffusers takes 2 s to load

    name = _name_of(settings.model)
    guidance = f"g{job.guidance_scale:g}" + ("" if job.negative_prompt is None else f"-cfg{job.true_cfg_scale:g}")
    sigmas = FlowMatchSampler(model).sigmas(job.steps, Geometry.of(job.width, job.height).tokens)
    return Subject(
        name=f"{name}-{job.steps}-{job.width}x{job.height}-{guidance}",
        model=settings.model,
        transformer=read_json(model / "transformer" / "config.json")["_class_name"],
        sigmas=tuple(sigmas.tolist()),
        provenance={
            "dtype": settings.dtype,
            "device": settings.device,
            "quantization": settings.quantization,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "negative_prompt": job.negative_prompt,
            "prompts_sha256": hashlib.sha256("\n".join(job.prompts).encode()).hexdigest(),
            "versions": {package: metadata.version(package) for package in ("torch", "diffusers")},
        },
    )


def _advance(runs: Runs, outcome: Outcome | None) -> Run | Profile:
    """The next run, or the profile at the end."""
    try:
        return next(runs) if outcome is None else runs.send(outcome)
    except StopIteration as end:
        profile: Profile = end.value
        return profile


def _read(file: Path, job: CalibrationJob) -> Findings:
    return (from_bytes(file.read_bytes(), job) if file.is_file() else None) or Findings()


def _write(file: Path, findings: Findings, job: CalibrationJob) -> None:
    replace_file(file, to_bytes(findings, job))
