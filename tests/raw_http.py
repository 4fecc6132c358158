"""One HTTP request as the bytes that it is, for what no client library would send."""

from __future__ import annotations

import socket
from http.client import HTTPResponse


def post(address: tuple[str, int], path: str, body: bytes, *headers: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers with lower-case names, and body of the reply to a JSON body with further ``headers``."""
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: service", b"Content-Type: application/json"]
    lines += [b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        reply = HTTPResponse(connection, method="POST")
        reply.begin()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
