"""The store where ranks meet listens on the node's address alone, and no longer than it is needed."""

from __future__ import annotations

import socket

import psutil
import pytest
import torch
import torch.multiprocessing as multiprocessing

from app.cluster.rendezvous import Rendezvous, rendezvous_store
from app.engine.process_groups import join
from tests.ranks import START_METHOD


def _listeners() -> set[tuple[str, int]]:
    return {tuple(each.laddr) for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_LISTEN}


def test_it_listens_on_one_address_until_it_is_closed() -> None:
    before = _listeners()
    rendezvous = Rendezvous("127.0.0.1")
    assert _listeners() - before == {rendezvous.address}
    store = rendezvous_store(rendezvous.address, 10.0)
    store.set("key", "value")
    assert rendezvous_store(rendezvous.address, 10.0).get("key") == b"value"
    rendezvous.close()
    assert _listeners() == before
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(rendezvous.address).close()


def _sum_after_the_rendezvous(rank: int, address: tuple[str, int], met: multiprocessing.Barrier) -> None:
    store = rendezvous_store(address, 60.0)
    group = join(rank, (2, 1, 1), store, torch.device("cpu")).tensor
    group.sum(torch.ones(3))
    met.wait(60)
    met.wait(60)  # it is closed
    for size in (3, 1 << 20):
        assert group.sum(torch.full((size,), rank + 1.0)).unique().tolist() == [3.0]


def test_collectives_go_on_without_it() -> None:
    context = multiprocessing.get_context(START_METHOD)
    met = context.Barrier(3)
    rendezvous = Rendezvous("127.0.0.1")
    ranks = [context.Process(target=_sum_after_the_rendezvous, args=(rank, rendezvous.address, met)) for rank in (0, 1)]
    for each in ranks:
        each.start()
    met.wait(60)
    rendezvous.close()
    met.wait(60)
    for each in ranks:
        each.join(60)
        assert each.exitcode == 0
