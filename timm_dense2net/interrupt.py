"""Signals that ask a run to end, heeded between two of its steps."""
from __future__ import annotations

import signal
from threading import current_thread, main_thread

__all__ = ['Interrupted', 'StopSignal']


class Interrupted(Exception):
    """A signal asked the run to end.

    Args:
        signum: The signal's number; by custom the process then exits with 128 + signum.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignal:
    """Notes SIGTERM and SIGINT so that the loop can end between two steps. A second SIGINT acts at once.

    It can be entered again within itself, by a loop of runs and by each of them. Signals are the main thread's: in
    another one it notes nothing.
    """

    def __init__(self):
        self.signum = 0
        self._previous = []

    def __enter__(self) -> StopSignal:
        signums = (signal.SIGTERM, signal.SIGINT) if current_thread() is main_thread() else ()
        self._previous.append({signum: signal.signal(signum, self._note) for signum in signums})
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous.pop().items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _frame) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
