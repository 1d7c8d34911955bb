"""The one place that knows about processes: how several hosts become one program, and which of them does what.

Each host runs the same command and has its own devices; jax sees those of all. Rows are read by the host whose devices
need them; files are written by the first host. Beside jax's own coordination there is a channel between the hosts, on
the port behind the coordinator's: over it they tell each other what is not on a device, and notice within seconds that
one of them has ended, where jax's collectives wait for a minute or for ever.
"""

import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from nanovision_jax.errors import FAILURE, GO_ON, UserError, leave

AUTO = 'auto'  # the coordinator that is for jax to find
BEAT, LOST = 5, 45  # seconds: between signs of life, and without one until a host is taken for lost
PATIENCE = 15  # seconds that a host gets to end by itself, once another one has told of a mistake
STARTING = 300  # seconds that the others get to come


class Cluster(NamedTuple):
    """Where a host stands: host `index` of `count`, which all know the first by its `coordinator` HOST:PORT.

    local: which of this machine's devices it has, where several processes share one; None: all.
    """

    coordinator: str
    count: int
    index: int
    local: list[int] | None = None


def find(coordinator: str = '', processes: int = 0, process: int = -1, environment=os.environ) -> Cluster | None:
    """The Cluster that flags or the environment tell of: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    then Slurm's and Open MPI's. None where there is one process. coordinator: or auto, see _found(). Raises UserError
    where a part of it is missing.
    """
    if coordinator == AUTO:
        return Cluster(AUTO, 0, -1)
    told = environment.get
    coordinator = coordinator or told('JAX_COORDINATOR_ADDRESS', '')

    def number(name, otherwise=0):
        if not re.fullmatch(r'-?\d+', text := told(name, str(otherwise))):
            raise UserError(f'{name} is {text!r} in the environment, and must be a number.')
        return int(text)

    processes = processes or number('JAX_NUM_PROCESSES')
    process = process if process >= 0 else number('JAX_PROCESS_ID', -1)
    local = None
    if number('SLURM_STEP_NUM_TASKS') > 1:
        processes, process = processes or number('SLURM_STEP_NUM_TASKS'), max(process, number('SLURM_PROCID'))
        coordinator = coordinator or f'{first_node(told("SLURM_STEP_NODELIST"))}:{_port(told("SLURM_JOB_ID"))}'
        local = _alone(told('SLURM_STEP_TASKS_PER_NODE', '1'), told('SLURM_LOCALID', '0'))
    elif number('OMPI_COMM_WORLD_SIZE') > 1:
        processes, process = (
            processes or number('OMPI_COMM_WORLD_SIZE'),
            max(process, number('OMPI_COMM_WORLD_RANK')),
        )
        if not coordinator and (uri := re.search(r'tcp://([^,:;]+)', told('OMPI_MCA_orte_hnp_uri', ''))):
            coordinator = f'{uri[1]}:{_port(told("OMPI_MCA_ess_base_jobid", "0"))}'
        local = _alone(told('OMPI_COMM_WORLD_LOCAL_SIZE', '1'), told('OMPI_COMM_WORLD_LOCAL_RANK', '0'))
    if not coordinator and processes <= 1:
        return None
    if not (re.fullmatch(r'\S+:\d+', coordinator) and processes > 0 and 0 <= process < processes):
        raise UserError(
            f'several processes need --coordinator=HOST:PORT of the first (it is {coordinator!r}), --processes '
            f'({processes or "not given"}) and --process from 0 on ({process if process >= 0 else "not given"}), or '
            'JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.'
        )
    return Cluster(coordinator, processes, process, local)


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes, as in 'gpu[007-009,012],login' → 'gpu007'."""
    name, number = re.match(r'([^,\[]+)(?:\[(\d+))?', nodes).groups()
    return name + (number or '')


def _port(job):
    return 61440 + int(re.sub(r'\D', '', job) or 0) % 2000 * 2  # the channel has the one behind it


def _alone(tasks, index):
    """None where there is one process a machine, else the one device of the process."""
    return None if re.match(r'1(\D|$)', tasks) else [int(index)]


class NotTogether(UserError):
    """The hosts of a cluster did not come together; the same command may do better a second time."""

    code = GO_ON


# Together ------------------------------------------------------------------------------------------------------------

_channel = None  # to the other hosts, where there are some
_on_abort = None  # see _answer_aborts()


@contextlib.contextmanager
def joined(cluster: Cluster | None):
    """A context in which the hosts of a cluster are one program. It comes before anything touches a device.

    A host that cannot go on says why, and all end with its code. Where one is lost, killed say, the others end with 75:
    the same command goes on.
    """
    global _channel
    if cluster is None or cluster.count == 1:  # AUTO has none yet
        yield
        return
    jax.config.update('jax_enable_preemption_service', False)  # which would take our signals
    times = dict(initialization_timeout=STARTING, heartbeat_timeout_seconds=60)
    try:
        if cluster.coordinator == AUTO:
            cluster = _found(times)
        else:
            jax.distributed.initialize(*cluster[:3], cluster.local, 'deactivate', **times)
    except Exception as error:
        raise NotTogether(
            f'host {cluster.index} of {cluster.count} did not come together with the others at {cluster.coordinator}: '
            f'{(str(error).splitlines() or [type(error).__name__])[0][:200]}'
        ) from error
    _channel = Channel(cluster)
    _answer_aborts()
    if cluster.index:
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115 - the first tells what all do
    try:
        yield
        part()
    except AllFailed as error:
        part()
        print(f'error: {error}', file=sys.stderr)
        leave(error.code)
    except UserError as error:
        _channel.fail(cluster.index, error.code, str(error))
        raise
    except jax.errors.JaxRuntimeError:
        time.sleep(PATIENCE + 2 * BEAT)  # it may be that another host is gone: then the channel ends this one
        raise
    except Exception:
        traceback.print_exc()
        _channel.fail(cluster.index, FAILURE, 'it failed, as its log tells')
        raise
    finally:
        _channel = None


def _answer_aborts():
    """Where another host is gone, the libraries below jax (gloo, its coordination) may abort before we have left."""
    global _on_abort  # which must live as long as it may be called

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def gone(_):
        os.write(2, b'error: the runtime has aborted, as it does where another host is gone\n')
        os._exit(GO_ON)

    _on_abort = gone
    ctypes.CDLL(None).signal(signal.SIGABRT, gone)


def _found(times):
    """The Cluster that jax finds by itself, from the metadata of a TPU pod or of Kubernetes, and joins."""
    jax.distributed.initialize(**times)
    mine = np.frombuffer(own_address().encode().ljust(64, b'\0'), np.uint8)
    first = multihost_utils.broadcast_one_to_all(mine)
    coordinator = f'{bytes(first).decode().rstrip(chr(0))}:{_port("0")}'
    return Cluster(coordinator, jax.process_count(), jax.process_index())


def own_address() -> str:
    """The address by which other machines reach this one: that of its name, unless its name means itself (Debian)."""
    named = socket.gethostbyname(socket.gethostname())
    if named.startswith('127.'):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            out.connect(('192.0.2.1', 9))  # sends nothing: it only finds the way out
            return out.getsockname()[0]
    return named


class Channel:
    """Messages between all hosts, in an order that is the same for all."""

    def __init__(self, cluster: Cluster):
        self.cluster, self._ended, self._told = cluster, False, False
        self._asked, self._answers = 0, {}  # number of the question: queue of what every host said
        self._heard, self._lock = {}, threading.Lock()  # of the first: {number: {host: value}}
        self._failing = threading.Lock()
        host, port = cluster.coordinator.rsplit(':', 1)
        address = (host.strip('[]'), int(port) + 1)
        self._links, self._said = self._listen(address) if cluster.index == 0 else self._connect(address)
        self._readers = [
            threading.Thread(target=self._read, args=(index, lines), daemon=True, name=f'host {index}')
            for index, lines in self._said.items()
        ]
        for reader in self._readers:
            reader.start()
        threading.Thread(target=self._beat, daemon=True, name='hosts').start()

    def _listen(self, address):
        links, said = {}, {}
        # The first may know itself by another address than the others do: many a machine calls itself 127.0.1.1.
        here = address[0] if re.match(r'127\.|localhost$|::1$', address[0]) else ''
        six = ':' in address[0]
        family = dict(family=socket.AF_INET6, dualstack_ipv6=not here) if six else {}
        try:
            server = socket.create_server((here, address[1]), backlog=self.cluster.count, **family)
        except OSError as error:
            raise NotTogether(
                f'port {address[1]}, behind the coordinator, cannot be used: {error.strerror}.'
            ) from error
        with server:
            server.settimeout(STARTING)
            while len(links) < self.cluster.count - 1:
                try:
                    link = server.accept()[0]
                except TimeoutError:
                    why = f'{len(links) + 1} of {self.cluster.count} hosts came within {STARTING} s.'
                    raise NotTogether(why) from None
                link.settimeout(LOST)
                lines = link.makefile(encoding='utf-8')
                with contextlib.suppress(OSError, ValueError):  # whoever else knocks
                    if (index := int(lines.readline(20))) in range(1, self.cluster.count) and index not in links:
                        links[index], said[index] = link, lines
                        continue
                lines.close()
                link.close()
        return links, said

    def _connect(self, address):
        for _ in range(STARTING):
            try:
                link = socket.create_connection(address, timeout=LOST)
                link.sendall(f'{self.cluster.index}\n'.encode())
                return {0: link}, {0: link.makefile(encoding='utf-8')}
            except OSError:
                time.sleep(1)
        raise NotTogether(f'the first host does not answer at {address[0]}:{address[1]}.')

    def gather(self, value) -> list:
        """Tells all hosts a value that JSON can hold, and waits for what each of them tells: in the order of the hosts.
        All do so equally often, in the same order.
        """
        with self._lock:
            number, self._asked = self._asked, self._asked + 1
            answer = self._answers[number] = queue.SimpleQueue()
        if self.cluster.index == 0:
            self._collect(0, number, value)
        else:
            self._send(0, [number, value])
        return answer.get()

    def close(self):
        """Comes to an end with all other hosts: that one is gone from here on is no loss."""
        self.gather(None)
        self._ended = True
        for index in self._links:
            self._send(index, 'bye')
        for reader in self._readers:
            reader.join(BEAT)
        for opened in (*self._said.values(), *self._links.values()):
            opened.close()

    def _collect(self, host, number, value):
        with self._lock:
            told = self._heard.setdefault(number, {})
            told[host] = value
            if len(told) < self.cluster.count:
                return
            del self._heard[number]
        every = [told[index] for index in range(self.cluster.count)]
        for index in self._links:
            self._send(index, [number, every])
        self._answers.pop(number).put(every)

    def _send(self, index, message):
        try:
            with self._lock:
                self._links[index].sendall(json.dumps(message).encode() + b'\n')
        except OSError:
            self._lose(index)

    def _read(self, index, lines):
        try:
            for line in lines:
                message = json.loads(line)
                if message == 'bye':  # all have come to the end
                    self._ended = True
                    return
                if isinstance(message, dict):
                    self._told = True  # and so no loss
                    time.sleep(PATIENCE)  # it may be at the same itself, and write what is to be kept
                    self.fail(**message)
                elif message and self.cluster.index == 0:
                    self._collect(index, *message)
                elif message:
                    number, every = message
                    self._answers.pop(number).put(every)
        except (OSError, ValueError):
            pass
        self._lose(index)

    def _beat(self):
        while not self._ended:
            for index in self._links:
                self._send(index, None)
            time.sleep(BEAT)

    def _lose(self, index):
        """Ends this host, as another one is gone."""
        if self._ended or self._told:
            return
        time.sleep(BEAT)  # in which a checkpoint may become whole that was being written
        if self._told:
            return
        why = (
            f'it is gone, one of {self.cluster.count}; the same command on all of them goes on from the last checkpoint'
        )
        self.fail(index, GO_ON, why)

    def fail(self, host: int, code: int, why: str):
        """Ends this host with a code, and all others: `host` cannot go on."""
        with self._failing:  # one says it
            if self._ended:
                return
            self._ended = True
            told = json.dumps({'host': host, 'code': code, 'why': why}).encode() + b'\n'
            for index, link in self._links.items():
                if index != host:
                    with contextlib.suppress(OSError):
                        link.sendall(told)
            print(f'error: host {host}: {why}', file=sys.stderr, flush=True)
            leave(code)


class AllFailed(UserError):
    """One of several hosts cannot go on; it is raised on all of them at the same place, where they may save."""

    def __init__(self, why: str, code: int):
        super().__init__(why)
        self.code = code


# Who does what -------------------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether there is more than one host."""
    return _channel is not None


def is_first() -> bool:
    """Whether this process is the one that writes what all processes share. It touches no device where it is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def first_device() -> jax.Device:
    """The first of this process's own devices."""
    return jax.local_devices()[0]


def part():
    """Where all hosts come to an end together: that another one ends is no loss from here on."""
    global _channel
    if _channel:
        _channel.close()
        _channel = None


def gather(value) -> list:
    """What each host tells, in their order; all call it. JSON can hold a value."""
    return _channel.gather(value) if _channel else [value]


def fetch(tree):
    """A tree of arrays as numpy arrays, each whole on every host; all call it."""

    def whole(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def first_before_others():
    """The first host does what is within, and then the others do: they find what it made."""
    if several() and not is_first():
        gather(None)
    yield
    if several() and is_first():
        gather(None)
