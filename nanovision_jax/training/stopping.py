"""Signals: a run that is told to stop saves and leaves, whatever it is doing. It begins before jax is loaded.

A first SIGTERM, SIGINT, SIGHUP or SIGUSR1 (Slurm's warning) is remembered for the loop, which saves after its step.
Where there is nothing to save yet, the process leaves at once. A second one of any kind leaves at once, saving nothing.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from nanovision_jax.errors import GO_ON, INTERRUPTED, leave

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
WAKE = signal.SIGURG  # means nothing to us, and interrupts what the main thread waits for
GRACE = 2.0  # seconds that Python gets to hear a signal: within a compilation it hears none


class _Heard(BaseException):
    """A signal ends what runs inside StopOnSignal.interruptible()."""


class Unfinished(SystemExit):
    """A signal came in the middle of something: behind what is to be cleaned up, the process ends with leave()."""


class StopOnSignal:
    """A context in which signals are heard: `signal` is the number of the one that came, or None.

    What the process was started to ignore, as nohup has it ignore SIGHUP, stays ignored. Outside of a process's main
    thread, where Python lets nobody listen, this does nothing.
    """

    def __init__(self):
        self.signal, self._heard, self._before = None, None, {}
        self._cleans = self._saves = self._interrupts = self._agrees = False
        self._noticed = threading.Event()

    def __enter__(self):
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        if heard and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in heard}
            self._waking = signal.signal(WAKE, lambda *_: None)
            self._ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._theirs, self._fd = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, daemon=True, name='signals').start()
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.signal(WAKE, self._waking)
            signal.set_wakeup_fd(self._fd)
            self._theirs.close()  # which ends the watcher
            self._before = {}

    def clean_first(self):
        """From here on what is being made is cleaned up; within imports there is nothing, and exceptions crash some."""
        self._cleans = True

    def save_first(self, agrees: bool = False):
        """From here on there is a state to save: a first signal is remembered for the loop.

        agrees: of several hosts, which stop after the same step; a signal counts once agree() was called.
        """
        self._saves, self._agrees = True, agrees

    def agree(self, gather: Callable):
        """Lets a signal count that any host has heard. gather: gives what every host tells, as hosts.gather does."""
        if self._agrees and self.signal is None:
            self.signal = next((number for number in gather(self._heard) if number), None)

    @contextlib.contextmanager
    def interruptible(self):
        """What runs within it, and changes no state, ends when a signal comes; what is behind it goes on.

        A signal that came before does not end it: look at `signal` within.
        """
        self._interrupts = True
        try:
            yield
        except _Heard:
            pass
        finally:
            self._interrupts = False

    @property
    def code(self) -> int:
        """The exit code of a process that was told to stop."""
        return INTERRUPTED if self.signal == signal.SIGINT else GO_ON

    def _hear(self, number, _):
        self._noticed.set()
        if self._heard is not None:
            self._leave(number)
        self._heard = number
        self.signal = None if self._agrees else number
        if self._interrupts:
            raise _Heard
        if not self._saves:
            _say(f'stopped by signal {number} before the first step; the same command goes on')
            if not self._cleans:
                leave(self.code)
            raise Unfinished(self.code)

    def _watch(self):
        """Hears signals in a thread of its own: Python's main thread hears none while it compiles."""
        with self._ours:
            count = 0
            while byte := self._ours.recv(1):
                if byte[0] in self._before:
                    count += 1
                    noticed = count == 1 and self._noticed.wait(GRACE)
                    if count > 1 or not (noticed or self._saves):
                        self._leave(byte[0])
                    if not noticed:  # it came to another thread, and the main one waits for something
                        signal.pthread_kill(threading.main_thread().ident, WAKE)

    def _leave(self, number):
        """Ends the process, and its workers with it."""
        self.signal = number
        _say(f'stopped by signal {number} at once; the same command goes on from the last checkpoint')
        leave(self.code)


def _say(text):
    # Not print(): the signal may have come within one, which then may not be called again.
    os.write(sys.__stderr__.fileno(), f'{text}\n'.encode())
