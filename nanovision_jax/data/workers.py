"""Calling a function in processes of their own, which know nothing of the program that started them.

multiprocessing is not for this: a forked process hangs where jax or tokenizers have threads, and a spawned one runs the
caller's main program again, which a script without `if __name__ == '__main__'` does not survive.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

from nanovision_jax.errors import UserError


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def ignore_signals(*_):
    """In a worker: a signal to a whole group of processes is for the one that started it to answer.

    SIGTERM is not among them: it is how workers are ended.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class WorkerDied(UserError):
    """A process of Workers ended before it was told to, as one that has no memory left does."""


class Workers(concurrent.futures.ThreadPoolExecutor):
    """`count` processes that call `function`: submit(workers.call, item) gives function(item), or raises what it does.

    function, its items and its results are pickled, and must be of a module that can be imported. On exit of the with
    block the processes are ended, whatever they are at; they end by themselves where their parent is gone. Raises
    WorkerDied for a process that ended before that.
    """

    def __init__(self, function: Callable, count: int):
        super().__init__(count)  # a thread waits for each
        self._free, self._all = queue.SimpleQueue(), []
        environment = os.environ | {'PYTHONPATH': os.pathsep.join(path or os.getcwd() for path in sys.path)}
        # -P: what lies in the current folder is not imported instead, unless it is on the path here too.
        program = [sys.executable, '-P', '-c', 'from nanovision_jax.data import workers; workers.work()']
        pickled = pickle.dumps(function)
        for _ in range(count):
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._all.append(subprocess.Popen(program, env=environment, **pipes))
        for process in self._all:
            _write(process.stdin, pickled)
            self._free.put(process)

    def __exit__(self, *error):
        for process in self._all:
            process.kill()
        self.shutdown(wait=False, cancel_futures=True)
        try:
            return super().__exit__(*error)
        finally:
            for process in self._all:
                process.wait()
                process.stdout.close()
                with contextlib.suppress(BrokenPipeError):  # what it never read is in there
                    process.stdin.close()

    def call(self, item):
        """function(item), in a process that is free: as many threads may ask at once as there are processes."""
        process = self._free.get()
        try:
            _write(process.stdin, pickle.dumps(item))
            result, error = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as cut:
            raise WorkerDied(
                f'one of {len(self._all)} processes that read the data ended early, with code '
                f'{process.wait()}: what it said stands above; -9 is mostly want of memory.'
            ) from cut
        finally:
            self._free.put(process)
        if error:
            raise error
        return result


def ordered_map(pool, function, items, ahead):
    """map() over a pool, results in order, with at most `ahead` items taken before their results are wanted."""
    items = iter(items)
    waiting = collections.deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    while waiting:
        done = waiting.popleft().result()
        for item in itertools.islice(items, 1):
            waiting.append(pool.submit(function, item))
        yield done


class ReadAhead:
    """Yields function(item) of each item, in order, as `count` processes make it, three items ahead for each.

    close() ends them, also while another thread waits for the next.
    """

    def __init__(self, function, items, count):
        self._pool = Workers(function, count)
        self._results = ordered_map(self._pool, self._pool.call, items, 3 * count)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._results)

    def close(self):
        """Ends the processes."""
        self._pool.__exit__(None, None, None)


def work():
    """What a process of Workers does, until its input ends."""
    ignore_signals()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # these end with their input, whatever becomes of their parent
    given, answers = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    os.dup2(2, 1)  # what others print must not get between the answers
    sys.stdout = sys.stderr
    function = pickle.load(given)
    while True:
        try:
            item = pickle.load(given)
        except EOFError:
            return
        try:
            answer = pickle.dumps((function(item), None))
        except Exception as error:
            answer = _pickled(error)
        try:
            _write(answers, answer)
        except BrokenPipeError:  # nobody is there to read it
            os._exit(0)  # Python's own end would write it once more


def _pickled(error):
    error.add_note(traceback.format_exc())
    try:
        answer = pickle.dumps((None, error))
        pickle.loads(answer)  # not every exception that can be written can be read
        return answer
    except Exception:
        return pickle.dumps((None, RuntimeError(traceback.format_exc())))


def _write(pipe, data):
    pipe.write(data)
    pipe.flush()
