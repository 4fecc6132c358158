"""Failures inside a tensor-parallel group."""


class GroupFailedError(RuntimeError):
    """The coordinator or a rank of a group failed; its pictures under way have to be made again by a new group."""


class HistoryMismatchError(GroupFailedError):
    """A rank had another history of plans than the coordinator."""
