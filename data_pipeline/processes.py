"""Helper processes must not outlive the process that started them, even when that one is killed."""

from __future__ import annotations

import os
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
