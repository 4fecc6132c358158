"""The playground: a page at `/` for browsers, and the files that it loads. All of it is read when the module is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import Response

from app.api.accept import prefers_html

router = APIRouter()

_FOLDER = Path(__file__).parents[1] / "page"
_INDEX = "index.html"
_TYPES = {_INDEX: "text/html", "style.css": "text/css", "playground.js": "text/javascript"}
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class PageFile:
    """One file of the page, and the headers that it is sent with."""

    content: bytes
    headers: dict[str, str]


def _read(name: str, media_type: str) -> PageFile:
    content = (_FOLDER / name).read_bytes()
    headers = {
        "Content-Type": f"{media_type}; charset=utf-8",
        "Content-Security-Policy": _CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        # Asked for each time and sent again only when it changed: after an upgrade no old script meets a new page.
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.blake2b(content, digest_size=12).hexdigest()}"',
    }
    return PageFile(content, headers | ({"Vary": "Accept"} if name == _INDEX else {}))


_FILES = {name: _read(name, media_type) for name, media_type in _TYPES.items()}
_PATHS = {f"/page/{name}" for name in _FILES if name != _INDEX}


def is_page(path: str, headers: Headers) -> bool:
    """Whether a request is for the page or one of its files, which hold nothing that needs an API key."""
    return path in _PATHS or (path == "/" and prefers_html(headers.get("accept", "")))


def page_response(request: Request, name: str = _INDEX) -> Response:
    """A file of the page; without content where the browser has it already."""
    file = _FILES[name]
    if file.headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=file.headers)
    return Response(file.content, headers=file.headers)


@router.get("/page/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """The page's style or its script."""
    if f"/page/{name}" not in _PATHS:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return page_response(request, name)
