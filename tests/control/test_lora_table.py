"""Which adapters the ranks hold, and which leave for others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.control.lora_table import LoraMoves, LoraTable
from app.messages.loras import LoraUse


def use(name: str, nbytes: int = 10, digest: str = "d") -> LoraUse:
    return LoraUse(name, 1.0, digest, nbytes)


def contents(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, "d") for name in names)


def test_an_adapter_is_loaded_once_and_stays() -> None:
    table = LoraTable(30)
    assert table.hold([use("a"), use("b")]) == LoraMoves((), contents("a", "b"))
    table.release([use("a"), use("b")])
    assert table.hold([use("a")]) == LoraMoves((), ())
    assert table.nbytes == 20


def test_the_least_recently_used_leave_first_and_no_more_than_needed() -> None:
    table = LoraTable(30)
    for name in "abca":  # a is used again
        table.hold([use(name)])
        table.release([use(name)])
    assert table.hold([use("d")]) == LoraMoves(contents("b"), contents("d"))
    table.release([use("d")])
    assert table.hold([use("e", 20)]) == LoraMoves(contents("c", "a"), contents("e"))


def test_those_in_use_stay_and_others_wait_for_them() -> None:
    table = LoraTable(30)
    table.hold([use("a", 20)])
    table.hold([use("b")])
    table.release([use("b")])
    assert not table.has_room([use("c", 20)])
    assert table.has_room([use("c")])
    assert table.hold([use("c")]) == LoraMoves(contents("b"), contents("c"))
    table.release([use("a", 20)])
    assert table.has_room([use("d", 20)])


def test_one_that_several_use_is_in_use_until_the_last_has_ended() -> None:
    table = LoraTable(20)
    table.hold([use("a", 20)])
    table.hold([use("a", 20)])
    table.release([use("a", 20)])
    assert not table.has_room([use("b")])
    table.release([use("a", 20)])
    assert table.has_room([use("b")])


def test_a_file_replaced_under_its_name_is_another_adapter() -> None:
    table = LoraTable(100)
    table.hold([use("a", digest="old")])
    assert table.hold([use("a", digest="new")]) == LoraMoves((), (("a", "new"),))
    assert table.nbytes == 20


def test_one_that_could_not_be_loaded_is_loaded_again() -> None:
    table = LoraTable(20)
    table.hold([use("a")])
    table.forget(("a", "d"))
    assert table.nbytes == 0
    assert table.hold([use("a")]) == LoraMoves((), contents("a"))
    table.release([use("a")])  # of the first, which failed
    assert not table.has_room([use("b", 20)])


@given(st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcdef"), min_size=1, max_size=3, unique=True))))
def test_memory_is_bounded_and_ranks_that_follow_hold_what_is_in_use(events: list[tuple[bool, list[str]]]) -> None:
    sizes = dict(zip("abcdef", (1, 2, 3, 5, 8, 9), strict=True))
    table, on_ranks, images = LoraTable(12), set[tuple[str, str]](), list[list[LoraUse]]()
    for arrives, names in events:
        uses = [use(name, sizes[name]) for name in names]
        if arrives and table.has_room(uses):
            moves = table.hold(uses)
            assert set(moves.drop) <= on_ranks
            on_ranks -= set(moves.drop)
            assert not on_ranks & set(moves.load)
            on_ranks |= set(moves.load)
            images.append(uses)
        elif images and not arrives:
            table.release(images.pop(0))
        assert {one.content for image in images for one in image} <= on_ranks
        assert sum(sizes[name] for name, _ in on_ranks) == table.nbytes <= 12
