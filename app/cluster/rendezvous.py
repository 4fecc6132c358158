"""Where the ranks of a group meet: a store that they reach over the network."""

import socket
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]


class Rendezvous:
    """The server of the store; it asks for no password, so it listens on one address, and only until `close`."""

    def __init__(self, host: str) -> None:
        """Open it on ``host``, an address of this node, at a free port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.address: tuple[str, int] = (host, listener.getsockname()[1])
        self._server: Store | None = TCPStore(
            *self.address, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def close(self) -> None:
        """Listen no longer; what the ranks have built needs the store no more."""
        self._server = None


def rendezvous_store(address: tuple[str, int], timeout_s: float) -> Store:
    """A rank's own connection to the `Rendezvous` at ``address``; calls on it end after ``timeout_s``."""
    return TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout_s))
