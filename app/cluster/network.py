"""Which of a node's interfaces the ranks' collectives use: the one by which Ray's other nodes reach this one."""

import os

import psutil

VARIABLES = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "="}
"""Each with what stands before a name that is meant exactly: NCCL takes a bare one as a prefix, ``eth1`` for
``eth10``."""


def interface_of(address: str) -> str | None:
    """The name of the interface with the IP ``address``, or None if this host has no such address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return name
    return None


def use_interface_of(address: str) -> None:
    """Make gloo and NCCL meet on the interface with the IP ``address``; what the environment names already stays.

    Gloo takes the address that the host's name resolves to, which is 127.0.0.1 or 127.0.1.1 on many hosts: ranks on two
    nodes would each listen where the other cannot come. NCCL takes the first interface that looks right.
    """
    name = interface_of(address)
    if name is not None:
        for variable, exactly in VARIABLES.items():
            os.environ.setdefault(variable, exactly + name)
