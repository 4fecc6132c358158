"""What a file is that is not what its name says: a Git LFS pointer, a web page, another program's weights."""

from __future__ import annotations

from pathlib import Path

SAFETENSORS_ONLY = "only safetensors are read: use the model's safetensors weights"
_PICKLE = f"is a pickle, which can run code when it is opened and is refused; {SAFETENSORS_ONLY}, or convert it"
_PAGE = (
    "is a web page and not the file: download it from the address that has /resolve/ where the page's has /blob/, "
    "with a token if the model is gated"
)
_HEADS = (
    (b"version https://git-lfs.github.com/spec/", "is a Git LFS pointer and not the file: run `git lfs pull`"),
    (b"version https://hawser.github.com/spec/", "is a Git LFS pointer and not the file: run `git lfs pull`"),
    (b"<!doctype html", _PAGE),
    (b"<html", _PAGE),
    (b"<?xml", _PAGE),
    (b"gguf", f"is a GGUF file; {SAFETENSORS_ONLY}"),
    (b"pk\x03\x04", _PICKLE),  # torch's own format is a zip with a pickle
    *((bytes((0x80, protocol)), _PICKLE) for protocol in range(2, 6)),
    (b"\x1f\x8b", "is compressed (gzip): unpack it"),
)
_ANSWERS = (b"access to ", b"invalid ", b"entry not found", b"repository not found", b"unauthorized", b'{"error"')
"""How a hub's refusals begin, which a download that does not look at the status saves as the file."""


def foreign(path: Path) -> str | None:
    """What ``path`` is and what to do, to be read after its name; None when nothing of this list is seen.

    Neither the rest of the file nor its name is looked at: for JSON and safetensors alike.
    """
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which is not there: copy the files that the links name (`cp -rL`)"
    if path.is_dir():
        return "is a folder and not a file"
    if not path.exists():
        return None
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        return "is empty: download it again"
    start = head.lstrip().lower()
    for magic, what in _HEADS:
        if start.startswith(magic):
            return what
    if start.startswith(_ANSWERS):
        answer = head.decode(errors="replace").strip().splitlines()[0][:80]
        return f"is a server's refusal ({answer!r}): download it again, with a token if the model is gated"
    return None
