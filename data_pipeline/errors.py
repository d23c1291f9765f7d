"""The one exception class for mistakes a user can repair: wrong data, wrong path, wrong recipe value."""

from __future__ import annotations


class DataError(ValueError):
    """What is wrong, where (path or key) and what to do, in one message.

    The command line prints it without a traceback and leaves with :attr:`exit_status`.
    """

    exit_status = 2
