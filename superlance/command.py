"""Run a command with a deadline."""
from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Callable, Iterator, Sequence

from superlance.listener import ExitRequest, one_line

if TYPE_CHECKING:
    from subprocess import Popen

# How much a command may print, and how much of it is quoted. `ps` prints about 25 bytes per process.
OUTPUT_LIMIT_BYTES = 16 * 1024 * 1024
QUOTED_BYTES = 2000
READ_BYTES = 65536  # the capacity of a pipe
POLL_SECONDS = 0.1
KILL_SECONDS = 1
PS_SECONDS = 10

SecondsLeft = Callable[[], float]     # until a deadline, 0 or less after it


class CommandFailed(Exception):
    """A command failed or could not be started; the message is one line with its status and output."""


class Deadline:
    """A point in time, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def seconds_left(self) -> float:
        """Return the seconds until the deadline, negative after it."""
        return self._end - time.monotonic()


def run_command(command: str | Sequence[str], seconds_left: SecondsLeft, message: bytes = b'',
                environment: dict[str, str] | None = None, interrupt: ExitRequest | None = None,
                shown: str = '') -> bytes:
    """Run a command and return its output, stdout and stderr together.

    A string is the operator's own shell text; a sequence runs without a shell. message is written to the
    command's stdin, which the command need not read. seconds_left is called repeatedly while the command runs;
    when it returns 0 or less, or when interrupt is requested, the command and its children are killed. The
    command has finished when its own process has exited, even if a child of it runs on. shown is the name of the
    command in error messages, by default its words. Raises CommandFailed.
    """
    import subprocess

    name = shown or (command if isinstance(command, str) else ' '.join(command))
    # supervisord passes UTF-8, and the locale here may differ.
    encoded: bytes | Sequence[bytes] = (
        _encode(command) if isinstance(command, str) else [_encode(word) for word in command])
    try:
        process = subprocess.Popen(
            encoded, shell=isinstance(command, str), env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    except (OSError, ValueError) as why:  # ValueError: a null byte in the command
        raise CommandFailed(f"{name}: {getattr(why, 'strerror', None) or why}") from why
    output = bytearray()
    try:
        failure = _communicate(process, message, seconds_left, interrupt, output)
    finally:
        if process.poll() is None:
            _kill(process)
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()
    if process.returncode and not failure:
        failure = (f'exit status {process.returncode}' if process.returncode > 0
                   else f'terminated by signal {-process.returncode}')
    if failure:
        quoted = one_line(decode_end(bytes(output)))
        raise CommandFailed(f"{name}: {failure}{': ' + quoted if quoted else ''}")
    return bytes(output)


def run_ps(columns: Sequence[str], seconds: float, interrupt: ExitRequest | None = None) -> str:
    """Return these columns of all processes, without a header. Raises CommandFailed.

    With an -o option for each: on the BSDs, the header after `pid=` extends to the end of the argument.
    """
    options = [word for column in columns for word in ('-o', f'{column}=')]
    output = run_command(['ps', '-A', *options], Deadline(seconds).seconds_left,
                         environment=dict(os.environ, LC_ALL='C'), interrupt=interrupt)
    return output.decode('ascii', 'replace')


def read_proc_stats() -> Iterator[tuple[int, list[bytes]]]:
    """Yield each pid and the fields of Linux's /proc/PID/stat from the 3rd, the state (proc(5)). Raises OSError."""
    for name in os.listdir('/proc'):
        if name.isdecimal():
            with suppress(OSError), open(f'/proc/{name}/stat', 'rb') as file:   # it has exited meanwhile
                yield int(name), file.read().rpartition(b')')[2].split()


def find_group_members(group_id: int) -> set[int]:
    """Return the pids of the processes in a process group, without zombies.

    supervisord makes each of its children the leader of a process group; descendants that called setsid are not found.
    """
    try:
        with suppress(PermissionError):     # they run as another user
            os.killpg(group_id, 0)
    except ProcessLookupError:
        return set()
    rows: list[list[str]] = []
    try:
        rows = [line.split() for line in run_ps(('pid', 'pgid', 'stat'), PS_SECONDS).splitlines()]
    except CommandFailed:
        with suppress(OSError):     # there is no /proc
            rows = [[str(pid), fields[2].decode(), fields[0].decode()] for pid, fields in read_proc_stats()]
    return {int(row[0]) for row in rows if len(row) == 3 and row[1] == str(group_id) and not row[2].startswith('Z')}


def is_command(word: str) -> bool:
    """Return whether a word is the path of an executable file, or the name of one in PATH."""
    folders = [''] if '/' in word else os.get_exec_path()
    paths = [os.path.join(folder, word) for folder in folders]
    return any(os.path.isfile(path) and os.access(path, os.X_OK) for path in paths)


def decode_end(output: bytes) -> str:
    """Return the end of a command's output, as much as belongs in a log or a mail."""
    return output[-QUOTED_BYTES:].decode('utf-8', 'replace')


def _encode(text: str) -> bytes:
    return text.encode('utf-8', 'surrogateescape')


def _communicate(process: Popen[bytes], message: bytes, seconds_left: SecondsLeft,
                 interrupt: ExitRequest | None, output: bytearray) -> str:
    """Write message and add to output until the process has exited; return why it must be killed, or ''.

    Popen.communicate() is not suitable: after a timeout, it does not write the rest of the message.
    """
    import selectors
    from subprocess import TimeoutExpired

    assert process.stdin
    assert process.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        unsent = bytearray(message)
        if unsent:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        else:
            process.stdin.close()
        while True:
            exited = process.poll() is not None
            wait_seconds = 0.0 if exited else max(0.0, min(seconds_left(), POLL_SECONDS))
            if selector.get_map():
                for key, _ in selector.select(wait_seconds):
                    if key.fileobj is process.stdout:
                        if not _read_some(key.fd, output):
                            selector.unregister(process.stdout)
                    elif not _write_some(key.fd, unsent):
                        selector.unregister(process.stdin)
                        process.stdin.close()
            else:
                with suppress(TimeoutExpired):
                    process.wait(wait_seconds)
            if exited:
                return ''  # its last output was in the pipe, and has been read
            if len(output) > OUTPUT_LIMIT_BYTES:
                return f'printed more than {OUTPUT_LIMIT_BYTES} bytes'
            if interrupt and interrupt.requested:
                return 'interrupted, because the listener is shutting down'
            if seconds_left() <= 0:
                return 'timed out'


def _read_some(fd: int, output: bytearray) -> bool:
    """Return whether there may be more to read."""
    chunk = os.read(fd, READ_BYTES)
    output += chunk
    return bool(chunk)


def _write_some(fd: int, unsent: bytearray) -> bool:
    """Return whether there is more to write."""
    try:
        del unsent[:os.write(fd, unsent[:select.PIPE_BUF])]
    except BrokenPipeError:
        return False    # the command does not read all of its input
    return bool(unsent)


def _kill(process: Popen[bytes]) -> None:
    """Kill a command and its children; do not wait for one that can't be killed."""
    from subprocess import TimeoutExpired

    with suppress(PermissionError):     # it runs as another user, through sudo for example
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(TimeoutExpired):      # it is stuck in the kernel, or runs as another user; subprocess reaps it later
        process.wait(KILL_SECONDS)
