"""Event-listener code shared by all three commands.

The event protocol, the log, and the request to exit that a signal makes. The protocol is described in
http://supervisord.org/events.html; supervisor/dispatchers.py implements supervisord's side of it.
"""
from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Callable, NamedTuple, TextIO

Log = Callable[[str], None]


class Event(NamedTuple):
    """An event as supervisord sent it."""

    name: str
    payload: str
    server: str     # supervisord's identifier
    received: float  # seconds since the epoch


class ProtocolError(Exception):
    """supervisord sent something that is not an event; the message is one line."""


def printable(text: str) -> str:
    """Return text with an escape for every character that ends a line or can't be shown."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


def one_line(text: object) -> str:
    """Return text as one line that is safe in a terminal, a log and a mail header."""
    return printable(' | '.join(line.strip() for line in str(text).splitlines() if line.strip()))


def timestamp(now: float) -> str:
    """Return seconds since the epoch as local time, in the format of supervisord's log."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now % 1 * 1000):03d}"


def make_log(program: str) -> Log:
    """Return a function that writes a line to stderr, which is the listener's log."""
    def log(message: str) -> None:
        line = f'{timestamp(time.time())} {program}: {one_line(message)}\n'
        with suppress(OSError):     # the reader of the log has exited; the listener goes on
            os.write(2, line.encode('utf-8', 'backslashreplace'))
    return log


# By default the last four terminate a process at once, even in the middle of a restart.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class ExitRequest:
    """Whether a signal has asked the listener to exit, and with which status.

    The signal handler sets these two and does nothing else: an exception raised from a handler could
    land in an import or a destructor. What has begun is finished; nothing new is begun once `requested` is set.
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_status = 0
        self._pipe: tuple[int, int] | None = None

    def install(self) -> None:
        """Handle the signals from now on. Call it from the main thread."""
        _, writable = self._open_pipe()
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for signum in SIGNALS:
            signal.signal(signum, self._request)

    def _request(self, signum: int, frame: object) -> None:
        self.requested = True
        if signum not in (signal.SIGTERM, signal.SIGINT):
            self.exit_status = 128 + signum  # an unexpected exit, so that supervisord restarts the listener

    def fileno(self) -> int:
        """Return the file descriptor that becomes readable with the first signal after install()."""
        return self._open_pipe()[0]

    def _open_pipe(self) -> tuple[int, int]:
        # Not at import: if stdin is closed, the pipe would get file descriptor 0.
        if self._pipe is None:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
        return self._pipe


# Signals belong to the process as a whole.
exit_request = ExitRequest()


def start_timer(seconds: float, fire: Callable[[], None]) -> threading.Timer | None:
    """Call fire in so many seconds, on a daemon thread; return None if no thread could be started."""
    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    try:
        timer.start()
    except RuntimeError:
        return None
    return timer


def parse_tokens(line: str) -> dict[str, str]:
    """Return the `name:value` tokens of a header or payload line; a value may contain colons."""
    return dict(token.split(':', 1) for token in line.split(' ') if ':' in token)


def read_event(events: TextIO) -> Event | None:
    """Read one event; return None at the end of input, also in the middle of an event.

    `len` counts characters, not bytes: supervisor/process.py computes it before encoding the text.
    Raises ProtocolError if a line is not an event header.
    """
    line = events.readline()
    if not line.endswith('\n'):
        return None
    header = parse_tokens(line.strip())
    length = header.get('len', '')
    if not (length.isascii() and length.isdigit() and len(length) < 10):
        raise ProtocolError(f'invalid event header: missing or invalid len: {line[:200]!r}')
    payload = events.read(int(length))
    if len(payload) < int(length):
        return None
    return Event(header.get('eventname', ''), payload, header.get('server', ''), time.time())


class Input(io.RawIOBase):
    """A file descriptor whose input ends when exit is requested.

    A plain read() would miss a signal that arrives just before it, and wait for the next event, which
    a supervisord that is shutting down never sends.
    """

    def __init__(self, fd: int, request: ExitRequest) -> None:
        self._fd = fd
        self._request = request

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        waiting: list[Any] = [self._fd, self._request]
        ready, _, _ = select.select(waiting, [], [])
        if self._request in ready:
            return 0
        data = os.read(self._fd, len(buffer))   # PyPy has no os.readv
        buffer[:len(data)] = data
        return len(data)


def take_streams(request: ExitRequest) -> tuple[TextIO, int]:
    """Return supervisord's events and the file descriptor for the results.

    From here on only the listener itself uses them: file descriptor 0 is /dev/null and 1 is the log,
    so that neither a stray print nor a command can write into the protocol.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is fd
    source = Input(os.dup(0), request)
    events = io.TextIOWrapper(io.BufferedReader(source), encoding='utf-8', errors='surrogateescape', newline='\n')
    results = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return events, results


def listen(program: str, handle: Callable[[Event], None], finish: Callable[[], None],
           at_start: Callable[[], None]) -> int:
    """Serve supervisord's events until the end of input or a signal; return the exit status.

    handle is called with every event, before the event is acknowledged; at_start is called once, after the
    first READY was written; finish is called once, at the end.
    """
    if 'SUPERVISOR_SERVER_URL' not in os.environ:
        sys.stderr.write(
            f'{program} must be started by supervisord, from an [eventlistener:x] section, and supervisord.conf needs '
            'a [unix_http_server] or [inet_http_server] section (SUPERVISOR_SERVER_URL is not set); '
            'to run one check from the shell, add --once to the same command\n')
        return 1
    events, results = take_streams(exit_request)
    exit_request.install()
    status = 0
    try:
        _serve(handle, at_start, events, results, exit_request)
    except BrokenPipeError:
        pass  # supervisord exited while its event was being handled
    except ProtocolError as why:
        status = 1
        make_log(program)(str(why))
    finally:
        finish()
    return status or exit_request.exit_status


def _serve(handle: Callable[[Event], None], at_start: Callable[[], None], events: TextIO, results: int,
           request: ExitRequest) -> None:
    os.write(results, b'READY\n')
    at_start()
    while True:
        event = read_event(events)
        if event is None or request.requested:
            return
        handle(event)
        os.write(results, b'RESULT 2\nOK')
        if request.requested:
            return  # without a READY: supervisord would send the next event
        os.write(results, b'READY\n')
