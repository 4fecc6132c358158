"""Log lines carry the id of the request that they belong to, as text and as JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from app.logs import LOGGERS, configure_logging
from app.settings import Settings
from app.telemetry import REQUEST_ID

logger = logging.getLogger("app.tests")


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """What was logged, line by line."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
    yield lambda: capsys.readouterr().err.splitlines()
    for each, level, handlers, propagate in before:
        each.setLevel(level)
        each.handlers, each.propagate = handlers, propagate


@pytest.fixture
def request_id() -> Iterator[str]:
    token = REQUEST_ID.set("req-1")
    yield "req-1"
    REQUEST_ID.reset(token)


def test_text_has_the_id_once(lines: Callable[[], list[str]], request_id: str) -> None:
    configure_logging(Settings())
    logger.info("something happened")
    logger.info("request %s: it says so itself", request_id)
    logger.info("for another", extra={"request_id": "req-2"})
    logger.debug("not at this level")
    logging.getLogger("magcache_core.choice").info("of the method")
    assert [line.split(" INFO ")[1] for line in lines()] == [
        "app.tests request req-1: something happened",
        "app.tests request req-1: it says so itself",
        "app.tests request req-2: for another",
        "magcache_core.choice request req-1: of the method",
    ]


def test_lines_of_no_request(lines: Callable[[], list[str]]) -> None:
    configure_logging(Settings())
    logger.warning("the group is rebuilt")
    configure_logging(Settings(log_format="json"))
    logger.warning("the group is rebuilt")
    text, line = lines()
    assert text.endswith("WARNING app.tests the group is rebuilt")
    assert "request_id" not in json.loads(line)


def test_json_is_one_object_a_line(lines: Callable[[], list[str]], request_id: str) -> None:
    configure_logging(Settings(log_format="json"))
    logger.info("two\nlines, %r", "größer")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logger.exception("it failed")
    first, second = (json.loads(line) for line in lines())
    moment: Any = datetime.fromisoformat(first.pop("time"))
    assert moment.utcoffset().total_seconds() == 0
    assert first == {
        "level": "INFO", "logger": "app.tests", "message": "two\nlines, 'größer'", "request_id": request_id
    }  # fmt: skip
    assert second["level"] == "ERROR"
    assert second["exception"].endswith("RuntimeError: broken")
