"""Usage: crashmail [options]

Mails when a process exits unexpectedly. It runs as an event listener of
supervisor, subscribed to the EXITED event, and to FATAL to be told too when
supervisord has given up starting a process:

    [eventlistener:crashmail]
    command=crashmail -m bob@example.com
    events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
    buffer_size=1000

What to mail about; neither is the same as -a:
  -p, --program=NAME          NAME (program, group:program or group:*); may be
                              repeated
  -a, --any                   every process of supervisord

Mail:
  -m, --email=ADDR            to whom; may be repeated or hold several with
                              commas; without it there is the log only
  -o, --optionalheader=TEXT   the subject begins with "TEXT: "
      --tail=N                the last N lines of the process' stdout and
                              stderr logs in the mail
      --interval=TIME         the first crash is mailed at once, those of the
                              next TIME go together in one mail: seconds, or a
                              number with s, m, h or d
  -s, --sendmail_program=CMD  the command that sends a mail
                              (default: /usr/sbin/sendmail -t -i)
      --smtp=URL              send by smtp://[user[:password]@]host[:port] or
                              smtps://... instead; the password may also be in
                              SUPERLANCE_SMTP_PASSWORD
      --from=ADDR             the sender

By hand:
      --once                  send a test mail to -m, and print what the mail
                              command or the server said; exit status 0 if it
                              was taken, else 1
      --configuration=FILE    for --once: the supervisord.conf to find
                              supervisord by
  -h, --help                  print this text
      --version               print the version
"""
from __future__ import annotations

import os
import threading
import time
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from superlance import mail
from superlance.listener import Event, listen, make_log, parse_tokens, timestamp, uninterrupted
from superlance.options import (
    COMMON_OPTIONS,
    Given,
    Option,
    UsageError,
    parse_count,
    parse_text,
    parse_timeout,
    run_script,
    without_password,
)
from superlance.processes import (
    EVERY,
    CantTell,
    Name,
    NameCheck,
    Refused,
    Supervisor,
    find_supervisor,
    make_process,
    parse_name,
)

EXITED = 'PROCESS_STATE_EXITED'
FATAL = 'PROCESS_STATE_FATAL'

TAIL_BYTES = 64 * 1024
TAIL_TIMEOUT_SECONDS = 2
TAIL_PAUSE_SECONDS = 60
# Of so many crashes in one mail the last words are kept; beyond, there is a line for each.
TAILS_IN_MAIL = 50


# Options.

OPTIONS = (
    Option('p', 'program', parse_name),
    Option('a', 'any'),
    Option('o', 'optionalheader', parse_text),
    Option('', 'tail', parse_count),
    Option('', 'interval', parse_timeout),
) + mail.OPTIONS + COMMON_OPTIONS


class Options(NamedTuple):
    names: tuple[Name, ...]     # whom to watch
    prefix: str
    tail_lines: int | None
    interval_seconds: float | None
    mail: mail.Settings
    once: bool
    configuration: str | None


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for what was given. Raises UsageError."""
    if arguments:
        raise UsageError(f'unexpected argument {without_password(arguments[0])!r}; crashmail takes options only')
    if 'once' in given and 'email' not in given:
        raise UsageError('option --once: it sends a test mail; say to whom with -m')
    prefix = given.last('optionalheader')
    names = tuple(given.all('program'))
    return Options(
        names=(EVERY,) if 'any' in given or not names else names,
        prefix=prefix + ': ' if prefix else '',
        tail_lines=given.last('tail'),
        interval_seconds=given.last('interval'),
        mail=mail.read_settings(given),
        once='once' in given,
        configuration=given.last('configuration'))


# Judge.

class Crash(NamedTuple):
    """A process that ended and should not have."""

    group: str
    program: str
    pid: str            # '' where supervisord gave up starting it
    from_state: str
    when: float         # epoch seconds

    @property
    def subject(self) -> str:
        if self.pid:
            return f'{self.program} crashed at {timestamp(self.when)}'
        return f'{self.program} is FATAL, supervisord has given up starting it, at {timestamp(self.when)}'

    @property
    def text(self) -> str:
        if self.pid:
            return (f'program {self.program} of group {self.group} (pid {self.pid}) was {self.from_state} and exited unexpectedly')
        return (f'supervisord has given up starting program {self.program} of group {self.group}, which was {self.from_state} and is FATAL now')


def find_crash(event: Event) -> Crash | None:
    """Return the Crash that an event tells of, None if it tells of none.

    Raises ValueError for an event of which that can't be said.
    """
    if event.name not in (EXITED, FATAL):
        return None
    tokens = parse_tokens(event.payload.partition('\n')[0])
    if event.name == EXITED and tokens.get('expected') == '1':
        return None
    if 'processname' not in tokens or (event.name == EXITED and tokens.get('expected') != '0'):
        raise ValueError(f'unable to read a {event.name} event: {event.payload[:200]!r}')
    program = tokens['processname']
    pid = (tokens.get('pid') or 'unknown') if event.name == EXITED else ''
    return Crash(tokens.get('groupname', program), program, pid, tokens.get('from_state', 'unknown'),
                 event.received)


# The last words of a process.

class LastWords:
    """Reads the last lines that a process wrote to its logs.

    supervisord starts a process anew in the moment that it tells of the crash, so the
    log has to be read before the new one writes to it. That is why supervisord is asked
    for the names of the logs beforehand, and for the text only where a file can't be read.
    What was there at a crash before belongs to an earlier process.
    """

    def __init__(self, supervisor: Supervisor, lines: int) -> None:
        self._supervisor = supervisor
        self._lines = lines
        self._paths: dict[str, dict[str, str]] = {}     # by namespec and channel; '' for no log
        # The inode and size that each log had when its process crashed last.
        self._ends: dict[str, tuple[int, int]] = {}
        self._ask_after = 0.0
        try:
            for info in supervisor.call('getAllProcessInfo'):
                self._add_paths(info)
        except (CantTell, Refused):
            pass  # a crash will tell

    def fetch(self, crash: Crash) -> str:
        """Return the lines, or why there are none; takes a few seconds at most."""
        namespec = f'{crash.group}:{crash.program}'
        parts, trouble = self._read_both(namespec)
        try:
            known = self._paths.get(namespec)
            info = self._ask('getProcessInfo', namespec)
            self._add_paths(info)
            if known != self._paths[namespec]:
                parts, trouble = self._read_both(namespec)  # `supervisorctl update` has changed its logs
            current = make_process(info)
            if parts and current.pid and str(current.pid) != crash.pid:
                parts.append('\nIt has been started again since (pid %d); a line at the very end may be of that one.'
                             % current.pid)
        except (CantTell, Refused) as why:
            trouble = trouble or str(why)
        if trouble:
            parts.append(f'\nsupervisord can not be asked for more of its log: {trouble}')
        return '\n'.join(parts) or '\nIt has written nothing to a log.'

    def _read_both(self, namespec: str) -> tuple[list[str], str]:
        """Return what is told of each log, and why it could not be read or ''."""
        parts = []
        trouble = ''
        for channel in ('stdout', 'stderr'):
            try:
                text = self._read(namespec, channel)
            except (CantTell, Refused) as why:
                trouble = trouble or str(why)
                continue
            if text:
                lines = text.rstrip('\n').split('\n')[-self._lines:]
                parts.append('\nThe last lines of its {} log:\n{}'.format(
                    channel, '\n'.join('  ' + line for line in lines)))
        return parts, trouble

    def _read(self, namespec: str, channel: str) -> str:
        """Return the end of a log, '' if there is none. Raises CantTell and Refused."""
        if namespec not in self._paths:
            self._add_paths(self._ask('getProcessInfo', namespec))
        path = self._paths[namespec][channel]
        if not path:
            return ''
        try:
            # Not a terminal or a pipe, as /dev/stdout is, nor relative to a directory that only supervisord knows.
            if os.path.isabs(path) and os.path.isfile(path):
                with open(path, 'rb') as file:
                    status = os.fstat(file.fileno())
                    start, end = self._pass_on(path, status.st_ino, status.st_size)
                    file.seek(start)
                    return file.read(end - start).decode('utf-8', 'replace')
        except OSError:
            pass  # it may be another user's, and supervisord can read it
        return self._ask_for_end(namespec, channel, path)

    def _ask_for_end(self, namespec: str, channel: str, path: str) -> str:
        """Return the end of a log that supervisord has to read. Raises CantTell and Refused."""
        size = self._ask(f'tailProcess{channel.capitalize()}Log', namespec, 0, 0)[1]
        start, end = self._pass_on(path, 0, size)
        first = start
        while first < end:
            try:
                return str(self._ask(f'readProcess{channel.capitalize()}Log', namespec, first, end - first))
            except CantTell:
                # It can't send a text that begins within a character, which has 4 bytes at most.
                first += 1
                if first in (start + 4, end):
                    raise
        return ''

    def _pass_on(self, path: str, inode: int, size: int) -> tuple[int, int]:
        """Return where to read a log from, and to; what was there before is an earlier process'."""
        inode_before, start = self._ends.get(path, (inode, 0))
        if inode != inode_before or start > size:
            start = 0  # the log was rotated
        self._ends[path] = inode, size
        return max(start, size - TAIL_BYTES), size

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Ask supervisord, unless it let a call wait a short while ago: events are waiting."""
        started = time.monotonic()
        if started < self._ask_after:
            raise CantTell('supervisord did not answer a short while ago')
        try:
            return self._supervisor.call(method, *arguments)
        except CantTell:
            if time.monotonic() > started + TAIL_TIMEOUT_SECONDS / 2:
                self._ask_after = time.monotonic() + TAIL_PAUSE_SECONDS
            raise

    def _add_paths(self, info: Mapping[str, Any]) -> None:
        self._paths[make_process(info).namespec] = {
            channel: info.get(f'{channel}_logfile', '') for channel in ('stdout', 'stderr')}


# Tell.

class Report(NamedTuple):
    """A crash and what is told of it."""

    crash: Crash
    last_words: str


def compose(reports: Sequence[Report]) -> tuple[str, str]:
    """Return the subject and body of the mail for one or several crashes."""
    subject = reports[0].crash.subject
    if len(reports) > 1:
        programs = sorted({report.crash.program for report in reports})
        subject = '%d crashes by %s: %s' % (len(reports), timestamp(reports[-1].crash.when), ', '.join(programs[:10]))
        if len(programs) > 10:
            subject += ' and %d more' % (len(programs) - 10)
    return subject, '\n'.join(f'{timestamp(report.crash.when)}: {report.crash.text}.\n{report.last_words}'
                              for report in reports)


class Digest:
    """Sends the first report at once, and those of the next interval together."""

    def __init__(self, interval_seconds: float, send: Callable[[Sequence[Report]], None]) -> None:
        self._interval_seconds = interval_seconds
        self._send = send
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._held: list[Report] = []

    def add(self, report: Report) -> None:
        with self._lock:
            if self._timer:
                self._held.append(report if len(self._held) < TAILS_IN_MAIL else report._replace(last_words=''))
            else:
                self._send([report])
                self._wait()

    def close(self) -> None:
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._send_held()

    def _wait(self) -> None:
        timer = threading.Timer(self._interval_seconds, self._end_interval)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:
            self._timer = None  # there is no thread to be had: the next crash is mailed at once
        else:
            self._timer = timer

    def _end_interval(self) -> None:
        with self._lock:
            if self._held:
                self._send_held()
                self._wait()
            else:
                self._timer = None

    def _send_held(self) -> None:
        if self._held:
            self._send(self._held)
            self._held = []


class Crashmail:
    """The listener: logs every crash, and mails those of watched processes."""

    def __init__(self, options: Options, environment: Mapping[str, str]) -> None:
        self._options = options
        self._log = make_log('crashmail')
        supervisor = Supervisor(environment, TAIL_TIMEOUT_SECONDS)
        self._names = NameCheck(options.names, supervisor, self._log)
        self._outbox = mail.Outbox(options.mail, 'crashmail', self._log)
        self._last_words = LastWords(supervisor, options.tail_lines) if options.tail_lines else None
        self._digest = Digest(options.interval_seconds, self._send) if options.interval_seconds else None
        self._server = ''

    def handle(self, event: Event) -> None:
        # First, before a mail starts the outbox' thread: a child can't import what a thread is importing.
        self._names.ask_and_tell()
        try:
            crash = find_crash(event)
        except ValueError as why:
            self._log(str(why))
            return
        if crash:
            # The event is acknowledged before the listener ends, or it would come once more.
            with uninterrupted(raising=False):
                self._tell(crash, event.server)

    def _tell(self, crash: Crash, server: str) -> None:
        self._log(crash.text)
        if not self._is_watched(crash):
            return
        self._server = server
        report = Report(crash, self._last_words.fetch(crash) if self._last_words else '')
        if self._digest:
            self._digest.add(report)
        else:
            self._send([report])

    def finish(self) -> None:
        if self._digest:
            self._digest.close()
        self._outbox.close()

    def _is_watched(self, crash: Crash) -> bool:
        return any(name.means(crash.group, crash.program) for name in self._options.names)

    def _send(self, reports: Sequence[Report]) -> None:
        subject, body = compose(reports)
        self._outbox.put(self._options.prefix + subject, body, self._server)


# One look by hand.

def send_test(options: Options, environment: Mapping[str, str]) -> int:
    """Send a test mail and print what became of it; return 0 if it was taken, else 1."""
    server = ''
    if options.configuration or 'SUPERVISOR_SERVER_URL' in environment:
        try:
            server = find_supervisor(options.configuration, environment).call('getIdentification')
        except (CantTell, Refused) as why:
            print(f'note: {why}')
    now = time.time()
    subject = f'{options.prefix}crashmail test at {timestamp(now)}'
    test = mail.Mail(subject, 'This is a test: crashmail --once was run by hand, and nothing has crashed.\n',
                     server, now, 0.0)
    deadline = time.monotonic() + mail.SEND_TIMEOUT_SECONDS
    try:
        said = mail.send(options.mail, mail.compose(options.mail, 'crashmail', test),
                         lambda: deadline - time.monotonic())
    except mail.SendFailed as why:
        print(f'unable to send: {why}')
        return 1
    print('sent "{}" to {}{}'.format(subject, ', '.join(options.mail.recipients), ': ' + said if said else ''))
    return 0


def run(options: Options) -> int:
    if options.once:
        return send_test(options, os.environ)
    crashmail = Crashmail(options, os.environ)
    return listen('crashmail', crashmail.handle, crashmail.finish)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('crashmail', __doc__, OPTIONS, build_options, run, argv)


if __name__ == '__main__':
    raise SystemExit(main())
