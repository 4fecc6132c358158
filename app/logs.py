"""Log lines of the service's own processes: one format, to stderr, from where Ray collects them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from app.settings import Settings
from app.telemetry import REQUEST_ID

LOGGERS = ("app", "magcache_core")


def configure_logging(settings: Settings) -> None:
    """Send the service's loggers to stderr as ``settings`` say; a further call replaces what the last one set."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else TextFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(settings.log_level)
        logger.handlers = [handler]
        logger.propagate = False


class TextFormatter(logging.Formatter):
    """A line for people. The request's id stands in front of messages that do not have it themselves."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's own name)
        """The line without a traceback."""
        request_id = _request_id(record)
        if request_id is not None and request_id not in record.message:
            record.message = f"request {request_id}: {record.message}"
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and where they are known request_id and exception."""

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
    # A line may name its request itself, where the task serves several (``extra``).
    if not hasattr(record, "request_id"):
        record.request_id = REQUEST_ID.get()
    return True


def _request_id(record: logging.LogRecord) -> str | None:
    request_id: str | None = getattr(record, "request_id", None)
    return request_id
