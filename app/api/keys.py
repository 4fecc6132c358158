"""API keys from a file: compared in constant time, read again when the file changes, and kept as digests only."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from app.errors import UnauthorizedError

logger = logging.getLogger(__name__)


class ApiKeys:
    """The keys of a file with one ``NAME KEY`` a line; empty lines and those that begin with ``#`` are skipped."""

    def __init__(self, path: str) -> None:
        """Read the file ``path``.

        Raises:
            ValueError: the file cannot be read, holds no key, or has a line of another form.
        """
        self._path = Path(path)
        self._seen = self._state()
        self._names = _read(self._path)

    def name_of(self, authorization: str | None) -> str:
        """The name of the key in an Authorization header.

        Raises:
            UnauthorizedError: there is no key, or one that the file does not have.
        """
        self._read_again()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise UnauthorizedError("an API key is needed: send the header Authorization: Bearer KEY")
        given, name = _digest(key.strip()), None
        for digest, known in self._names.items():  # all of them, so that the time tells nothing of the matching one
            if hmac.compare_digest(digest, given):
                name = known
        if name is None:
            raise UnauthorizedError("this API key is not known here")
        return name

    def _read_again(self) -> None:
        state = self._state()
        if state == self._seen:
            return
        self._seen = state
        try:
            self._names = _read(self._path)
        except ValueError as error:
            logger.error("%s; the keys that were read before stay valid", error)
        else:
            logger.info("%d API key(s) read from %s", len(self._names), self._path)

    def _state(self) -> tuple[int, int, int] | None:
        try:
            stat = os.stat(self._path)  # of what a link leads to: Kubernetes changes a mounted secret by its links
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(path: Path) -> Mapping[bytes, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ValueError(f"http.api_keys_file {str(path)!r} cannot be read: {reason}") from error
    names: dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # The line itself may hold a key and is not shown.
        if len(words) != 2 or not words[0].isprintable():
            raise ValueError(f"http.api_keys_file {str(path)!r}: line {number} is not a name, a space and a key")
        digest = _digest(words[1])
        if digest in names:
            raise ValueError(f"http.api_keys_file {str(path)!r}: the key of line {number} is there twice")
        names[digest] = words[0]
    if not names:
        raise ValueError(f"http.api_keys_file {str(path)!r} holds no key")
    return names


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
