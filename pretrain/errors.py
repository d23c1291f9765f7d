"""Errors of this room that are the user's to mend.

Both classes carry ``exit_status = 2``: the command line prints ``hsa: error: <message>`` without a traceback and leaves
with that status. A message says what is wrong, where (path or key), and what to do.
"""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe, or an override of it, that can't be trained: unknown key, impossible value, values that clash."""

    exit_status = 2


class RunDirError(ValueError):
    """A run directory that can't be used: unwritable, foreign, busy, damaged, or of another recipe."""

    exit_status = 2
