"""The last lines that a process wrote to its logs before it crashed."""
from __future__ import annotations

import os
import re
import stat
import time
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Sequence

from superlance.options import count
from superlance.rpc import Refused, Unknown, is_shutting_down, make_process

if TYPE_CHECKING:
    from superlance.crashlog import Calls, Processes

TAIL_BYTES = 64 * 1024
MARK_BYTES = 64
# supervisord can't send a text that begins or ends within a UTF-8 character, which has 4 bytes at most; a process that
# is killed may leave an incomplete one. So many bytes are left out at the start and at the end, in this order.
CUTS = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 3))
# A .1 that was written to so recently may have been the log when the process wrote its last lines.
ROTATED_SECONDS = 60.0
# In answers of supervisord, rpc.py has replaced control characters with visible ones.
ESCAPE_SEQUENCE = re.compile(
    r'[\x1b\u241b](?:\[[0-?]*[ -/]*[@-~]'               # CSI, as for colours
    r'|\][^\x07\x1b\u2407\u241b]*(?:[\x07\u2407]|[\x1b\u241b]\\)'      # OSC, as for a window's title
    r'|[ -/]+[0-~]|[0-Z\\-~])')                          # all others, ECMA-48 and ECMA-35


def strip_escapes(text: str) -> str:
    """Return text without the escape sequences that colour it in a terminal."""
    return ESCAPE_SEQUENCE.sub('', text)


class Mark(NamedTuple):
    """How far a log had been written when its process crashed last."""

    size: int
    modified_ns: int = 0
    end: bytes = b''    # its last bytes; an inode number would not do, because that of a deleted file is reused


class Excerpt:
    """What a mail says about the logs of a process."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.has_lines = False
        self.trouble = ''       # why a log could not be read

    def add_trouble(self, why: Unknown | Refused) -> None:
        self.trouble = self.trouble or ('it is shutting down' if is_shutting_down(why) else str(why))


class ProcessLogs:
    """Reads the last lines that a process wrote to its logs.

    supervisord restarts a process at the moment it reports the crash, so the log has to be read before the new
    process writes to it. That is why supervisord is asked for the paths of the logs beforehand, and for the text
    only if a file can't be read. What was in the log at the previous crash belongs to an earlier process.
    """

    def __init__(self, calls: Calls, processes: Processes, lines: int) -> None:
        self._calls = calls
        self._processes = processes
        self._lines = lines
        self._marks: dict[tuple[str, str], Mark] = {}      # by namespec and path

    def read(self, namespec: str, pid: str) -> str:
        """Return the lines, or why there are none, as text for a mail."""
        seen = any(name == namespec for name, _ in self._marks)
        excerpt = self._read_all(namespec, pid)
        try:
            known = self._processes.find_paths(namespec)
            current = make_process(self._processes.refresh_one(namespec))
            if known != self._processes.find_paths(namespec):
                excerpt = self._read_all(namespec, pid)  # `supervisorctl update` has changed its logs
            if excerpt.has_lines and pid and current.pid and str(current.pid) != pid:
                excerpt.parts.append('supervisord has restarted it: the last lines above may be from the new process.')
        except (Unknown, Refused) as why:
            excerpt.add_trouble(why)
        if excerpt.trouble:
            excerpt.parts.append(f'Unable to read more of its logs through supervisord: {excerpt.trouble}')
        # Lines of the process may have been in the report of the previous crash.
        nothing = 'Its logs have no new lines since its last crash.' if seen else 'Its logs are empty.'
        return '\n\n'.join(excerpt.parts or [nothing])

    def _read_all(self, namespec: str, pid: str) -> Excerpt:
        excerpt = Excerpt()
        try:
            if self._processes.find_paths(namespec) is None:
                self._processes.refresh_one(namespec)
        except (Unknown, Refused) as why:
            excerpt.add_trouble(why)
        channels: dict[str, list[str]] = {}
        for channel, path in (self._processes.find_paths(namespec) or {}).items():
            channels.setdefault(path, []).append(channel)
        for path, names in channels.items():
            try:
                self._add(excerpt, namespec, pid, path, names)
            except (Unknown, Refused) as why:
                excerpt.add_trouble(why)
        return excerpt

    def _add(self, excerpt: Excerpt, namespec: str, pid: str, path: str, channels: Sequence[str]) -> None:
        """Add the end of a log to which these channels are written, or why it is missing."""
        title = f"{' and '.join(channels)} log"
        if is_device(path):
            excerpt.parts.append(f'Unable to read its {title}: {path} is not a file.')
        elif path:
            lines = strip_escapes(self._read(namespec, path, channels[0])).rstrip('\n').split('\n')[-self._lines:]
            if lines == ['']:
                # supervisord says that a file that it can't open is empty. A process that it could not start has none.
                if pid and is_missing(path):
                    excerpt.parts.append(f'Unable to read its {title}: {path} does not exist.')
                return
            sharers = self._processes.count_sharers(namespec, path)
            if sharers:
                others = count(sharers, 'other process', 'other processes')
                title += f' (shared with {others}, whose lines may be here too)'
            excerpt.parts.append('\n  '.join([f'The last lines of its {title}:', *lines]))
            excerpt.has_lines = True
        elif 'stdout' in channels:  # stderr alone has no file if it is redirected to stdout
            excerpt.parts.append('Unable to read its stdout log: stdout_logfile is NONE or syslog.')

    def _read(self, namespec: str, path: str, channel: str) -> str:
        """Return the end of a log, '' if there is nothing new. Raises Unknown and Refused."""
        # A relative path is relative to a directory that only supervisord knows.
        if os.path.isabs(path):
            try:
                return self._read_file(namespec, path)
            except OSError:
                pass  # it may be another user's, and supervisord can read it
        return self._ask_for_end(namespec, path, channel)

    def _read_file(self, namespec: str, path: str) -> str:
        with open(path, 'rb') as file:
            status = os.fstat(file.fileno())
            mark = self._marks.get((namespec, path))
            older = read_rotated(path, status, mark)
            start = find_start(file, status.st_size, mark) if older is None else 0
            newer = read_from(file, start, status.st_size)
            end = newer[-MARK_BYTES:] or (mark.end if mark and start else b'')
            self._marks[namespec, path] = Mark(status.st_size, status.st_mtime_ns, end)
        return ((older or b'') + newer)[-TAIL_BYTES:].decode('utf-8', 'replace')

    def _ask_for_end(self, namespec: str, path: str, channel: str) -> str:
        """Return the end of a log that only supervisord can read. Raises Unknown and Refused."""
        size = self._calls.call(f'tailProcess{channel.capitalize()}Log', namespec, 0, 0)[1]
        mark = self._marks.get((namespec, path))
        self._marks[namespec, path] = Mark(size)
        first = max(mark.size if mark and mark.size <= size else 0, size - TAIL_BYTES)
        if first >= size:
            return ''
        parts = ((first + skipped, size - cut) for skipped, cut in CUTS)
        return str(self._calls.call_any(f'readProcess{channel.capitalize()}Log', [
            (namespec, start, end - start) for start, end in parts if start < end]))


def find_start(file: BinaryIO, size: int, mark: Mark | None) -> int:
    """Return where to begin reading a log of that size: at the mark, or at 0 if it is not the marked log any more."""
    if mark is None or mark.size > size:
        return 0
    file.seek(mark.size - len(mark.end))
    return mark.size if file.read(len(mark.end)) == mark.end else 0


def read_from(file: BinaryIO, start: int, end: int) -> bytes:
    """Return at most 64 KB from before end, none from before start."""
    start = max(start, end - TAIL_BYTES)
    file.seek(start)
    return file.read(end - start)


def read_rotated(path: str, current: os.stat_result, mark: Mark | None) -> bytes | None:
    """Return what the process wrote to its log before supervisord renamed it, None if it has not been renamed since."""
    try:
        if not os.path.isfile(path + '.1'):
            return None
        with open(path + '.1', 'rb') as file:
            status = os.fstat(file.fileno())
            if os.path.samestat(status, current):
                return None     # it was renamed after it had been opened
            start = find_start(file, status.st_size, mark)
            if mark:
                # Two writes may have the same time.
                is_recent = status.st_mtime_ns > mark.modified_ns or 0 < start < status.st_size
            else:
                is_recent = status.st_mtime > time.time() - ROTATED_SECONDS
            return read_from(file, start, status.st_size) if is_recent else None
    except OSError:
        return None


def is_missing(path: str) -> bool:
    """Return whether a log has been deleted or renamed, by logrotate for example: supervisord still writes to it."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return os.path.isabs(path)
    except OSError:     # in a directory that only supervisord can enter
        pass
    return False


def is_device(path: str) -> bool:
    """Return whether a path leads, also through symbolic links, to something that is not a file.

    For supervisord /dev/stdout may well be a file, with the output of all its programs.
    """
    if not os.path.isabs(path):
        return False
    for _ in range(40):     # as many links as Linux follows
        if path.startswith(('/dev/', '/proc/')) and not path.startswith('/dev/shm/'):
            return True
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except OSError:
            break
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
