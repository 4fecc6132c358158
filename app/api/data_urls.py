"""Files that a request carries as text: data URLs and base64. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

from app.errors import InvalidRequestError

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]{0,31}):")
_HOW = "send the file itself in a form, or a data URL (data:image/png;base64,…)"


def check_is_carried(text: str, param: str) -> None:
    """Refuse text that says where a file is instead of holding it.

    Raises:
        InvalidRequestError: the text is a URL of another kind than ``data:``.
    """
    scheme = _SCHEME.match(text)
    if scheme is not None and scheme[1].lower() != "data":
        raise InvalidRequestError(
            f"{param} is a URL ({scheme[1].lower()}:), and this service fetches nothing: {_HOW}", param=param
        )


def decode_file(text: str, param: str) -> bytes:
    """The file in a data URL or in bare base64, of either alphabet, with line breaks or not, padded or not.

    Raises:
        InvalidRequestError: the text is neither.
    """
    check_is_carried(text, param)
    head, comma, payload = text.partition(",") if _SCHEME.match(text) else ("", ",", text)
    if not comma:
        raise InvalidRequestError(f"{param} is a data URL without a comma, and so without data: {_HOW}", param=param)
    if head and not head.rstrip().lower().endswith("base64"):
        return unquote_to_bytes(payload)
    if "%" in payload:
        payload = unquote_to_bytes(payload).decode("latin-1")
    plain = "".join(payload.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{param} is neither a data URL nor base64: {_HOW}", param=param) from error
