"""What helper processes do first: not outlive the process that started them, and open as many files as they may."""

from __future__ import annotations

import os
import resource
import threading
import time


def exit_with_parent(parent: int) -> None:
    """Watch the parent process from a thread and leave when it is gone; ``parent`` is its id as it gave it.

    The pipes alone do not tell: sibling processes keep their ends open.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def allow_open_files() -> None:
    """Raise this process's limit of open files as far as it can do so itself. Only for processes of our own: others
    may use ``select``, which knows 1,024 files."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
