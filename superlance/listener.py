"""What the three listeners share of being a supervisor event listener.

The event protocol, the log, the signals that end a listener, and commands that run
beside it without ever touching the protocol. The protocol is described in
http://supervisord.org/events.html; supervisor/dispatchers.py is its other side.
"""
from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Callable, Iterator, NamedTuple, Sequence, TextIO

if TYPE_CHECKING:
    from subprocess import Popen

Log = Callable[[str], None]

# The most that is kept of what a command prints, and that is told of it. `ps` needs about 25 bytes a process.
OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024
SAID_BYTES = 2000
READ_BYTES = 65536  # as much as a pipe holds
KILL_SECONDS = 1


class Event(NamedTuple):
    """An event as supervisord sent it."""

    name: str
    payload: str
    server: str     # supervisord's identifier
    received: float  # seconds since the epoch


class ProtocolError(Exception):
    """What came from supervisord is no event; the message is one line."""


class CommandFailed(Exception):
    """A command did not end well; the message is one line with its status and output."""


class Ended(BaseException):
    """SIGTERM or SIGINT asked the listener to end."""


def printable(text: str) -> str:
    """Return text with an escape for every character that ends a line or can't be shown."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


def one_line(text: object) -> str:
    """Return text as one line that a terminal, a log and a mail header can hold."""
    return printable(' | '.join(line.strip() for line in str(text).splitlines() if line.strip()))


def timestamp(now: float) -> str:
    """Return seconds since the epoch as local time, as supervisord's own log has it."""
    return '%s,%03d' % (time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now)), now % 1 * 1000)


def make_log(program: str) -> Log:
    """Return a function that writes a line to stderr, which is the listener's log."""
    def log(message: str) -> None:
        line = f'{timestamp(time.time())} {program}: {one_line(message)}\n'
        try:
            os.write(2, line.encode('utf-8', 'backslashreplace'))
        except OSError:
            pass  # whoever reads the log is gone; the watching goes on
    return log


# Signals. They belong to the process as a whole, so their state is the module's.

# By default the last four end a process at once, in the middle of a restart too.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_ending = False
_uninterrupted = False
_exit_status = 0


def _end(signum: int, frame: object) -> None:
    global _ending, _exit_status
    first, _ending = not _ending, True
    if signum not in (signal.SIGTERM, signal.SIGINT):
        _exit_status = 128 + signum  # not meant to end a listener, so supervisord shall start it anew
    if first and not _uninterrupted:
        raise Ended


@contextmanager
def uninterrupted(raising: bool = True) -> Iterator[None]:
    """Hold back a signal until the end of this block; raising=False: until the event has been acknowledged."""
    global _uninterrupted
    ending_before, outer = _ending, _uninterrupted
    _uninterrupted = True
    try:
        yield
    finally:
        _uninterrupted = outer
    # Not where it was ending before: the blocks of finish() must not interrupt it.
    if raising and _ending and not (ending_before or outer):
        raise Ended


# The event protocol.

def parse_tokens(line: str) -> dict[str, str]:
    """Return the `name:value` tokens of a header or payload line; a value may hold colons."""
    return dict(token.split(':', 1) for token in line.split(' ') if ':' in token)


def read_event(events: TextIO) -> Event | None:
    """Read one event; None at the end of input, in the middle of an event too.

    `len` counts characters, not bytes: supervisor/process.py takes it from the text
    before that is encoded. Raises ProtocolError for a line that is no event's header.
    """
    line = events.readline()
    if not line.endswith('\n'):
        return None
    header = parse_tokens(line.strip())
    length = header.get('len', '')
    if not (length.isascii() and length.isdigit() and len(length) < 10):
        raise ProtocolError(f"not an event's header, for want of a number after len: {line[:200]!r}")
    payload = events.read(int(length))
    if len(payload) < int(length):
        return None
    return Event(header.get('eventname', ''), payload, header.get('server', ''), time.time())


class Input(io.RawIOBase):
    """A file descriptor that is read until a signal asks to end, be it just before the read.

    A plain read() would not notice a signal that comes in the moment before it, and wait for the
    next event, which a supervisord that is about to end never sends.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._signals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

    def fileno(self) -> int:
        return self._fd

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            ready, _, _ = select.select([self._fd, self._signals], [], [])
            if _ending:
                raise Ended  # again, where the first was lost
            if self._fd in ready:
                return os.readv(self._fd, [buffer])
            os.read(self._signals, READ_BYTES)  # a signal to a child that was forked


def take_streams() -> tuple[TextIO, int]:
    """Return supervisord's events, and the file descriptor for the results.

    From here on they are this process' alone: file descriptor 0 is /dev/null and 1 is
    the log, so that neither a stray print nor a command can speak to supervisord.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is fd
    events = io.TextIOWrapper(
        io.BufferedReader(Input(os.dup(0))), encoding='utf-8', errors='surrogateescape', newline='\n')
    results = os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return events, results


def listen(program: str, handle: Callable[[Event], None], finish: Callable[[], None]) -> int:
    """Serve supervisord's events until it goes or a signal asks to end; return the exit status.

    handle is called with every event, before it is acknowledged; finish is called once,
    at the end.
    """
    if 'SUPERVISOR_SERVER_URL' not in os.environ:
        sys.stderr.write(
            f'{program} must be run as a supervisor event listener, from an [eventlistener:x] section '
            'of a supervisord that has an http server (SUPERVISOR_SERVER_URL is not set); '
            f"to try it from the shell: '{program} --once'; the README has examples\n")
        return 1
    events, results = take_streams()
    status = 0
    try:
        try:
            for signum in SIGNALS:
                signal.signal(signum, _end)
            _serve(handle, events, results)
        except BrokenPipeError:
            pass  # supervisord went away while its event was being served
        except ProtocolError as why:
            status = 1
            make_log(program)(str(why))
        finally:
            _stop_raising()
    except Ended:
        pass
    finally:
        finish()
    return status or _exit_status


def _serve(handle: Callable[[Event], None], events: TextIO, results: int) -> None:
    while not _ending:  # also where an exception raised by a signal was lost in a destructor
        os.write(results, b'READY\n')
        event = read_event(events)
        if event is None:
            break
        handle(event)
        os.write(results, b'RESULT 2\nOK')


def _stop_raising() -> None:
    """Let a signal from now on find the listener ending already."""
    global _ending
    _ending = True


# Commands.

def run_command(command: str | Sequence[str], seconds_left: Callable[[], float],
                message: bytes = b'', environment: dict[str, str] | None = None) -> bytes:
    """Run a command and return what it printed, stdout and stderr together.

    A string is the operator's own shell text; a sequence runs without a shell. message
    goes to its stdin, and need not be read. seconds_left is asked again and again while
    the command runs; when there are none, the command and all it started are killed.
    The command has ended when its own process has, even where a child of it lives on.
    Raises CommandFailed.
    """
    import subprocess

    name = command if isinstance(command, str) else ' '.join(command)
    # supervisord passes UTF-8, and the locale here may be another.
    encoded: bytes | Sequence[bytes] = (
        _encode(command) if isinstance(command, str) else [_encode(word) for word in command])
    output = bytearray()
    process: Popen[bytes] | None = None
    try:
        # A signal that came after the fork, but before Popen has returned, would leave the command behind.
        with uninterrupted() if threading.current_thread() is threading.main_thread() else nullcontext():
            try:
                process = subprocess.Popen(
                    encoded, shell=isinstance(command, str), env=environment, start_new_session=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            except (OSError, ValueError) as why:  # ValueError: a null byte in the command
                raise CommandFailed('{}: {}'.format(name, getattr(why, 'strerror', None) or why))
        failure = _attend(process, message, seconds_left, output)
    finally:
        if process:  # pragma: no branch  where it was not started there is nothing to do but to fail
            if process.poll() is None:
                _kill(process)
            for pipe in filter(None, (process.stdin, process.stdout)):
                pipe.close()
    if process.returncode and not failure:
        failure = ('exit status %d' % process.returncode if process.returncode > 0
                   else 'killed by signal %d' % -process.returncode)
    if failure:
        said = one_line(decode_end(bytes(output)))
        raise CommandFailed('{}: {}{}'.format(name, failure, ': ' + said if said else ''))
    return bytes(output)


def decode_end(output: bytes) -> str:
    """Return the end of what a command printed, as much as a log and a mail should hold."""
    return output[-SAID_BYTES:].decode('utf-8', 'replace')


def _encode(text: str) -> bytes:
    return text.encode('utf-8', 'surrogateescape')


def _attend(process: Popen[bytes], message: bytes, seconds_left: Callable[[], float], output: bytearray) -> str:
    """Send message and add to output until the process has ended; return why it must be killed, or ''.

    Popen.communicate() is no use here: after a timeout it does not send the rest of the message.
    """
    import selectors
    from subprocess import TimeoutExpired

    assert process.stdin and process.stdout
    unsent = message
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if unsent:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        else:
            process.stdin.close()
        while True:
            ended = process.poll() is not None
            wait_seconds = 0.0 if ended else max(0.0, min(seconds_left(), 0.1))
            for key, _ in selector.select(wait_seconds) if selector.get_map() else ():
                if key.fileobj is process.stdout:
                    chunk = os.read(key.fd, READ_BYTES)
                    output += chunk
                    if not chunk:
                        selector.unregister(process.stdout)
                else:
                    try:
                        unsent = unsent[os.write(key.fd, unsent[:select.PIPE_BUF]):]
                    except BrokenPipeError:
                        unsent = b''  # it does not read it
                    if not unsent:
                        selector.unregister(process.stdin)
                        process.stdin.close()
            if ended:
                return ''  # what it wrote last was in the pipe, and has been read at once
            if len(output) > OUTPUT_LIMIT_BYTES:
                return 'printed more than %d bytes' % OUTPUT_LIMIT_BYTES
            if seconds_left() <= 0:
                return 'did not end in time'
            if not selector.get_map():
                try:
                    process.wait(wait_seconds)
                except TimeoutExpired:
                    pass


def _kill(process: Popen[bytes]) -> None:
    """Kill a command and all it started, and don't wait for one that can't be killed."""
    from subprocess import TimeoutExpired

    try:
        os.killpg(process.pid, signal.SIGKILL)
    except PermissionError:
        pass  # it has become another user's, as by sudo
    try:
        process.wait(KILL_SECONDS)
    except TimeoutExpired:
        pass  # it is stuck in the kernel, or another user's; subprocess reaps it after its end
