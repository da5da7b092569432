"""Usage: httpok [options] URL

Restart processes that are running but no longer answer their URL, and send
mail about it. httpok is an event listener of supervisor and subscribes to a
TICK event:

    [eventlistener:httpok]
    command=httpok -p web -m bob@example.com http://127.0.0.1:8080/health
    events=TICK_60
    stopwaitsecs=30

What to restart (with neither option: check and send mail only):
  -p, --program=NAME          Restart NAME: program, group:program or group:*.
                              Repeatable.
  -a, --any                   Restart every process of supervisord.

Expected response:
  -t, --timeout=SECONDS       Limit the whole check, from connecting to the end
                              of the body (default: 10). A refused connection
                              is retried until then.
  -c, --code=STATUS           Expect this status. Repeatable (default: 200).
  -b, --body=TEXT             Expect this text in the body (default: any body).

Request:
      --header='NAME: VALUE'  Send this header, which may be Host. Repeatable.
                              --header=@FILE reads headers from a file, one per
                              line.
      --unix-socket=PATH      Connect to this socket instead of the URL's host.
      --verify                Verify the certificate (default: accept any).
      --cafile=FILE           Verify it against the CA certificates in FILE, in
                              PEM format (default: those of the system).
  The URL may contain user:password@. The password may also be in
  SUPERLANCE_HTTP_PASSWORD.

Restarts:
  -e, --eager                 Check at every TICK event (default).
  -E, --not-eager             Check only if a watched process is RUNNING.
      --failures=N            Restart only after N failed checks in a row
                              (default: 1).
      --grace=TIME            Do not restart a process that has been up for
                              less than TIME (default: 0s). A TIME is seconds,
                              or a number with s, m, h or d.
      --max-restarts=N/TIME   Restart a process at most N times within TIME,
                              then leave it alone (default: no limit).
      --dry-run               Log and mail what would be restarted, but restart
                              nothing.
  -d, --coredir=DIR           Write a core dump into DIR before each restart
                              (default: none).
  -g, --gcore=CMD             Write core dumps with this command, run as
                              CMD DIR/NAME PID (default: /usr/bin/gcore -o).

Mail:
  -m, --email=ADDR            Send mail to ADDR, or to several addresses,
                              separated by commas. Repeatable (default: no
                              mail).
      --remind=TIME           Repeat the mail every TIME while the check fails
                              (default: 1h; 0: at every check).
  -n, --name=NAME             Begin the subject with "httpok [NAME]:"
                              (default: "httpok:").
  -s, --sendmail_program=CMD  Send mail with this shell command
                              (default: /usr/sbin/sendmail -t -i).
      --smtp=URL              Send mail through this server instead:
                              smtp://[user[:password]@]host[:port] or
                              smtps://... The password may also be in
                              SUPERLANCE_SMTP_PASSWORD.
      --webhook=URL           Post each notice to the webhook of a chat, with
                              or without -m. The URL may also be in
                              SUPERLANCE_WEBHOOK.
      --from=ADDR             Set the sender of mail (default: chosen by CMD;
                              with --smtp, httpok@HOST).

Diagnostics:
      --once                  Check now, print the response and what would be
                              done, and exit with status 1 if something is
                              wrong.
      --configuration=FILE    Find supervisord with this supervisord.conf
                              (--once only; default: as supervisorctl does).
  -v, --verbose               Log every check.
  -h, --help                  Print this text.
      --version               Print the version.
"""
from __future__ import annotations

import os
import time
from typing import Mapping, NamedTuple, Sequence

from superlance import __version__, check, coredump, mail
from superlance.check import BackgroundFetch, Check, Verdict, decide, describe_check, probe, read_check
from superlance.fetch import Response
from superlance.listener import Event, ExitRequest, exit_request, listen, make_log, one_line
from superlance.options import (
    COMMON_OPTIONS,
    EVERY,
    Given,
    Name,
    Option,
    Rate,
    UsageError,
    count,
    format_duration,
    parse_count,
    parse_name,
    parse_rate,
    parse_time,
    run_script,
)
from superlance.outage import (
    Kind,
    Outage,
    are_all_in_grace,
    count_restarts,
    describe_left_alone,
    describe_process,
    find_kinds,
    leave_alone,
    summarize,
)
from superlance.outbox import Outbox
from superlance.restart import SUBJECTS, Outcome, Restarter, Result
from superlance.rpc import Process, Refused, State, Supervisor, Unknown, find_supervisor, is_shutting_down
from superlance.startcheck import StartCheck, Wants, check_once, find_watched

STATE_SECONDS = 5
REMIND_SECONDS = 3600.0


# Options.

OPTIONS = (
    Option('p', 'program', parse_name),
    Option('a', 'any'),
    Option('e', 'eager'),
    Option('E', 'not-eager'),
    Option('', 'failures', parse_count),
    Option('', 'grace', parse_time),
    Option('', 'remind', parse_time),
    Option('', 'max-restarts', parse_rate),
    Option('', 'dry-run'),
    Option('d', 'coredir', str),
    Option('g', 'gcore', coredump.parse_command),
    Option('n', 'name', str),
    Option('v', 'verbose'),
    *check.OPTIONS,
    *mail.OPTIONS,
    *COMMON_OPTIONS,
)


class Options(NamedTuple):
    check: Check
    names: tuple[Name, ...]     # what to restart
    eager: bool
    failures: int
    grace_seconds: float
    remind_seconds: float
    max_restarts: Rate | None
    dry_run: bool
    core_directory: str | None
    gcore: Sequence[str]
    name: str | None
    verbose: bool
    mail: mail.Settings
    once: bool
    configuration: str | None
    warnings: tuple[str, ...]


def build_options(given: Given, arguments: list[str]) -> Options:
    """Return the Options for a command line. Raises UsageError."""
    names = (EVERY,) if 'any' in given else tuple(given.all('program'))
    eager = given.latest('eager', 'not-eager') != 'not-eager'
    if not (eager or names):
        raise UsageError('option -E requires -p or -a: without them no process is watched')
    for flag, name in (('-n', 'name'), ('-d', 'coredir'), ('-g', 'gcore')):
        if name in given and not given.last(name):
            given.ignore_empty(flag)
    # These two may add warnings.
    checked, settings = read_check(given, arguments), mail.read_settings(given)
    return Options(
        check=checked,
        names=names,
        eager=eager,
        failures=given.last('failures', 1),
        grace_seconds=given.last('grace', 0.0),
        remind_seconds=given.last('remind', REMIND_SECONDS),
        max_restarts=given.last('max-restarts'),
        dry_run='dry-run' in given,
        core_directory=given.last('coredir') or None,
        gcore=given.last('gcore') or coredump.GCORE,
        name=given.last('name') or None,
        verbose='verbose' in given,
        mail=settings,
        once='once' in given,
        configuration=given.last('configuration'),
        warnings=tuple(given.warnings))


def describe_options(options: Options) -> str:
    """Return what a listener with these options does, for the first line of its log."""
    parts = [describe_check(options.check)]
    if not options.eager:
        parts.append('only if a watched process is RUNNING')
    if options.names:
        names = ['everything'] if options.names == (EVERY,) else [str(name) for name in options.names]
        parts.append(f"{'dry run, would restart' if options.dry_run else 'restarts'} {', '.join(names)}")
        if options.failures > 1:
            parts[-1] += f' after {options.failures} failed checks in a row'
        if options.grace_seconds:
            parts.append(f'grace period {format_duration(options.grace_seconds)}')
        if options.max_restarts:
            times, seconds = options.max_restarts
            parts.append(f"at most {count(times, 'restart')} of a process in {format_duration(seconds)}")
    else:
        parts.append('restarts nothing')
    parts.append(mail.describe(options.mail))
    return f"httpok {__version__}: {'; '.join(parts)}"


def describe_wants(options: Options) -> Wants:
    """Return what is checked at start."""
    return Wants(
        names=options.names, restarts=not options.dry_run, find_problems=lambda: find_local_problems(options),
        warnings=options.warnings)


def find_local_problems(options: Options) -> list[str]:
    """Return what is wrong with the mail command and with core dumps, or ''."""
    cores = coredump.find_problems(options.core_directory, options.gcore) if options.core_directory else []
    return [mail.find_command_problem(options.mail), *cores]


# Act and report.

class Skipped(Exception):
    """The check has no result, or its result must be ignored; the message is logged when it changes."""


class Httpok:
    """The listener: at every tick, checks the URL and restarts the watched processes if that fails."""

    def __init__(self, options: Options, environment: Mapping[str, str], request: ExitRequest = exit_request) -> None:
        self._options = options
        self._request = request
        self._log = make_log('httpok')
        self._background = BackgroundFetch(request)
        self._own_group = environment.get('SUPERVISOR_GROUP_NAME')
        self._supervisor = Supervisor(environment)
        self._restarter = Restarter(
            self._supervisor, self._note_outcome, options.max_restarts, options.dry_run, request)
        self._outbox = Outbox(options.mail, 'httpok', self._log)
        self._start_check = StartCheck('httpok', describe_wants(options), environment, self._log, request)
        self._outage = Outage(options.failures, options.grace_seconds, options.remind_seconds, time.monotonic())
        self._reported: list[Outcome] = []          # by the restarter, in this tick
        self._lines: list[str] = []                 # for the mail
        # The last reasons that were logged for a skipped check, and for leaving processes alone.
        self._skipped = self._left_alone = ''
        self._server = ''
        self._failed_at = 0.0                       # the last failed check, by the monotonic clock

    def start(self) -> None:
        self._log(describe_options(self._options))
        self._start_check.run()

    def handle(self, event: Event) -> None:
        if not event.name.startswith('TICK'):
            return
        self._server = event.server
        if self._retry() or self._restarter.is_stale(event):
            return
        self._start_check.run_again()
        try:
            self._check()
        except Skipped as why:
            if str(why) != self._skipped:
                self._log(str(why))
            self._skipped = str(why)

    def finish(self) -> None:
        self._reported = []
        self._restarter.finish()
        self._mail_late()
        self._outbox.close()

    def _check(self) -> None:
        """Check the URL and act on the result. Raises Skipped."""
        url = self._options.check.url
        if not self._options.eager and not any(process.state == State.RUNNING for process in self._find_watched()):
            raise Skipped(f'{url}: not checked: no watched process is RUNNING')
        began = time.time()
        try:
            response = probe(self._options.check, self._background)
        except Unknown as why:
            raise Skipped(f'{url}: unable to check: {why}') from why
        if response is None or self._request.requested:
            raise Skipped(f'{url}: check abandoned: httpok is shutting down')
        verdict = decide(response, self._options.check)
        self._skipped = ''
        if isinstance(response, Response) and not verdict.text:
            self._handle_good(response)
        else:
            self._handle_bad(verdict, began)

    def _handle_good(self, response: Response) -> None:
        url, self._left_alone = self._options.check.url, ''
        words = f'status {response.status} in {response.seconds:.3f}s'
        restarts = self._outage.restarts
        seconds = self._outage.note_good(time.monotonic())
        if seconds is not None:
            recovered = f'recovered after {format_duration(seconds)}'
            self._log(f'{url}: {recovered}: {words}')
            lines = [words, f"{recovered} and {count(restarts, 'restart')}"] if self._options.names else [words]
            self._mail(f'{url}: {recovered}', lines)
        elif self._options.verbose:
            self._log(f'{url}: {words}')

    def _handle_bad(self, verdict: Verdict, check_began: float) -> None:
        """Restart what is to be restarted after a failed check, and send mail if it is due. Raises Skipped."""
        options, outage = self._options, self._outage
        self._failed_at = time.monotonic()      # the outage includes the time of the restarts
        watched: list[Process] = []
        trouble = ''
        is_reminder_due = outage.is_reminder_due(self._failed_at)
        if not options.names:
            if is_reminder_due or (outage.is_enough() and not outage.is_on):
                self._skip_at_shutdown(verdict)     # otherwise, no mail is sent
        elif options.grace_seconds or outage.is_enough() or is_reminder_due:
            try:
                watched = self._find_watched(verdict)
                trouble = '' if watched else 'nothing restarted: no process is watched'
            except Unknown as why:
                trouble = f'nothing restarted: {why}'
        self._lines = [verdict.text, trouble] if trouble else [verdict.text]
        self._skip_at_exit(verdict)
        if options.grace_seconds and are_all_in_grace(watched, options.grace_seconds):
            self._log(f'{options.check.url}: {verdict.text} (grace period)')
            if outage.note_bad_in_grace(self._failed_at):
                outcomes = list(filter(None, (leave_alone(process, options.grace_seconds) for process in watched)))
                self._mail_bad(verdict, outcomes, summarize(outcomes, options.grace_seconds))
        elif outage.is_enough():
            self._act(verdict, watched, trouble, check_began)
        else:
            progress = f'failed check {outage.failures + 1} of {options.failures}'
            self._log(f'{options.check.url}: {verdict.text} ({progress})')
            if outage.note_bad(self._failed_at):
                outcomes = [Outcome(process, Result.LEFT_ALONE, f'left alone: {progress}') for process in watched]
                self._mail_bad(verdict, outcomes, progress)

    def _act(self, verdict: Verdict, watched: Sequence[Process], trouble: str, check_began: float) -> None:
        self._log(f'{self._options.check.url}: {verdict.text}')
        prepare = self._dump_core if self._options.core_directory else None
        left = [leave_alone(process, self._options.grace_seconds, check_began) for process in watched]
        outcomes = [alone or self._restarter.restart(process, prepare) for process, alone in zip(watched, left)]
        kinds = find_kinds(outcomes)
        if kinds == {Kind.NOTHING} and watched:
            self._skip_at_exit(verdict)
            if any(outcome.result is Result.LEFT_ALONE for outcome in outcomes if outcome not in left):
                self._skip_at_shutdown(verdict)   # it may be the reason
        left_alone = trouble or describe_left_alone(filter(None, left))
        if left_alone and left_alone != self._left_alone:
            self._log(left_alone)
        self._left_alone = left_alone
        if self._outage.note_action(kinds, count_restarts(outcomes), self._failed_at):
            summary = summarize(outcomes, self._options.grace_seconds)
            self._mail_bad(verdict, outcomes, summary or ('nothing restarted' if self._options.names else ''))

    def _find_watched(self, verdict: Verdict | None = None) -> list[Process]:
        """Return the watched processes. Raises Unknown, and Skipped at a shutdown; without a verdict only Skipped."""
        try:
            return find_watched(self._supervisor.get_processes(), self._options.names, self._own_group)
        except (Refused, Unknown) as why:
            if is_shutting_down(why):
                raise self._make_skipped(verdict) from why
            if verdict is None:
                raise Skipped(f'{self._options.check.url}: not checked: {why}') from why
            raise Unknown(str(why)) from why

    def _skip_at_shutdown(self, verdict: Verdict) -> None:
        """Raise Skipped if supervisord is shutting down: it then answers every call with SHUTDOWN_STATE."""
        try:
            self._supervisor.call_in_helper([('getState',)], STATE_SECONDS, self._request)
        except (Refused, Unknown) as why:
            if is_shutting_down(why):
                raise self._make_skipped(verdict) from why
        self._skip_at_exit(verdict)

    def _skip_at_exit(self, verdict: Verdict) -> None:
        if self._request.requested:
            raise Skipped(f'{self._options.check.url}: {verdict.text} (ignored: httpok is shutting down)')

    def _make_skipped(self, verdict: Verdict | None) -> Skipped:
        words = verdict.text if verdict else 'not checked'
        return Skipped(f'{self._options.check.url}: {words} (ignored: supervisord is shutting down or reloading)')

    def _dump_core(self, process: Process) -> None:
        assert self._options.core_directory
        lines = coredump.write_core_dump(process, self._options.core_directory, self._options.gcore, self._request)
        self._log(lines[0])
        self._lines += lines

    def _retry(self) -> bool:
        """Retry the restarts of earlier ticks; return whether a process was started."""
        self._reported = []
        is_restarted = self._restarter.retry()
        self._mail_late()
        return is_restarted

    def _mail_late(self) -> None:
        for process, result, text in self._reported:
            if result in SUBJECTS and self._outage.note_late(result):
                subject = SUBJECTS[result].format(process.title)
                self._mail(f'{self._options.check.url}: {subject}', [f'{describe_process(process)}: {text}'])

    def _note_outcome(self, outcome: Outcome) -> None:
        self._log(outcome.text)
        self._reported.append(outcome)

    def _mail_bad(self, verdict: Verdict, outcomes: Sequence[Outcome], summary: str) -> None:
        """Send mail about a failed check; summary is the outcome in a few words, or ''."""
        lines = [*self._lines, *(f'{describe_process(outcome.process)}: {outcome.text}' for outcome in outcomes)]
        seconds = self._outage.seconds(self._failed_at)
        if seconds >= 1:
            restarts = f", {count(self._outage.restarts, 'restart')} so far" if self._options.names else ''
            lines.append(f'failing for {format_duration(seconds)}{restarts}')
        self._mail(f"{self._options.check.url}: {verdict.subject}{f' ({summary})' if summary else ''}", lines)

    def _mail(self, subject: str, lines: Sequence[str]) -> None:
        listener = f'httpok [{self._options.name}]' if self._options.name else 'httpok'
        text = '\n'.join(map(one_line, lines))
        self._outbox.put(f'{listener}: {subject}', f'{self._options.check.url}\n\n{text}\n', self._server)


# From the command line.

def run_once(options: Options, environment: Mapping[str, str]) -> int:
    """Print the response, what would be done and what is wrong; return the exit status."""
    supervisor = find_supervisor(options.configuration, environment) if options.names else Supervisor({})
    problems = check_once('httpok', describe_wants(options), supervisor, environment)
    print(f'url      {options.check.url}')
    try:
        response = probe(options.check, BackgroundFetch(ExitRequest()))
    except Unknown as why:
        print(f'verdict  unable to check: {one_line(why)}')
        verdict = None
    else:
        assert response
        verdict = decide(response, options.check)
        if isinstance(response, Response):
            print(f'status   {response.status_line}\ntime     {response.seconds:.3f}s')
            text = options.check.search.text
            if text and response.has_text is not None:
                print(f"body     {'contains' if response.has_text else 'does not contain'} {text!r}")
        print(f"verdict  {one_line(verdict.text or 'ok')}")
    is_bad = verdict is None or bool(verdict.text)
    if options.names and not any(problem.is_unreachable for problem in problems):
        try:
            for process in find_watched(supervisor.get_processes(), options.names,
                                        environment.get('SUPERVISOR_GROUP_NAME')):
                print(f'watched  {describe_watched(process, options, verdict)}')
        except (Unknown, Refused) as why:
            print(f'watched  unknown: {one_line(why)}')
            is_bad = True
    for problem in problems:
        print(problem.line)
    return 1 if is_bad or any(problem.fatal for problem in problems) else 0


def describe_watched(process: Process, options: Options, verdict: Verdict | None) -> str:
    """Return a watched process, and what would be done with it after enough failed checks."""
    words = describe_process(process)
    if verdict is None or not verdict.text:
        return words
    left = leave_alone(process, options.grace_seconds)
    return f"{words}: {left.text if left else 'would be restarted'}"


def run(options: Options) -> int:
    if options.once:
        return run_once(options, os.environ)
    httpok = Httpok(options, os.environ)
    return listen('httpok', httpok.handle, httpok.finish, httpok.start)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script('httpok', __doc__, OPTIONS, build_options, run, argv)


if __name__ == '__main__':
    raise SystemExit(main())
