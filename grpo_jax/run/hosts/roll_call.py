"""Which processes of a run are there: they meet before it starts, and notice when one is lost.

Process 0 listens at the coordinator's address, before JAX's own service does, and every other
process connects to it. The connections stay open, so that the end of a process ends the others
within seconds, with a line that names it, where JAX would wait for its heartbeats.
"""

import contextlib
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import cast

LOST_STATUS = 75  # exit status of the other processes: start the run again (EX_TEMPFAIL)

_GREETING = 'grpo_jax'
_SILENCE = 30  # seconds after which a connection to a machine that does not answer is closed

OnLost = Callable[[str], None]


class RollCallError(ValueError):
    """Processes are missing, or were started with other numbers."""


def end_with(text: str) -> None:
    """Ends this process now, with a line on standard error."""
    from grpo_jax.rewards import watchdog  # slow, and needed here alone

    sys.stdout.flush()
    print(
        f'error: {text}; this process ends too. Start the same command again in all processes: it '
        'resumes from the newest checkpoint',
        file=sys.stderr,
        flush=True,
    )
    watchdog.exit_now(LOST_STATUS)


class RollCall:
    """The open connections to process 0, or from it to the others.

    Args:
      peers: the connections, by the name of the process at the other end.
      on_lost: called in a thread with a description of a process that was lost.
    """

    def __init__(self, peers: dict[socket.socket, str], on_lost: OnLost = end_with) -> None:
        self._peers, self._on_lost = peers, on_lost
        threading.Thread(target=self._watch, name='roll call', daemon=True).start()

    def announce(self, text: str) -> None:
        """Tells the others that this process fails: they end with this text."""
        self._send(f'lost {text}')

    def leave(self) -> None:
        """Tells the others that this process ends as intended."""
        self._send('bye')

    def _send(self, text: str, *, but: socket.socket | None = None) -> None:
        line = (' '.join(text.split()) + '\n').encode()
        for peer in list(self._peers):
            with contextlib.suppress(OSError):
                if peer is not but:
                    peer.sendall(line)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = cast(socket.socket, key.fileobj)
                    line = _read_line(peer)
                    if line == 'bye':
                        selector.unregister(peer)  # but open: the other end reads it
                        continue
                    kind, _, text = line.partition(' ')
                    if kind != 'lost' or not text:
                        text = f'{self._peers[peer]} is gone (killed, or its machine was lost)'
                    self._send(f'lost {text}', but=peer)
                    self._on_lost(text)
                    return


def meet(
    address: str, count: int, index: int, *, timeout: float, on_lost: OnLost = end_with
) -> RollCall:
    """Waits until all processes are there.

    Args:
      address: host and port of process 0.
      count: number of processes.
      index: of this process, from 0.
      timeout: seconds.
      on_lost: see `RollCall`.

    Raises:
      RollCallError: processes are missing after this time, have the same index, or were started
        with another count. Processes that are there raise the same error.
    """
    host, _, port = address.rpartition(':')
    deadline = time.monotonic() + timeout
    if index == 0:
        return RollCall(_call(address, int(port), count, deadline, timeout), on_lost)
    peer = _answer(host.strip('[]'), int(port), count, index, deadline, timeout)
    return RollCall({peer: f'process 0 at {host}'}, on_lost)


def _call(
    address: str, port: int, count: int, deadline: float, timeout: float
) -> dict[socket.socket, str]:
    """Process 0: accepts the others, and tells them when all are there."""
    present: dict[int, tuple[socket.socket, str]] = {}
    error = ''
    with _listener(address, port) as server:
        while len(present) < count - 1 and not error:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                peer, _ = server.accept()
            except TimeoutError:
                error = _missing(set(range(1, count)) - set(present), count, address, timeout)
                break
            peer.settimeout(5)
            with contextlib.suppress(OSError):
                error = _admit(peer, count, present)
    reply = f'error {error}\n' if error else 'go\n'
    for peer, _ in present.values():
        with contextlib.suppress(OSError):
            peer.sendall(reply.encode())
    if error:
        raise RollCallError(error)
    return {_kept_alive(peer): name for peer, name in present.values()}


def _listener(address: str, port: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(('', port), family=family, dualstack_ipv6=dual, backlog=1024)
    except OSError as error:
        raise RollCallError(
            f'the coordinator cannot listen at {address} ({error.strerror}): name a free port of '
            'the host of process 0'
        ) from error


def _admit(peer: socket.socket, count: int, present: dict[int, tuple[socket.socket, str]]) -> str:
    """Adds the process that connected; returns what is wrong with it."""
    match = re.fullmatch(rf'{_GREETING} (\d+) (\d+) (\S+)', _read_line(peer))
    if match is None:
        peer.close()  # not a process of a run
        return ''
    index, its_count = int(match[1]), int(match[2])
    name = f'process {index} on {match[3]}'
    known = present.get(index)
    # One that could not wait connects again; then the old connection is closed already.
    if known is not None and _is_open(known[0]):
        error = f'{name} and {known[1]} have the same number: give each its own --process_id'
        with contextlib.suppress(OSError):
            peer.sendall(f'error {error}\n'.encode())
        return error
    present[index] = peer, name
    if its_count != count:
        return f'{name} was started for {its_count} processes and process 0 for {count}'
    return ''


def _missing(missing: set[int], count: int, address: str, timeout: float) -> str:
    named = ', '.join(map(str, sorted(missing)))
    return (
        f'process{"es" if len(missing) > 1 else ""} {named} of {count} did not connect to process '
        f'0 at {address} within {timeout:g} s: start the command on every host, with the same '
        'address'
    )


def _answer(
    host: str, port: int, count: int, index: int, deadline: float, timeout: float
) -> socket.socket:
    """Another process: connects to process 0 and waits for the others."""
    greeting = f'{_GREETING} {index} {count} {socket.gethostname()}\n'.encode()
    while time.monotonic() < deadline:
        try:
            peer = socket.create_connection((host, port), timeout=5)
            peer.sendall(greeting)
            # Process 0 may have started later, and tells at its own deadline who is missing.
            peer.settimeout(timeout + 10)
            reply = _read_line(peer)
        except OSError:
            reply = ''
        kind, _, text = reply.partition(' ')
        if kind == 'go':
            return _kept_alive(peer)
        if kind == 'error':
            raise RollCallError(text)
        time.sleep(0.2)  # not yet there, or another program
    raise RollCallError(
        f'process 0 of {count} did not answer process {index} at {host}:{port} within {timeout:g} '
        's: start the command on every host, with the same address'
    )


def _is_open(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return bool(peer.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        peer.settimeout(5)


def _kept_alive(peer: socket.socket) -> socket.socket:
    """A connection that is closed when the other machine no longer answers."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {
        'TCP_KEEPIDLE': _SILENCE // 3,
        'TCP_KEEPINTVL': _SILENCE // 6,
        'TCP_KEEPCNT': 4,
        'TCP_USER_TIMEOUT': 1000 * _SILENCE,
    }.items():
        if hasattr(socket, name):  # not on every platform
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _read_line(peer: socket.socket) -> str:
    """A line without its end; empty if the connection is closed."""
    received = b''
    try:
        while not received.endswith(b'\n'):
            byte = peer.recv(1)
            if not byte or len(received) > 10_000:
                return ''
            received += byte
    except OSError:
        return ''
    return received[:-1].decode('utf-8', 'replace')
