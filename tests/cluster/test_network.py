"""Ranks meet on the interface that has the node's address."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from app.cluster.network import VARIABLES, interface_of, use_interface_of

# The loopback interface is the one that every host has; its name differs between systems.
LOOPBACK = next(
    name
    for name, addresses in psutil.net_if_addrs().items()
    if any((each.family, each.address) == (socket.AF_INET, "127.0.0.1") for each in addresses)
)


def test_an_address_names_its_interface() -> None:
    assert interface_of("127.0.0.1") == LOOPBACK
    assert interface_of("203.0.113.1") is None, "an address for documentation, which no host has"


def test_collectives_use_it_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo, nccl = VARIABLES
    monkeypatch.setenv(gloo, "eth7")
    monkeypatch.setenv(nccl, "to be restored")
    monkeypatch.delenv(nccl)
    use_interface_of("127.0.0.1")
    assert {gloo: "eth7", nccl: f"={LOOPBACK}"} == {name: os.environ[name] for name in VARIABLES}


def test_an_address_that_is_not_here_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    use_interface_of("203.0.113.1")
    assert not {name for name in VARIABLES if name in os.environ}
