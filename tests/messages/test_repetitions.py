"""A request and its repetition name the same images."""

from __future__ import annotations

from dataclasses import replace

from app.messages.repetitions import Sharing


def test_images_are_named_after_the_first_request_and_their_number() -> None:
    first = Sharing("token", "body", 7, 1.0, "process-a", keyed=True)
    again = replace(first, process="process-b", made_s=2.0)
    assert [first.image(index) for index in (0, 1)] == [again.image(index) for index in (0, 1)]
    assert len({first.image(0), first.image(1), replace(first, token="other").image(0)}) == 3
