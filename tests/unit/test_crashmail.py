"""crashmail: options, which events are crashes, what is reported, the digest and the shutdown."""
from __future__ import annotations

import re
import threading
from typing import Any, Callable, Sequence

import pytest
from support import NO_SUPERVISORD, run_in_process
from table import for_each

from superlance import crashlog, crashmail, mail
from superlance.crashlog import Details
from superlance.crashmail import Crash, Crashmail, Digest, Report, compose, describe_options, find_crash
from superlance.listener import Event, ExitRequest, timestamp
from superlance.options import EVERY, Name, UsageError, read_argv
from superlance.rpc import Refused, Unknown
from superlance.shutdown import Shutdown

EXITED, FATAL = 'PROCESS_STATE_EXITED', 'PROCESS_STATE_FATAL'
NOW = 1700000000.123
CRASHED = Crash('web', 'web', '123', NOW)
GIVEN_UP = Crash('bar', 'x', '', NOW)


# Options.

def build(*argv: str) -> crashmail.Options:
    return crashmail.build_options(*read_argv(argv, crashmail.OPTIONS))


@pytest.mark.parametrize(('argv', 'error'), [
    (['-p', '*'], "option -p: '*' is not a process name; write program, group:program or group:*"),
    (['--tail=0'], "option --tail: '0' is not a count; write a whole number, at least 1"),
    (['--interval=0'], "option --interval: '0' must be greater than 0"),
    (['--once'], 'option --once sends a test notice: it requires -m, -s or --webhook'),
])
def test_bad_options(argv: list[str], error: str) -> None:
    with pytest.raises(UsageError) as why:
        build(*argv)
    assert str(why.value) == error


def test_options_by_default() -> None:
    assert build() == crashmail.Options(
        names=(EVERY,), prefix='', tail_lines=None, interval_seconds=None, shutdown=False,
        mail=mail.Settings(), once=False, configuration=None, warnings=())


@for_each('argv, field, value', [
    (['-a'], 'names', (EVERY,)),
    (['-p', 'web', '--program=bar:x', '-p', 'bar:*'], 'names',
     (Name(None, 'web'), Name('bar', 'x'), Name('bar', None))),
    (['-p', 'web', '--any'], 'names', (EVERY,)),
    (['-o', 'db1'], 'prefix', 'db1: '),
    (['--optionalheader=db1'], 'prefix', 'db1: '),
    (['--tail=20'], 'tail_lines', 20),
    (['--interval=10m'], 'interval_seconds', 600),
    (['--shutdown'], 'shutdown', True),
    (['--once', '-m', 'a@b.c'], 'once', True),
    (['--configuration=x.conf'], 'configuration', 'x.conf'),
    (['-m', 'a@b.c', '-s', 'true'], 'mail', mail.Settings(('a@b.c',), 'true')),
    # What superlance 2.0.0 accepts.
    (['-s', 'true'], 'mail', mail.Settings(sendmail='true', without_recipients=True)),
    (['-o', ''], 'prefix', ''),
    (['-o', ''], 'warnings', ('ignored option -o: its value is empty',)),
    (['-a', 'web', 'smtp://robot:secret@host'], 'warnings', (
        "ignored argument 'web': crashmail takes options only; a value that contains spaces needs quotes",
        "ignored argument 'smtp://robot:***@host': crashmail takes options only; a value that contains spaces needs "
        'quotes')),
    (['-a', 'web'], 'names', (EVERY,)),
])
def test_each_option_has_its_field(argv: list[str], field: str, value: Any) -> None:
    assert getattr(build(*argv), field) == value


@pytest.mark.parametrize(('argv', 'line'), [
    ([], 'reports crashes of every process; no mail'),
    (['-p', 'web', '-p', 'bar:*', '-m', 'a@b.c'],
     'reports crashes of web, bar:*; mail to a@b.c through /usr/sbin/sendmail -t -i'),
    (['--tail=20', '--interval=10m', '--shutdown'],
     'reports crashes of every process with the last 20 log lines, at most one mail per 10m, '
     'then shuts supervisord down; no mail'),
    (['--tail=1', '-s', 'true'],
     'reports crashes of every process with the last 1 log line; mail through the -s command'),
])
def test_first_line_of_the_log(argv: list[str], line: str) -> None:
    assert re.fullmatch(r'crashmail [\w.]+: (.*)', describe_options(build(*argv)))[1] == line  # type: ignore[index]


# Decide.

@for_each('name, payload, crash', [
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123', CRASHED),
    (EXITED, 'processname:x groupname:bar from_state:RUNNING expected:0 pid:7', Crash('bar', 'x', '7', NOW)),
    (EXITED, 'pid:123 expected:0 from_state:RUNNING groupname:web processname:web', CRASHED),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123 tries:3 new', CRASHED),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123\nfurther:lines', CRASHED),
    (EXITED, 'processname:größe groupname:größe from_state:RUNNING expected:0 pid:7',
     Crash('größe', 'größe', '7', NOW)),
    (EXITED, 'processname:web expected:0', Crash('web', 'web', 'unknown', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid', Crash('web', 'web', 'unknown', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:', Crash('web', 'web', 'unknown', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:1 pid:123', None),
    (EXITED, 'expected:1', None),
    (FATAL, 'processname:x groupname:bar from_state:BACKOFF', GIVEN_UP),
    (FATAL, 'processname:x', Crash('x', 'x', '', NOW)),
    ('PROCESS_STATE_STOPPED', 'processname:web groupname:web from_state:STOPPING pid:123', None),
    ('TICK_5', 'when:1700000000', None),
    ('', '', None),
])
def test_which_events_are_crashes(name: str, payload: str, crash: Crash | None) -> None:
    assert find_crash(Event(name, payload, 'supervisor', NOW)) == crash


@for_each('name, payload', [
    (EXITED, ''),
    (EXITED, 'processname:web groupname:web from_state:RUNNING'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expec'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:2 pid:1'),
    (EXITED, 'groupname:web from_state:RUNNING expected:0 pid:123'),
    (EXITED, '\nprocessname:web expected:0'),
    (FATAL, 'groupname:bar from_state:BACKOFF'),
])
def test_events_that_cannot_be_parsed(name: str, payload: str) -> None:
    with pytest.raises(ValueError, match='unable to parse') as why:
        find_crash(Event(name, payload, 'supervisor', NOW))
    assert str(why.value) == f'unable to parse a {name} event: {payload!r}'


@for_each('argv, watched', [
    ([], ['web:web', 'bar:x', 'baz:x', 'baz:web']),
    (['-p', 'x'], ['bar:x', 'baz:x']),
    (['-p', 'bar:x'], ['bar:x']),
    (['-p', 'bar:*', '-p', 'web:web'], ['web:web', 'bar:x']),
    (['-p', 'baz'], ['baz:x', 'baz:web']),      # a group
    (['-p', 'web'], ['web:web', 'baz:web']),
    (['-p', 'y'], []),
])
def test_which_crashes_are_watched(argv: list[str], watched: list[str]) -> None:
    names = build(*argv).names
    pairs = [('web', 'web'), ('bar', 'x'), ('baz', 'x'), ('baz', 'web')]
    crashes = [Crash(group, program, '1', NOW) for group, program in pairs]
    assert [f'{crash.group}:{crash.program}' for crash in crashes if crashmail.is_watched(crash, names)] == watched


# Report.

@pytest.mark.parametrize(('crash', 'subject', 'text'), [
    (CRASHED, 'web crashed at {}', 'web (pid 123) exited unexpectedly'),
    (CRASHED._replace(reason='exit status 3'), 'web crashed at {}', 'web (pid 123) exited unexpectedly: exit status 3'),
    (CRASHED._replace(group='bar'), 'web crashed at {}', 'bar:web (pid 123) exited unexpectedly'),
    (GIVEN_UP, 'x is FATAL: supervisord gave up starting it at {}', 'bar:x is FATAL: supervisord gave up starting it'),
    (GIVEN_UP._replace(reason="can't find command '/x'"), 'x is FATAL: supervisord gave up starting it at {}',
     "bar:x is FATAL: supervisord gave up starting it: can't find command '/x'"),
])
def test_mail_for_one_crash(crash: Crash, subject: str, text: str) -> None:
    assert compose([Report(crash, 'logs')]) == (subject.format(timestamp(NOW)), f'{timestamp(NOW)}: {text}\n\nlogs')
    assert compose([Report(crash)])[1] == f'{timestamp(NOW)}: {text}\n\n'


def test_mail_for_several_crashes() -> None:
    reports = [Report(CRASHED._replace(pid=str(number), when=NOW + number, reason=f'exit status {number}'), 'boom')
               for number in range(10)]
    reports += [Report(CRASHED), Report(Crash('bar', 'x', '77', NOW + 20), 'no file'),
                Report(GIVEN_UP._replace(when=NOW + 21), 'another')]
    subject, body = compose(reports, 2)
    assert subject == f'13 crashes since {timestamp(NOW)[11:19]}: bar:x, web'
    lines = [f'{timestamp(report.crash.when)}: {report.crash.text}' for report in reports]
    assert body == '\n'.join([
        *lines, '', 'web:', 'boom', '(identical for 9 more crashes)', '', 'bar:x (pid 77):', 'no file', '', 'bar:x:',
        'another', '',
        'Not included: the logs of 2 more crashes.'])


@pytest.mark.parametrize(('number', 'rest'), [
    (10, 'p00, p01, p02, p03, p04, p05, p06, p07, p08, p09'),
    (12, 'p00, p01, p02, p03, p04, p05, p06, p07, p08, p09 and 2 more'),
])
def test_subject_for_several_processes(number: int, rest: str) -> None:
    reports = [Report(Crash(f'p{n:02}', f'p{n:02}', '1', NOW), 'the same') for n in reversed(range(number))]
    subject, body = compose(reports)
    assert subject == f'{number} crashes since {timestamp(NOW)[11:19]}: {rest}'
    assert f'\n\np00, p01, p02 and {number - 3} more:\nthe same\n(identical for {number - 1} more crashes)' in body


# The digest.

class FakeTimer:
    """A timer that fires when the test decides."""

    timers: list[FakeTimer] = []    # noqa: RUF012
    daemon = False

    def __init__(self, seconds: float, fire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.fire = fire
        self.running = False
        self.timers.append(self)

    def start(self) -> None:
        assert self.daemon, 'it must not keep the listener from exiting'
        self.running = True

    def cancel(self) -> None:
        self.running = False


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTimer]:
    monkeypatch.setattr(FakeTimer, 'timers', [])
    monkeypatch.setattr(threading, 'Timer', FakeTimer)
    return FakeTimer.timers


class Sent:
    """What a Digest has sent."""

    def __init__(self) -> None:
        self.mails: list[tuple[list[Report], int]] = []

    def __call__(self, reports: Sequence[Report], omitted: int, unlisted: int) -> None:
        self.mails.append((list(reports), omitted))
        self.unlisted = unlisted


def make_reports(number: int) -> list[Report]:
    return [Report(CRASHED._replace(pid=str(pid)), 'logs') for pid in range(number)]


def test_digest(timers: list[FakeTimer]) -> None:
    sent = Sent()
    digest = Digest(600, sent)
    a, b, c, d, e, f = make_reports(6)
    digest.add(a)
    assert sent.mails == [([a], 0)]                         # the first at once
    digest.add(b)
    digest.add(c)
    assert (len(sent.mails), timers[-1].seconds) == (1, 600)
    timers[-1].fire()
    assert sent.mails[1:] == [([b, c], 0)]                  # the others of the interval together
    digest.add(d)
    assert (len(sent.mails), len(timers)) == (2, 2)         # which begins another interval
    timers[-1].fire()
    assert sent.mails[2:] == [([d], 0)]
    timers[-1].fire()
    assert (len(sent.mails), len(timers)) == (3, 3)         # nothing to send, and no further interval
    digest.add(e)
    assert sent.mails[3:] == [([e], 0)]                     # the first at once again
    digest.add(f)
    digest.close()
    assert sent.mails[4:] == [([f], 0)]                     # none is lost at exit
    assert not timers[-1].running
    timers[-1].fire()                                       # the timer had fired just before
    assert len(sent.mails) == 5


@pytest.mark.parametrize('crashes', [0, 1])
def test_empty_digest_sends_nothing_at_exit(timers: list[FakeTimer], crashes: int) -> None:
    sent = Sent()
    digest = Digest(600, sent)
    for report in make_reports(crashes):
        digest.add(report)
    digest.close()
    assert len(sent.mails) == crashes


def test_digest_of_a_storm_keeps_every_crash_and_a_limited_number_of_logs(timers: list[FakeTimer]) -> None:
    sent = Sent()
    digest = Digest(600, sent)
    reports = [Report(CRASHED, f'logs {number // 2}') for number in range(201)]
    for report in reports:
        digest.add(report)
    digest.close()
    held, omitted = sent.mails[1]
    assert [report.crash for report in held] == [report.crash for report in reports[1:]]
    assert len({report.logs for report in held if report.logs}) == crashmail.LOGS_IN_MAIL
    assert omitted == sum(1 for report in held if not report.logs) == 101


def test_digest_does_not_grow_with_a_process_that_crashes_all_day(timers: list[FakeTimer]) -> None:
    sent = Sent()
    digest = Digest(600, sent)
    for report in make_reports(1 + crashmail.CRASHES_IN_MAIL + 5):
        digest.add(report)
    other = Report(CRASHED._replace(program='db', when=NOW + 1))
    digest.add(other)
    digest.add(other)
    timers[-1].fire()
    held, _ = sent.mails[1]
    assert (len(held), held[-1].crash, sent.unlisted) == (crashmail.CRASHES_IN_MAIL + 1, other.crash, 6)
    subject, body = compose(held, 0, sent.unlisted)
    assert subject == f'1007 crashes since {timestamp(NOW)[11:19]}: web, web:db'
    assert f'{timestamp(NOW + 1)}: {other.crash.text}\n6 more crashes of these processes: see the log' in body
    digest.add(other)
    digest.close()
    assert sent.mails[2:] == [([other], 0)] and sent.unlisted == 0


@pytest.mark.usefixtures('_no_threads')
def test_digest_if_no_thread_can_be_started() -> None:
    sent = Sent()
    digest = Digest(600, sent)
    a, b = make_reports(2)
    digest.add(a)
    digest.add(b)
    assert sent.mails == [([a], 0), ([b], 0)]


# The shutdown.

class Answers:
    """A supervisord that gives these answers to shutdown, and then always accepts it."""

    def __init__(self, *answers: Exception) -> None:
        self.answers = list(answers)
        self.calls: list[str] = []

    def call(self, method: str) -> bool:
        self.calls.append(method)
        if self.answers:
            raise self.answers.pop(0)
        return True


NO_ANSWER, NO_PASSWORD = Unknown('no answer'), Unknown('no password')


def make_shutdown(*answers: Exception) -> tuple[Shutdown, Answers, list[str]]:
    supervisord = Answers(*answers)
    lines: list[str] = []
    return Shutdown(supervisord, lines.append), supervisord, lines  # type: ignore[arg-type]


@pytest.mark.parametrize(('answers', 'line'), [
    ([], 'asked supervisord to shut down'),
    ([Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE')], 'supervisord is already shutting down'),
])
def test_shutdown_that_is_accepted(timers: list[FakeTimer], answers: list[Exception], line: str) -> None:
    shutdown, supervisord, lines = make_shutdown(*answers)
    shutdown.request()
    shutdown.request()
    shutdown.close()
    assert (shutdown.accepted, supervisord.calls, lines, timers) == (True, ['shutdown'], [line], [])


def test_shutdown_is_retried_with_a_back_off(timers: list[FakeTimer]) -> None:
    shutdown, supervisord, lines = make_shutdown(*[NO_ANSWER] * 5, NO_PASSWORD, Refused('FAILED', 'FAILED'), NO_ANSWER)
    shutdown.request()
    shutdown.request()      # another crash does not wait for supervisord again
    assert (len(supervisord.calls), shutdown.accepted) == (1, False)
    for _ in range(8):
        timers[-1].fire()
    assert shutdown.accepted
    assert [timer.seconds for timer in timers] == [1, 2, 4, 8, 16, 32, 60, 60]
    retries = [f'unable to shut down supervisord, will retry: {why}'
               for why in ('no answer', 'no password', 'FAILED', 'no answer')]
    assert lines == [*retries, 'asked supervisord to shut down']


def test_shutdown_is_not_retried_when_the_listener_exits(timers: list[FakeTimer]) -> None:
    shutdown, supervisord, _ = make_shutdown(NO_ANSWER)
    shutdown.request()
    shutdown.close()
    assert not timers[-1].running
    timers[-1].fire()       # the timer had fired just before
    assert len(supervisord.calls) == 1


@pytest.mark.usefixtures('_no_threads')
def test_shutdown_if_no_thread_can_be_started_is_requested_at_the_next_crash() -> None:
    shutdown, supervisord, _ = make_shutdown(NO_ANSWER)
    shutdown.request()
    shutdown.request()
    assert (shutdown.accepted, len(supervisord.calls)) == (True, 2)


# The listener.

class FakeDetailsReader:
    """Finds the same about every crash."""

    def __init__(self, environment: object, tail_lines: int | None, log: object) -> None:
        self.tail_lines = tail_lines

    def prepare(self, seconds: float, request: object) -> None:
        pass

    def read(self, group: str, program: str, pid: str, with_logs: bool, since: float) -> Details:
        self.since = since
        return Details('exit status 3', f'{self.tail_lines} lines' if with_logs and self.tail_lines else '')


class FakeOutbox:
    def __init__(self) -> None:
        self.notices: list[tuple[str, str, str]] = []

    def put(self, subject: str, body: str, server: str) -> None:
        self.notices.append((subject, body, server))

    def close(self) -> None:
        pass


class Rig:
    """A crashmail with fakes around it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *argv: str, shutdown_answers: Sequence[Exception] = ()) -> None:
        self.outbox = FakeOutbox()
        self.supervisord = Answers(*shutdown_answers)
        self.lines: list[str] = []
        monkeypatch.setattr(crashlog, 'DetailsReader', FakeDetailsReader)
        monkeypatch.setattr(crashmail, 'Outbox', lambda *_: self.outbox)
        monkeypatch.setattr(crashmail, 'Supervisor', lambda *_: self.supervisord)
        monkeypatch.setattr(crashmail, 'make_log', lambda _: self.lines.append)
        environment = {'SUPERVISOR_SERVER_URL': NO_SUPERVISORD, 'SUPERVISOR_GROUP_NAME': 'listener'}
        self.crashmail = Crashmail(build(*argv), environment, ExitRequest())

    def crash(self, program: str = 'web', group: str = 'web', name: str = EXITED, expected: int = 0,
              when: float = NOW) -> None:
        self.crashmail.handle(Event(
            name, f'processname:{program} groupname:{group} from_state:RUNNING expected:{expected} pid:7', 'sup', when))

    @property
    def subjects(self) -> list[str]:
        return [subject.partition(' crashed')[0] for subject, _, _ in self.outbox.notices]


def test_every_crash_is_logged_and_those_of_watched_processes_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, '-p', 'web', '-o', 'db1', '--tail=5')
    rig.crash()
    rig.crash('db', 'db')
    rig.crash(expected=1)
    rig.crashmail.handle(Event(EXITED, 'processname:web expec', 'sup', NOW))
    rig.crashmail.finish()
    assert [line for line in rig.lines if NO_SUPERVISORD not in line] == [    # which the start check reports
        'web (pid 7) exited unexpectedly: exit status 3', 'db (pid 7) exited unexpectedly: exit status 3',
        "unable to parse a PROCESS_STATE_EXITED event: 'processname:web expec'"]
    assert rig.outbox.notices == [(
        f'db1: web crashed at {timestamp(NOW)}',
        f'{timestamp(NOW)}: web (pid 7) exited unexpectedly: exit status 3\n\n5 lines', 'sup')]


def test_crashes_whose_events_may_have_waited_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.crashmail.start()
    found = []
    for waited_seconds in (0, 0.1, 0.3, 0.1):
        ready_at = rig.crashmail._ready_at
        rig.crash(when=ready_at + waited_seconds)
        reader: Any = rig.crashmail._details_reader
        found.append((reader.since, ready_at))
    assert found[0][0] == found[1][0] == found[0][1]
    assert found[2][0] == found[3][0] == found[2][1]


def test_shutdown_after_a_crash_of_a_watched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, '-p', 'web', '--shutdown', '--interval=1h')
    rig.crash('db', 'db')
    rig.crash('web', 'listener')    # of the listener's own pool: reported, but no reason to act
    assert (rig.subjects, rig.supervisord.calls) == (['web'], [])
    rig.crash()
    assert rig.supervisord.calls == ['shutdown']
    rig.crash()
    assert rig.supervisord.calls == ['shutdown']
    rig.crashmail.finish()
    assert rig.subjects == ['web', 'web']
    assert [line for line in rig.lines if 'web (pid 7)' in line][1:] == [
        'web (pid 7) exited unexpectedly: exit status 3'] * 2


def test_shutdown_when_supervisord_gives_up_starting_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, '--shutdown')
    rig.crash(name=FATAL)
    rig.crashmail.finish()
    assert rig.supervisord.calls == ['shutdown']


def test_crashes_are_reported_until_the_shutdown_is_accepted(
        monkeypatch: pytest.MonkeyPatch, timers: list[FakeTimer]) -> None:
    rig = Rig(monkeypatch, '--shutdown', shutdown_answers=[NO_ANSWER])
    rig.crash()
    rig.crash('x', 'x', FATAL)
    assert [subject.partition(' ')[0] for subject in rig.subjects] == ['web', 'x']
    timers[-1].fire()
    rig.crash()
    rig.crashmail.finish()
    assert len(rig.subjects) == 2
    assert rig.supervisord.calls == ['shutdown'] * 2


def test_help_and_version() -> None:
    text = run_in_process(lambda: crashmail.main(['--help']))
    assert (text.status, text.output.decode()) == (0, crashmail.__doc__)
    lines = text.output.decode().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) < 80
    assert all(f'--{option.name}' in text.output.decode() for option in crashmail.OPTIONS)


def test_bad_option_is_one_line_and_exit_status_2() -> None:
    text = run_in_process(lambda: crashmail.main(['--tail=0']))
    assert (text.status, text.output) == (2, b'')
    assert text.log.startswith("crashmail: option --tail: '0' is not a count") and text.log.count('\n') == 1
