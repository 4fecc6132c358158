"""What one API key may ask of a group: images that wait, and computed megapixel-steps a minute. Pure."""

from collections.abc import Callable

from app.control.request import RequestState
from app.errors import BusyError
from app.messages.jobs import DenoiseJob
from app.settings import KeySettings


class KeyLimits:
    """A token bucket per key, which holds a minute's worth; what the last image took beyond it is filled up first."""

    def __init__(self, settings: KeySettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}  # megapixel-steps left, and when that was so

    def check(self, job: DenoiseJob, waiting: int, free_places: int, next_place_s: Callable[[], float]) -> None:
        """Refuse an image beyond the limits of its key.

        Args:
            waiting: images of the key that wait.
            free_places: how many images could join at once.
            next_place_s: seconds until the next waiting image joins.

        Raises:
            BusyError: with the time after which the key has room again.
        """
        limit = self._settings.max_waiting_pictures
        if limit is not None and job.key_name and waiting >= limit + free_places:
            raise BusyError(next_place_s(), f"{waiting} images of this API key wait, and {limit} may; ask again later")
        rate = self._settings.megapixel_steps_per_minute
        if rate is not None and job.key_name and (level := self._level(job.key_name, rate)) <= 0:
            raise BusyError(
                -level * 60 / rate, f"this API key used its {rate:g} megapixel-steps a minute; ask again later"
            )

    def take(self, entry: RequestState) -> None:
        """Count an image that was taken."""
        rate, job = self._settings.megapixel_steps_per_minute, entry.job
        if rate is not None and job.key_name:
            used = job.width * job.height * entry.row_schedule.computed[-1] / 1e6
            self._levels[job.key_name] = self._level(job.key_name, rate) - used, self._clock()

    def _level(self, name: str, rate: float) -> float:
        level, since_s = self._levels.get(name, (rate, 0.0))
        return min(level + (self._clock() - since_s) * rate / 60, rate)
