"""Errors cross processes whole."""

from __future__ import annotations

import pickle

import pytest

from app.errors import (
    BusyError,
    DeadlineImpossibleError,
    GenerationError,
    InvalidRequestError,
    RequestCancelledError,
    ServiceError,
    UnavailableError,
)


@pytest.mark.parametrize(
    "error",
    [
        BusyError(2.5),
        UnavailableError("starting"),
        GenerationError("decoder"),
        InvalidRequestError("bad", param="n", code="c", status=422, headers={"A": "b"}),
        DeadlineImpossibleError("too soon", soonest_s=1.5),
        RequestCancelledError("ended"),
    ],
)
def test_errors_survive_pickling(error: ServiceError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.envelope, copy.status, copy.headers, str(copy)) == (
        error.envelope, error.status, error.headers, str(error)
    )  # fmt: skip
