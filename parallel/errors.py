"""Errors of the parallel room that are the user's to mend.

All classes carry ``exit_status = 2``: the command line prints their message after ``hsa: error:`` and leaves without a
traceback. Faults of the machine (a full disk, a dead rank) are ordinary exceptions and count as crashes.
"""

from __future__ import annotations


class TopologyError(ValueError):
    """The parallel sizes cannot be laid out on this many ranks or on this model."""

    exit_status = 2


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    exit_status = 2


class OptionalPartError(ValueError):
    """A recipe requires an optional package, or a part of one, that is not usable here."""

    exit_status = 2
