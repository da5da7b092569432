"""Usage: crashmail [options]

Send mail when a process exits unexpectedly, or when supervisord gives up
starting it. crashmail is an event listener of supervisor and subscribes to two
events:

    [eventlistener:crashmail]
    command=crashmail -m bob@example.com
    events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
    buffer_size=1000

What to report:
  -p, --program=NAME          Report crashes of NAME: program, group,
                              group:program or group:*. Repeatable.
  -a, --any                   Report crashes of every process (default).

Reports:
      --tail=N                Add the last N lines of the process' stdout and
                              stderr logs (default: none).
      --interval=TIME         Report the first crash at once, and those of the
                              next TIME in one mail (default: one mail for each
                              crash). A TIME is seconds, or a number with s, m,
                              h or d.
      --shutdown              Shut supervisord down after reporting a crash, so
                              that its container exits.

Mail:
  -m, --email=ADDR            Send mail to ADDR, or to several addresses,
                              separated by commas. Repeatable (default: no
                              mail).
  -o, --optionalheader=TEXT   Begin the subject with "TEXT:"
                              (default: nothing).
  -s, --sendmail_program=CMD  Send mail with this shell command, even without
                              -m (default: /usr/sbin/sendmail -t -i).
      --smtp=URL              Send mail through this server instead:
                              smtp://[user[:password]@]host[:port] or
                              smtps://... The password may also be in
                              SUPERLANCE_SMTP_PASSWORD.
      --webhook=URL           Post each notice to the webhook of a chat, with
                              or without -m. The URL may also be in
                              SUPERLANCE_WEBHOOK.
      --from=ADDR             Set the sender of mail (default: chosen by CMD;
                              with --smtp, crashmail@HOST).

Diagnostics:
      --once                  Send a test notice now, print the answers, and
                              exit with status 1 if something is wrong.
      --configuration=FILE    Find supervisord with this supervisord.conf
                              (--once only; default: as supervisorctl does).
  -h, --help                  Print this text.
      --version               Print the version.
"""
from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Callable, Mapping, NamedTuple, Sequence

from superlance import __version__, mail
from superlance.command import Deadline
from superlance.listener import Event, ExitRequest, exit_request, listen, make_log, parse_tokens, start_timer, timestamp
from superlance.options import (
    COMMON_OPTIONS,
    EVERY,
    Given,
    Name,
    Option,
    UsageError,
    count,
    format_duration,
    join_names,
    parse_count,
    parse_name,
    parse_timeout,
    run_script,
)
from superlance.outbox import Outbox
from superlance.rpc import Refused, Supervisor, Unknown, find_supervisor, make_title
from superlance.startcheck import StartCheck, Wants, check_once

if TYPE_CHECKING:
    from superlance.crashlog import DetailsReader
    from superlance.shutdown import Shutdown

EXITED = 'PROCESS_STATE_EXITED'
FATAL = 'PROCESS_STATE_FATAL'

# How many different logs one mail has at most; for the other crashes, it has only a line each. Of a process that goes
# on crashing, it does not list all: mail servers reject mail of more than 10 MB or so.
LOGS_IN_MAIL = 50
CRASHES_IN_MAIL = 1000
NAMES_IN_SUBJECT = 10
START_SECONDS = 5.0   # events are waiting
SHUTDOWN_CALL_SECONDS = 5
# An event that arrives so long after the READY has not waited in supervisord's buffer.
FRESH_SECONDS = 0.2


# Options.

OPTIONS = (
    Option('p', 'program', parse_name),
    Option('a', 'any'),
    Option('o', 'optionalheader', str),
    Option('', 'tail', parse_count),
    Option('', 'interval', parse_timeout),
    Option('', 'shutdown'),
    *mail.OPTIONS,
    *COMMON_OPTIONS,
)


class Options(NamedTuple):
    names: tuple[Name, ...]     # the processes to watch
    prefix: str
    tail_lines: int | None
    interval_seconds: float | None
    shutdown: bool
    mail: mail.Settings
    once: bool
    configuration: str | None
    warnings: tuple[str, ...]


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for a command line. Raises UsageError."""
    settings = mail.read_settings(given, without_recipients=True)
    if 'once' in given and not settings.sends_anything:
        raise UsageError('option --once sends a test notice: it requires -m, -s or --webhook')
    given.ignore_arguments('crashmail', arguments)
    prefix = given.last('optionalheader')
    if prefix == '':
        given.ignore_empty('-o')
    names = tuple(given.all('program'))
    return Options(
        names=(EVERY,) if 'any' in given or not names else names,
        prefix=prefix + ': ' if prefix else '',
        tail_lines=given.last('tail'),
        interval_seconds=given.last('interval'),
        shutdown='shutdown' in given,
        mail=settings,
        once='once' in given,
        configuration=given.last('configuration'),
        warnings=tuple(given.warnings))


def describe_options(options: Options) -> str:
    """Return what a crashmail with these options does, in one line."""
    names = 'every process' if options.names == (EVERY,) else ', '.join(map(str, options.names))
    what = f'reports crashes of {names}'
    if options.tail_lines:
        what += f' with the last {count(options.tail_lines, "log line")}'
    if options.interval_seconds:
        what += f', at most one mail per {format_duration(options.interval_seconds)}'
    if options.shutdown:
        what += ', then shuts supervisord down'
    return f'crashmail {__version__}: {what}; {mail.describe(options.mail)}'


def describe_wants(options: Options) -> Wants:
    """Return what is to be checked at start."""
    return Wants(names=options.names, tail=bool(options.tail_lines), warnings=options.warnings,
                 find_problems=lambda: [mail.find_command_problem(options.mail)])


# Decide.

class Crash(NamedTuple):
    """A process that has exited unexpectedly, or that supervisord has given up starting."""

    group: str
    program: str
    pid: str            # '' if supervisord has given up starting it
    when: float         # epoch seconds
    reason: str = ''    # '' if it is not known

    @property
    def title(self) -> str:
        return make_title(self.group, self.program)

    @property
    def subject(self) -> str:
        if self.pid:
            return f'{self.program} crashed at {timestamp(self.when)}'
        return f'{self.program} is FATAL: supervisord gave up starting it at {timestamp(self.when)}'

    @property
    def text(self) -> str:
        what = (f'{self.title} (pid {self.pid}) exited unexpectedly' if self.pid
                else f'{self.title} is FATAL: supervisord gave up starting it')
        return f'{what}: {self.reason}' if self.reason else what


def find_crash(event: Event) -> Crash | None:
    """Return the Crash that an event reports, None if it reports none.

    Raises ValueError if the event can't be parsed.
    """
    if event.name not in (EXITED, FATAL):
        return None
    tokens = parse_tokens(event.payload.partition('\n')[0])
    if event.name == EXITED and tokens.get('expected') == '1':
        return None
    if 'processname' not in tokens or (event.name == EXITED and tokens.get('expected') != '0'):
        raise ValueError(f'unable to parse a {event.name} event: {event.payload[:200]!r}')
    program = tokens['processname']
    pid = (tokens.get('pid') or 'unknown') if event.name == EXITED else ''
    return Crash(tokens.get('groupname', program), program, pid, event.received)


def is_watched(crash: Crash, names: Sequence[Name]) -> bool:
    """Return whether one of the names matches a crash; a bare name also matches a group."""
    return any(name.matches(crash.group, crash.program) or (name.group is None and name.program == crash.group)
               for name in names)


# Report.

class Report(NamedTuple):
    """A crash, and the last log lines of the process or why there are none."""

    crash: Crash
    logs: str = ''


def compose(reports: Sequence[Report], omitted: int = 0, unlisted: int = 0) -> tuple[str, str]:
    """Return the subject and body of the mail for one or several crashes.

    omitted is the number of missing logs, unlisted that of further crashes of the same processes.
    """
    lines = [f'{timestamp(report.crash.when)}: {report.crash.text}' for report in reports]
    if len(reports) == 1:
        return reports[0].crash.subject, '\n'.join([*lines, '', reports[0].logs])
    titles = sorted({report.crash.title for report in reports})
    since = timestamp(reports[0].crash.when)[11:19]
    if unlisted:
        lines.append(f'{count(unlisted, "more crash", "more crashes")} of these processes: see the log of crashmail.')
    subject = f'{len(reports) + unlisted} crashes since {since}: {join_names(titles, NAMES_IN_SUBJECT)}'
    same_logs: dict[str, list[Crash]] = {}
    for report in reports:
        if report.logs:
            same_logs.setdefault(report.logs, []).append(report.crash)
    for logs, crashes in same_logs.items():
        lines += ['', f'{_describe_owners(crashes)}:', logs]
        if len(crashes) > 1:
            lines.append(f'(identical for {count(len(crashes) - 1, "more crash", "more crashes")})')
    if omitted:
        lines += ['', f'Not included: the logs of {count(omitted, "more crash", "more crashes")}.']
    return subject, '\n'.join(lines)


def _describe_owners(crashes: Sequence[Crash]) -> str:
    """Return whose logs follow in a mail."""
    if len(crashes) == 1 and crashes[0].pid:
        return f'{crashes[0].title} (pid {crashes[0].pid})'
    return join_names(sorted({crash.title for crash in crashes}))


class Digest:
    """Sends the first report at once, and those of the next interval together."""

    def __init__(self, interval_seconds: float, send: Callable[[Sequence[Report], int, int], None]) -> None:
        self._interval_seconds = interval_seconds
        self._send = send
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._held: list[Report] = []
        self._logs: dict[str, str] = {}     # the different logs of these reports
        self._omitted = self._unlisted = 0

    def add(self, report: Report) -> None:
        with self._lock:
            if self._timer:
                self._hold(report)
            else:
                self._send([report], 0, 0)
                self._wait()

    def close(self) -> None:
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._send_held()

    def _hold(self, report: Report) -> None:
        if len(self._held) >= CRASHES_IN_MAIL and any(held.crash.title == report.crash.title for held in self._held):
            self._unlisted += 1
            return
        if report.logs in self._logs or len(self._logs) < LOGS_IN_MAIL:
            report = report._replace(logs=self._logs.setdefault(report.logs, report.logs))
        else:
            report = report._replace(logs='')
            self._omitted += 1
        self._held.append(report)

    def _wait(self) -> None:
        # If no thread can be started, the next crash is sent at once.
        self._timer = start_timer(self._interval_seconds, self._end_interval)

    def _end_interval(self) -> None:
        with self._lock:
            if self._held:
                self._send_held()
                self._wait()
            else:
                self._timer = None

    def _send_held(self) -> None:
        if self._held:
            self._send(self._held, self._omitted, self._unlisted)
            self._held, self._logs, self._omitted, self._unlisted = [], {}, 0, 0


# The listener.

class Crashmail:
    """Logs every crash, and reports those of watched processes."""

    def __init__(self, options: Options, environment: Mapping[str, str], request: ExitRequest = exit_request) -> None:
        self._options = options
        self._environment = environment
        self._request = request
        self._log = make_log('crashmail')
        self._own_group = environment.get('SUPERVISOR_GROUP_NAME')
        self._outbox = Outbox(options.mail, 'crashmail', self._log)
        self._digest = Digest(options.interval_seconds, self._send) if options.interval_seconds else None
        self._shutdown: Shutdown | None = None
        if options.shutdown:
            from superlance.shutdown import Shutdown

            self._shutdown = Shutdown(Supervisor(environment, SHUTDOWN_CALL_SECONDS), self._log)
        self._start_check = StartCheck('crashmail', describe_wants(options), environment, self._log, request)
        self._details_reader: DetailsReader | None = None
        self._server = ''
        self._ready_at = self._since = 0.0      # epoch seconds; `since`: see DetailsReader.read

    def start(self) -> None:
        """Log what this listener does, and what would keep it from doing that."""
        self._log(describe_options(self._options))
        deadline = Deadline(START_SECONDS)
        self._start_check.run()
        # If no time is left, supervisord has not answered.
        if self._options.tail_lines and deadline.seconds_left() > 0:
            self._get_details_reader().prepare(deadline.seconds_left(), self._request)
        self._ready_at = self._since = time.time()

    def handle(self, event: Event) -> None:
        if event.received - self._ready_at >= FRESH_SECONDS:
            self._since = self._ready_at
        try:
            crash = find_crash(event)
        except ValueError as why:
            self._log(str(why))
            crash = None
        if crash:
            self._server = event.server
            self._handle(crash)
        # The crash comes first: supervisord is restarting the process.
        self._start_check.run_again()
        self._ready_at = time.time()

    def finish(self) -> None:
        if self._shutdown:
            self._shutdown.close()
        if self._digest:
            self._digest.close()
        self._outbox.close()

    def _handle(self, crash: Crash) -> None:
        watched = is_watched(crash, self._options.names) and not (self._shutdown and self._shutdown.accepted)
        found = self._get_details_reader().read(crash.group, crash.program, crash.pid, watched, self._since)
        report = Report(crash._replace(reason=found.reason), found.logs)
        self._log(report.crash.text)
        if not watched:
            return
        if self._digest:
            self._digest.add(report)
        else:
            self._send([report])
        if self._shutdown and crash.group != self._own_group:
            self._shutdown.request()

    def _get_details_reader(self) -> DetailsReader:
        if self._details_reader is None:
            from superlance.crashlog import DetailsReader

            self._details_reader = DetailsReader(self._environment, self._options.tail_lines, self._log)
        return self._details_reader

    def _send(self, reports: Sequence[Report], omitted: int = 0, unlisted: int = 0) -> None:
        subject, body = compose(reports, omitted, unlisted)
        self._outbox.put(self._options.prefix + subject, body, self._server)


# --once.

def run_once(options: Options, environment: Mapping[str, str]) -> int:
    """Print the problems that are found at start, send a test notice and print the result; return the exit status."""
    supervisor = find_supervisor(options.configuration, environment)
    print(describe_options(options))
    problems = check_once('crashmail', describe_wants(options), supervisor, environment)
    for problem in problems:
        print(problem.line)
    server = ''
    with suppress(Unknown, Refused):    # check_once has said why
        server = supervisor.call('getIdentification')
    lines, accepted = mail.send_test(
        options.mail, 'crashmail', f'{options.prefix}crashmail test at {timestamp(time.time())}',
        'This is a test from crashmail --once: nothing has crashed.', server)
    for line in lines:
        print(line)
    return int(not accepted or any(problem.fatal for problem in problems))


def run(options: Options) -> int:
    if options.once:
        return run_once(options, os.environ)
    crashmail = Crashmail(options, os.environ)
    return listen('crashmail', crashmail.handle, crashmail.finish, crashmail.start)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('crashmail', __doc__, OPTIONS, build_options, run, argv, ignores_arguments=True)


if __name__ == '__main__':
    raise SystemExit(main())
