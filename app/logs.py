"""Logging of the service's own processes: text or JSON lines to stderr, which Ray collects."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from app.settings import Settings
from app.telemetry import REQUEST_ID

LOGGERS = ("app", "magcache_core")


def configure_logging(settings: Settings) -> None:
    """Set up the service's loggers as ``settings`` say, to stderr; calling it again replaces the setup."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(settings.log_level)
        logger.handlers = [handler]
        logger.propagate = False


class TextFormatter(logging.Formatter):
    """One text line, with the request id before messages that do not contain it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        """The line without its traceback."""
        request_id = _request_id(record)
        if request_id is not None and request_id not in record.message:
            record.message = f"request {request_id}: {record.message}"
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and request_id and exception if there are any.

    python-json-logger needs as much code for these lines: its time comes last, in microseconds, its request_id is null.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = _request_id(record)
        if request_id is not None:
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _add_request_id(record: logging.LogRecord) -> bool:
    # A task that serves several requests names the one it logs for (``extra``).
    if not hasattr(record, "request_id"):
        record.request_id = REQUEST_ID.get()
    return True


def _request_id(record: logging.LogRecord) -> str | None:
    request_id: str | None = getattr(record, "request_id", None)
    return request_id
