"""Stop requests: Ctrl-C, SIGTERM (scancel, node drain) and SIGUSR1 (Slurm, ahead of the time limit)."""

from __future__ import annotations

import signal
from types import FrameType

STOPPED = 75  # EX_TEMPFAIL, the exit status of what stopped cleanly and wants to be started again


class StopRequest:
    """Turns the first signal into a wish that the loop grants after the step going on; a second Ctrl-C stops at once.

    The handlers stay installed until `close`, also after training: a late SIGUSR1 must not kill the process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def close(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
