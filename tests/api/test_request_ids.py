"""Which ids of clients are safe to log and to send back."""

from __future__ import annotations

import pytest

from app.api.request_ids import sane_request_id


@pytest.mark.parametrize("given", ["abc-123", "a.b:c_d", "x" * 128])
def test_a_sane_one_is_kept(given: str) -> None:
    assert sane_request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "a b", "a\n", "x" * 129, "é", "a/b", '"'])
def test_another_one_is_replaced_by_a_new_one_each_time(given: str | None) -> None:
    first, second = sane_request_id(given), sane_request_id(given)
    assert len(first) == len(second) == 32
    assert first != second != given
