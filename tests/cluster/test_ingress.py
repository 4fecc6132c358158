"""The ingress warns of a service that any machine can reach and that wants no keys."""

from __future__ import annotations

import pytest

from app.cluster.ingress import warn_of_strangers


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_this_machine_alone_there_is_nothing_to_say(host: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_strangers(host)
    assert caplog.records == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-1.example", ""])
def test_elsewhere_it_warns_once(host: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_strangers(host)
    (record,) = caplog.records
    assert (record.levelname, "http.api_keys_file" in record.getMessage()) == ("WARNING", True)
