"""The service's errors, and their form in OpenAI's envelope."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any, Literal

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ServiceError(Exception):
    """An error that is reported to the client.

    Attributes:
        message: what was wrong and how to put it right.
        param: the request's field at fault, if there is one.
        code: a stable word for programs.
    """

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    type: ErrorType = "server_error"
    code: str | None = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception that crosses processes is rebuilt from its class and its attributes.
        return _rebuild, (type(self), dict(self.__dict__), self.args)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the error's reply."""
        return {}

    @property
    def envelope(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def _rebuild(cls: type[ServiceError], state: dict[str, Any], args: tuple[Any, ...]) -> ServiceError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidRequestError(ServiceError):
    """The request asks for something that this service does not do; ``status`` may be another 4xx."""

    status: int = HTTPStatus.BAD_REQUEST
    type: ErrorType = "invalid_request_error"
    code = "invalid_value"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = HTTPStatus.BAD_REQUEST,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self._headers = headers or {}

    @property
    def headers(self) -> dict[str, str]:
        return self._headers


class UnauthorizedError(ServiceError):
    """The request has no API key, or an unknown one: 401."""

    status: int = HTTPStatus.UNAUTHORIZED
    type: ErrorType = "invalid_request_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class ForbiddenError(ServiceError):
    """The request's API key does not permit this: 403."""

    status: int = HTTPStatus.FORBIDDEN
    type: ErrorType = "invalid_request_error"
    code = "not_permitted"


class ModelNotFoundError(ServiceError):
    """The request names a model that is not served here."""

    status: int = HTTPStatus.NOT_FOUND
    type: ErrorType = "invalid_request_error"
    code = "model_not_found"


class RetryLaterError(ServiceError):
    """The client may retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        # Whole seconds are all that HTTP has; OpenAI's clients read the second one first.
        milliseconds = max(1, math.ceil(1000 * self.retry_after_s))
        return {"Retry-After": str(math.ceil(milliseconds / 1000)), "Retry-After-Ms": str(milliseconds)}


class BusyError(RetryLaterError):
    """The queue is full: 429, with the seconds after which to retry."""

    status: int = HTTPStatus.TOO_MANY_REQUESTS
    type: ErrorType = "rate_limit_error"
    code = "busy"

    def __init__(self, retry_after_s: float, message: str = "the service's queue is full; ask again later") -> None:
        super().__init__(message, retry_after_s)


class DeadlineImpossibleError(ServiceError):
    """No schedule that the client and the server allow meets ``deadline_s``: 422, with the soonest time possible."""

    status: int = HTTPStatus.UNPROCESSABLE_ENTITY
    type: ErrorType = "invalid_request_error"
    code = "deadline_impossible"

    def __init__(self, message: str, soonest_s: float) -> None:
        super().__init__(message, param="deadline_s")
        self.soonest_s = soonest_s

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Soonest-Seconds": f"{self.soonest_s:.3f}"}


class FinalError(ServiceError):
    """OpenAI clients retry on this status; ``X-Should-Retry: false`` stops them."""

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Should-Retry": "false"}


class DeadlinePassedError(FinalError):
    """The deadline passed before the image was done; its row was freed at the next step boundary: 504."""

    status: int = HTTPStatus.GATEWAY_TIMEOUT
    code = "deadline_passed"


class RequestCancelledError(FinalError):
    """The request was cancelled with ``DELETE /v1/requests/{id}``: 409."""

    status: int = HTTPStatus.CONFLICT
    type: ErrorType = "invalid_request_error"
    code = "request_cancelled"


class RequestNotFoundError(ServiceError):
    """No request with this id is under way: 404."""

    status: int = HTTPStatus.NOT_FOUND
    type: ErrorType = "invalid_request_error"
    code = "request_not_found"


class UnavailableError(RetryLaterError):
    """Nothing can serve the request at the moment, for example while a group starts or is rebuilt: 503."""

    status: int = HTTPStatus.SERVICE_UNAVAILABLE
    code = "unavailable"

    def __init__(self, message: str = "the service is not ready yet; ask again", retry_after_s: float = 5.0) -> None:
        super().__init__(message, retry_after_s)


class GenerationError(ServiceError):
    """The request was taken and its images could not be made: 500."""

    code = "generation_failed"


class GroupFailedError(RuntimeError):
    """The coordinator or a rank of a group failed; its images under way have to be made again by a new group."""


class HistoryMismatchError(GroupFailedError):
    """A rank had another history of plans than the coordinator."""


class PlanMismatchError(RuntimeError):
    """A plan is not the one that must follow: this rank's history differs from the coordinator's."""
