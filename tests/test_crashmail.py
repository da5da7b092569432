"""crashmail: which events are crashes, what is told of them, and the last words of a process."""
from __future__ import annotations

import builtins
import re
import socket
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
from inbox import CommandInbox
from support import Listener, Proxy, Supervisord, run_by_hand, serving, wait_for

from superlance import crashmail, mail
from superlance.crashmail import Crash, Digest, LastWords, Report, main
from superlance.listener import Event, timestamp
from superlance.options import read_argv
from superlance.processes import EVERY, Name, Supervisor

EXITED, FATAL = 'PROCESS_STATE_EXITED', 'PROCESS_STATE_FATAL'
NOW = 1700000000.123
CRASHED = Crash('web', 'web', '123', 'RUNNING', NOW)
GIVEN_UP = Crash('bar', 'x', '', 'BACKOFF', NOW)


# Options.

@pytest.mark.parametrize('argv, error', [
    (['web'], "unexpected argument 'web'; crashmail takes options only"),
    (['-p', '*'], "option -p: '*' is not a process name; write program, group:program or group:*"),
    (['-o', ''], 'option -o: an empty text; write at least a character'),
    (['--tail=0'], "option --tail: '0' is not a count; write a whole number from 1"),
    (['--interval=0'], "option --interval: '0' is no time to wait; write more than 0 seconds"),
    (['--interval', 'x'], "option --interval: 'x' is not a time; write seconds, or a number with s, m, h or d, "
                          "as in 10m"),
    (['--once'], 'option --once: it sends a test mail; say to whom with -m'),
])
def test_bad_options_are_one_line_and_exit_status_2(
        argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert crashmail.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err == f"crashmail: {error}; try 'crashmail --help'\n"
    assert printed.out == ''


def build(*argv: str) -> crashmail.Options:
    return crashmail.build_options(*read_argv(argv, crashmail.OPTIONS))


def test_options_by_default() -> None:
    assert build() == crashmail.Options(
        names=(EVERY,), prefix='', tail_lines=None, interval_seconds=None,
        mail=mail.Settings((), mail.SENDMAIL, None, None), once=False, configuration=None)


@pytest.mark.parametrize('argv, field, value', [
    (['-a'], 'names', (EVERY,)),
    (['-p', 'web', '--program=bar:x', '-p', 'bar:*'], 'names',
     (Name(None, 'web'), Name('bar', 'x'), Name('bar', None))),
    (['-p', 'web', '--any'], 'names', (EVERY,)),
    (['-o', 'db1'], 'prefix', 'db1: '),
    (['--optionalheader=db1'], 'prefix', 'db1: '),
    (['--tail=20'], 'tail_lines', 20),
    (['--interval=10m'], 'interval_seconds', 600),
    (['--once', '-m', 'a@b.c'], 'once', True),
    (['--configuration=x.conf'], 'configuration', 'x.conf'),
    (['-m', 'a@b.c', '-s', 'true'], 'mail', mail.Settings(('a@b.c',), 'true', None, None)),
])
def test_each_option_has_its_field(argv: list[str], field: str, value: Any) -> None:
    assert getattr(build(*argv), field) == value


# Judge.

@pytest.mark.parametrize('name, payload, crash', [
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123', CRASHED),
    (EXITED, 'processname:x groupname:bar from_state:RUNNING expected:0 pid:7', Crash('bar', 'x', '7', 'RUNNING', NOW)),
    (EXITED, 'pid:123 expected:0 from_state:RUNNING groupname:web processname:web', CRASHED),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123 tries:3 new', CRASHED),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:123\nfurther:lines', CRASHED),
    (EXITED, 'processname:größe groupname:größe from_state:RUNNING expected:0 pid:7',
     Crash('größe', 'größe', '7', 'RUNNING', NOW)),
    (EXITED, 'processname:web expected:0', Crash('web', 'web', 'unknown', 'unknown', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid',
     Crash('web', 'web', 'unknown', 'RUNNING', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:',
     Crash('web', 'web', 'unknown', 'RUNNING', NOW)),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:1 pid:123', None),
    (EXITED, 'expected:1', None),
    (FATAL, 'processname:x groupname:bar from_state:BACKOFF', GIVEN_UP),
    (FATAL, 'processname:x', Crash('x', 'x', '', 'unknown', NOW)),
    ('PROCESS_STATE_STOPPED', 'processname:web groupname:web from_state:STOPPING pid:123', None),
    ('TICK_5', 'when:1700000000', None),
    ('', '', None),
])
def test_find_crash(name: str, payload: str, crash: Crash | None) -> None:
    assert crashmail.find_crash(Event(name, payload, 'supervisor', NOW)) == crash


@pytest.mark.parametrize('name, payload', [
    (EXITED, ''),
    (EXITED, 'processname:web groupname:web from_state:RUNNING'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expec'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:'),
    (EXITED, 'processname:web groupname:web from_state:RUNNING expected:2 pid:1'),
    (EXITED, 'groupname:web from_state:RUNNING expected:0 pid:123'),
    (EXITED, '\nprocessname:web expected:0'),
    (FATAL, 'groupname:bar from_state:BACKOFF'),
])
def test_events_that_can_not_be_read(name: str, payload: str) -> None:
    with pytest.raises(ValueError) as why:
        crashmail.find_crash(Event(name, payload, 'supervisor', NOW))
    assert str(why.value) == f'unable to read a {name} event: {payload!r}'


# Tell.

def test_compose_one_crash() -> None:
    subject, body = crashmail.compose([Report(CRASHED, '')])
    assert subject == f'web crashed at {timestamp(NOW)}'
    assert body == (f'{timestamp(NOW)}: program web of group web (pid 123) was RUNNING and exited unexpectedly.\n')


def test_compose_with_last_words() -> None:
    assert crashmail.compose([Report(CRASHED, '\nlast words')])[1].endswith('unexpectedly.\n\nlast words')


def test_compose_given_up() -> None:
    subject, body = crashmail.compose([Report(GIVEN_UP, '')])
    assert subject == f'x is FATAL, supervisord has given up starting it, at {timestamp(NOW)}'
    assert body == (f'{timestamp(NOW)}: supervisord has given up starting program x of group bar, which was BACKOFF and is FATAL '
                    'now.\n')


@pytest.mark.parametrize('programs, rest', [
    (['web', 'web'], 'web'),
    (['web', 'db', 'web'], 'db, web'),
    (['p%02d' % number for number in range(10)], 'p00, p01, p02, p03, p04, p05, p06, p07, p08, p09'),
    (['p%02d' % number for number in range(12)], 'p00, p01, p02, p03, p04, p05, p06, p07, p08, p09 and 2 more'),
])
def test_compose_several_crashes(programs: list[str], rest: str) -> None:
    reports = [Report(Crash(program, program, str(pid), 'RUNNING', NOW + pid), '\nwords of %d' % pid)
               for pid, program in enumerate(programs)]
    subject, body = crashmail.compose(reports)
    assert subject == '%d crashes by %s: %s' % (len(programs), timestamp(NOW + len(programs) - 1), rest)
    for pid, program in enumerate(programs):
        assert ('%s: program %s of group %s (pid %d) was RUNNING and exited unexpectedly.\n\nwords of %d'
                % (timestamp(NOW + pid), program, program, pid, pid)) in body


class FakeTimer:
    """A timer that fires when the test says so."""

    timers: list[FakeTimer] = []
    daemon = False

    def __init__(self, seconds: float, fire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.fire = fire
        self.running = False
        self.timers.append(self)

    def start(self) -> None:
        assert self.daemon, 'it must not keep the listener from ending'
        self.running = True

    def cancel(self) -> None:
        self.running = False


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[FakeTimer]:
    monkeypatch.setattr(FakeTimer, 'timers', [])
    monkeypatch.setattr(threading, 'Timer', FakeTimer)
    return FakeTimer.timers


def make_reports(number: int) -> list[Report]:
    return [Report(CRASHED._replace(pid=str(pid)), 'words') for pid in range(number)]


def test_digest(timers: list[FakeTimer]) -> None:
    sent: list[Sequence[Report]] = []
    digest = Digest(600, sent.append)
    a, b, c, d, e, f = make_reports(6)
    digest.add(a)
    assert sent == [[a]]                        # the first at once
    digest.add(b)
    digest.add(c)
    assert (len(sent), timers[-1].seconds) == (1, 600)
    timers[-1].fire()
    assert sent[1:] == [[b, c]]                 # the others of the interval together
    digest.add(d)
    assert (len(sent), len(timers)) == (2, 2)   # which begins another interval
    timers[-1].fire()
    assert sent[2:] == [[d]]
    timers[-1].fire()
    assert (len(sent), len(timers)) == (3, 3)   # nothing to send, and no further interval
    digest.add(e)
    assert sent[3:] == [[e]]                    # the first at once again
    digest.add(f)
    digest.close()
    assert sent[4:] == [[f]]                    # none is lost at the end
    assert not timers[-1].running
    timers[-1].fire()                           # the timer had fired just before
    assert len(sent) == 5


@pytest.mark.parametrize('crashes', [0, 1])
def test_digest_that_holds_nothing_sends_nothing_at_the_end(timers: list[FakeTimer], crashes: int) -> None:
    sent: list[Sequence[Report]] = []
    digest = Digest(600, sent.append)
    for report in make_reports(crashes):
        digest.add(report)
    digest.close()
    assert len(sent) == crashes


def test_digest_of_a_storm_keeps_every_crash_and_some_last_words(timers: list[FakeTimer]) -> None:
    sent: list[Sequence[Report]] = []
    digest = Digest(600, sent.append)
    reports = make_reports(1000)
    for report in reports:
        digest.add(report)
    digest.close()
    assert [report.crash for report in sent[1]] == [report.crash for report in reports[1:]]
    assert [report.last_words for report in sent[1]] == ['words'] * 50 + [''] * 949


# The listener.

PROGRAMS = """
[program:web]
command=sleep 1000
startsecs=0
autostart=false
stdout_logfile=%(here)s/web.out
stderr_logfile=%(here)s/web.err
[program:none]
command=sleep 1000
autostart=false
stdout_logfile=NONE
redirect_stderr=true
[program:missing]
command=sleep 1000
autostart=false
stdout_logfile=missing.out
stderr_logfile=NONE
[program:foreign]
command=sleep 1000
autostart=false
stdout_logfile=foreign.out
stderr_logfile=foreign.err
[program:device]
command=sleep 1000
autostart=false
stdout_logfile=/dev/null
stderr_logfile=/dev/null
[program:größe]
command=sleep 1000
autostart=false
stdout_logfile=%(here)s/größe.out
[group:bar]
programs=none
"""


@pytest.fixture(scope='module')
def supervisord(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    """Its programs do not run. The names of the foreign program's logs mean nothing in a listener's own folder."""
    with Supervisord(tmp_path_factory.mktemp('crashmail'), PROGRAMS) as running:
        yield running


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


class Running:
    """A crashmail and its mails."""

    def __init__(self, inbox: CommandInbox, folder: Path, url: str | None, arguments: Sequence[str]) -> None:
        environment = {'SUPERVISOR_SERVER_URL': url} if url else {}
        self.listener = Listener(['crashmail', '-m', 'bob@example.com', '-s', inbox.command, *arguments],
                                 environment, folder)
        self._inbox = inbox
        self._mails = 0

    def crash(self, program: str = 'web', group: str | None = None, pid: int = 123) -> str:
        """Tell it of a crash and return the body of the mail."""
        self.listener.crash(program, group, pid)
        self._mails += 1
        body: str = self._inbox.wait(self._mails)[self._mails - 1].get_content()
        return body


@pytest.fixture
def start(inbox: CommandInbox, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*arguments: str, url: str | None = None) -> Running:
        started.append(Running(inbox, tmp_path, url, arguments))
        return started[-1]
    yield start
    for running in started:
        with running.listener:
            assert running.listener.close() == 0


@pytest.mark.parametrize('argv, names', [
    ([], ['web', 'x', 'x']),
    (['-a'], ['web', 'x', 'x']),
    (['-p', 'x'], ['x', 'x']),
    (['-p', 'bar:x'], ['x']),
    (['-p', 'bar:*', '-p', 'web'], ['web', 'x']),
    (['-p', 'y', '-a'], ['web', 'x', 'x']),
    (['-p', 'y'], []),
])
def test_which_crashes_are_mailed(start: Callable[..., Running], inbox: CommandInbox, argv: list[str],
                                  names: list[str]) -> None:
    listener = start(*argv).listener
    listener.crash('web')
    listener.crash('x', 'bar')
    listener.crash('x', 'baz')
    listener.crash('web', expected=1)
    listener.tick()
    assert listener.close() == 0
    assert [subject.partition(' crashed at ')[0] for subject in inbox.subjects] == names
    logged = re.findall(r'crashmail: program (\S+) of .* unexpectedly', listener.log)
    assert logged == ['web', 'x', 'x'], 'mailed or not'


def test_log_and_mail_of_a_crash(start: Callable[..., Running], inbox: CommandInbox) -> None:
    running = start('-o', 'db1')
    body = running.crash('x', 'bar', 77)
    said = 'program x of group bar (pid 77) was RUNNING and exited unexpectedly'
    running.listener.wait_for_log(f'crashmail: {said}\n')
    assert re.fullmatch(r'db1: x crashed at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}', inbox.subjects[0])
    assert said + '.\n' in body
    assert body.endswith('supervisor supervisor\n')
    assert 'log' not in body


def test_log_and_mail_of_a_process_that_is_given_up(start: Callable[..., Running], inbox: CommandInbox) -> None:
    listener = start('-p', 'bar:*').listener
    for group in ('bar', 'baz'):
        listener.serve_event(FATAL, f'processname:x groupname:{group} from_state:BACKOFF')
    listener.close()
    said = 'supervisord has given up starting program x of group bar, which was BACKOFF and is FATAL now'
    assert listener.log.count(f'crashmail: {said}\n') == 1
    assert len(inbox.mails) == 1
    assert inbox.subjects[0].startswith('x is FATAL, supervisord has given up starting it, at ')


def test_event_that_can_not_be_read_is_logged_and_acknowledged(start: Callable[..., Running]) -> None:
    running = start()
    running.listener.serve_event(EXITED, 'processname:web expec')
    running.listener.wait_for_log("crashmail: unable to read a PROCESS_STATE_EXITED event: 'processname:web expec'\n")
    assert running.crash('web')


def test_names_that_mean_nothing_are_told_once(start: Callable[..., Running], supervisord: Supervisord) -> None:
    listener = start('-p', 'web', '-p', 'bar', '-p', 'wbe', url=supervisord.url).listener
    for _ in range(3):
        listener.tick()
    listener.close()
    assert [line.partition('crashmail: ')[2] for line in listener.log.splitlines()] == [
        'no process is called bar; there is a group of that name: for all its processes, write bar:*',
        'no process is called wbe']


def test_names_are_checked_before_a_crash_is_mailed(start: Callable[..., Running], supervisord: Supervisord) -> None:
    """They are checked in a child, which could not import what the thread that mails is just importing."""
    for _ in range(5):
        listener = start('-p', 'web', '-p', 'wbe', url=supervisord.url).listener
        listener.crash('web')
        listener.close()
        lines = [line.partition('crashmail: ')[2] for line in listener.log.splitlines()]
        assert lines[0] == 'no process is called wbe'
        assert lines[1].startswith('program web')


def test_interval(start: Callable[..., Running], inbox: CommandInbox) -> None:
    listener = start('--interval=1h', '-o', 'db1').listener
    listener.crash('web')
    inbox.wait()
    for program in ('web', 'x', 'y'):
        listener.crash(program)
    assert listener.terminate() == 0
    assert inbox.subjects[0].startswith('db1: web crashed at ')
    assert re.fullmatch('db1: 3 crashes by .*: web, x, y', inbox.subjects[1])
    assert len(inbox.mails) == 2


def test_interval_ends(start: Callable[..., Running], inbox: CommandInbox) -> None:
    listener = start('--interval=0.5s').listener
    for pid in range(1, 6):
        listener.crash('web', pid=pid)
    wait_for(lambda: sorted(re.findall(r'\(pid (\d)\)', ''.join(mail.get_content() for mail in inbox.mails)))
             == list('12345'), 'all crashes')
    assert 'pid 1' in inbox.mails[0].get_content()


# The last words.

@pytest.fixture
def logs(supervisord: Supervisord) -> Callable[..., None]:
    """Write to a log as supervisord does; the first writing of a test is all that the log holds."""
    written = set()

    def write(data: Any, name: str = 'web.out') -> None:
        path = supervisord.folder / name
        with open(path, 'ab' if path in written else 'wb') as log:
            log.write(data if isinstance(data, bytes) else data.encode('utf-8'))
        written.add(path)
    for path in supervisord.folder.glob('*.[oe]*'):
        if path.suffix in ('.out', '.err'):
            path.write_bytes(b'')
    return write


Logs = Callable[..., None]
Start = Callable[..., Running]


def test_tail_of_stdout_and_stderr(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    logs('out 1\nout 2\nout 3\n')
    logs('err 1\nerr 2\nerr 3', 'web.err')
    body = start('--tail=2', url=supervisord.url).crash()
    assert ('unexpectedly.\n\nThe last lines of its stdout log:\n  out 2\n  out 3\n\n'
            'The last lines of its stderr log:\n  err 2\n  err 3\n\n-- \n') in body
    assert 'started again' not in body


# What a log holds, the lines that are asked for, and those that are mailed.
LOGS: list[tuple[str, Any, int, list[str]]] = [
    ('fewer than asked for', 'a\n', 5, ['a']),
    ('empty lines', 'a\n\nb\n\n\n', 3, ['a', '', 'b']),
    ('no UTF-8', b'caf\xe9\xff\n\x80\n', 5, ['caf\ufffd\ufffd', '\ufffd']),
    ('control characters', 'a\x00b\x1b[31mred\x1b[0m\rc\x07\n', 5, ['a\\x00b\\x1b[31mred\\x1b[0m\\rc\\x07']),
    ('the end of a mail by SMTP', 'a\n.\nb\n', 5, ['a', '  .', 'b']),
    ('non-ASCII', 'größe 日本\n', 5, ['größe 日本']),
]


@pytest.mark.parametrize('text, lines, mailed', [case[1:] for case in LOGS], ids=[case[0] for case in LOGS])
def test_tail_of_any_text(start: Start, supervisord: Supervisord, logs: Logs, text: Any, lines: int,
                          mailed: list[str]) -> None:
    logs(text)
    body = start('--tail=%d' % lines, url=supervisord.url).crash()
    found = body.partition('stdout log:\n')[2].partition('\n\n-- \n')[0].split('\n')
    assert [line.strip() for line in found] == [line.strip() for line in mailed]


@pytest.mark.parametrize('more', ['', 'x', 'xx'])
@pytest.mark.parametrize('program, log', [('web', 'web.out'), ('foreign', 'foreign.out')])
def test_tail_is_bounded_and_may_cut_a_character(start: Start, supervisord: Supervisord, logs: Logs, program: str,
                                                 log: str, more: str) -> None:
    logs('first\n' + '日' * 40000 + more + '\nlast\n', log)
    body = start('--tail=5', url=supervisord.url).crash(program)
    assert '  last\n' in body
    assert 'first' not in body
    assert 21800 < body.count('日') <= 64 * 1024 / 3
    assert 'can not be asked' not in body


def test_tail_is_of_the_process_that_crashed(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    running = start('--tail=5', url=supervisord.url)
    for program, log in [('web', 'web.out'), ('foreign', 'foreign.out')]:
        logs('run 1\n', log)
        assert 'run 1' in running.crash(program)
        logs('run 2\n', log)
        body = running.crash(program)
        assert 'run 2' in body
        assert 'run 1' not in body
        assert running.crash(program).count('It has written nothing to a log.') == 1


@pytest.mark.parametrize('new', ['2', 'run 2\n', 'run 2, which has written more by now\n'])
def test_tail_of_a_rotated_log(start: Start, supervisord: Supervisord, logs: Logs, new: str) -> None:
    running = start('--tail=5', url=supervisord.url)
    logs('run 1\n')
    running.crash()
    log = supervisord.folder / 'web.out'
    log.rename(supervisord.folder / 'web.out.1')
    log.write_text(new, 'utf-8')
    assert f'stdout log:\n  {new.strip()}\n' in running.crash()


def test_tail_of_a_log_that_was_cleared(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    running = start('--tail=5', url=supervisord.url)
    logs('run 1\n')
    running.crash()
    with open(supervisord.folder / 'web.out', 'wb') as log:
        log.write(b'run\n')
    assert 'stdout log:\n  run\n' in running.crash()


def test_tail_of_a_process_that_runs_again(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    logs('words\n')
    supervisord.rpc.startProcess('web')
    pid = supervisord.info('web')['pid']
    try:
        running = start('--tail=5', url=supervisord.url)
        assert 'It has been started again since (pid %d); a line at the very end may be of that one.' % pid \
            in running.crash(pid=pid + 1)
        logs('words\n')
        assert 'started again' not in running.crash(pid=pid)
    finally:
        supervisord.rpc.stopProcess('web')


@pytest.mark.parametrize('program, group', [('none', 'bar'), ('missing', None), ('device', None), ('web', None)])
def test_tail_of_nothing(start: Start, supervisord: Supervisord, logs: Logs, program: str,
                         group: str | None) -> None:
    body = start('--tail=5', url=supervisord.url).crash(program, group)
    assert 'unexpectedly.\n\nIt has written nothing to a log.\n' in body


def test_tail_of_a_process_that_is_not_there(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    running = start('--tail=5', url=supervisord.url)
    assert 'supervisord can not be asked for more of its log: BAD_NAME' in running.crash('gone')
    logs('words\n')
    assert 'words' in running.crash()   # that was no reason not to ask again


def test_tail_of_a_log_that_only_supervisord_can_read(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    logs('out 1\nout 2\n', 'foreign.out')
    logs('err 1\nerr 2\n', 'foreign.err')
    running = start('--tail=1', url=supervisord.url)
    body = running.crash('foreign')
    assert 'stdout log:\n  out 2\n\nThe last lines of its stderr log:\n  err 2\n' in body
    # supervisord fails to send bytes that are no UTF-8. The rest is mailed, and it is asked again.
    logs(b'\xff' * 10 + b'\n', 'foreign.out')
    logs('err 3\n', 'foreign.err')
    body = running.crash('foreign')
    assert 'stderr log:\n  err 3\n' in body
    assert re.search('supervisord can not be asked for more of its log: .* answers 500 to readProcessStdoutLog', body)
    logs(b'\xff', 'foreign.err')
    assert 'answers 500 to readProcessStderrLog' in running.crash('foreign')
    logs('out 4\n', 'foreign.out')
    assert 'stdout log:\n  out 4\n' in running.crash('foreign')


def test_log_that_may_not_be_opened(supervisord: Supervisord, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open

    def may_not(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith('web.out'):
            raise PermissionError(13, 'Permission denied')
        return real_open(path, *arguments, **options)
    logs('words\n')
    words = LastWords(Supervisor(supervisord.environment), 5)
    monkeypatch.setattr(builtins, 'open', may_not)
    assert words.fetch(CRASHED) == '\nThe last lines of its stdout log:\n  words'


def test_log_that_is_read_as_soon_as_supervisord_answers(tmp_path: Path, supervisord: Supervisord, logs: Logs) -> None:
    lost = {'getAllProcessInfo': ['lose call'], 'getProcessInfo': ['lose call'] * 2}
    logs('words\n')
    with Proxy(tmp_path / 'p.sock', supervisord.socket, lost) as proxy:
        words = LastWords(Supervisor({'SUPERVISOR_SERVER_URL': proxy.url}), 5)
        assert words.fetch(CRASHED) == '\nThe last lines of its stdout log:\n  words'


def test_tail_of_names_that_are_not_ascii(start: Start, supervisord: Supervisord, logs: Logs) -> None:
    logs('words\n', 'größe.out')
    running = start('--tail=5', url=supervisord.url)
    assert 'stdout log:\n  words\n' in running.crash('größe')


def test_tail_of_a_process_that_was_added_since(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / 'late'
    folder.mkdir()
    with Supervisord(folder, '[include]\nfiles=late.ini\n') as supervisord:
        running = start('--tail=5', url=supervisord.url)
        running.listener.expect(b'READY\n')
        (folder / 'late.ini').write_text(
            f'[program:late]\ncommand=sleep 1000\nautostart=false\nstdout_logfile={folder}/late.out\n', 'utf-8')
        supervisord.rpc.reloadConfig()
        supervisord.rpc.addProcessGroup('late')
        (folder / 'late.out').write_text('words\n', 'utf-8')
        running.listener.send_event(EXITED, 'processname:late groupname:late from_state:RUNNING expected:0 pid:1')
        running.listener.expect(b'RESULT 2\nOK')
        assert running.listener.close() == 0
        assert 'stdout log:\n  words\n' in running._inbox.mails[0].get_content()


@contextmanager
def silent_server() -> Iterator[tuple[str, list[int]]]:
    """Yield the URL of a supervisord that never answers, and a list that grows with each connection to it."""
    end = threading.Event()
    connections: list[int] = []

    def handle(client: socket.socket) -> None:
        connections.append(client.fileno())
        end.wait()
    with serving(handle) as port:
        try:
            yield 'http://127.0.0.1:%d' % port, connections
        finally:
            end.set()


def test_supervisord_that_does_not_answer_is_asked_once_in_a_while(start: Start, inbox: CommandInbox) -> None:
    with silent_server() as (url, connections):
        listener = start('--tail=5', url=url).listener
        for pid in range(20):
            listener.crash(pid=pid)
        bodies = [mail.get_content() for mail in inbox.wait(20)]
        assert len(connections) == 2    # at the start and at the first crash
    for pid, body in enumerate(bodies):
        assert '(pid %d)' % pid in body
        assert re.search('supervisord can not be asked for more of its log: supervisord .*did not? .*answer|'
                         'does not answer', body)


def test_supervisord_that_does_not_answer_at_the_start(start: Start, supervisord: Supervisord, logs: Logs,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    words = LastWords(Supervisor({'SUPERVISOR_SERVER_URL': 'unix:///nonexistent.sock'}), 5)
    assert 'can not be asked for more of its log: supervisord at unix:///nonexistent.sock' in words.fetch(CRASHED)
    logs('words\n')
    monkeypatch.setattr(words, '_supervisor', Supervisor(supervisord.environment))
    assert words.fetch(CRASHED) == '\nThe last lines of its stdout log:\n  words'


def test_signal_while_a_crash_is_looked_into_loses_no_mail(start: Start, inbox: CommandInbox) -> None:
    with silent_server() as (url, connections):
        listener = start('--tail=5', url=url).listener
        listener.expect(b'READY\n')
        listener.send_event(EXITED, 'processname:web groupname:web from_state:RUNNING expected:0 pid:1')
        wait_for(lambda: len(connections) == 2, 'the question')
        assert listener.terminate() == 0
    assert len(inbox.mails) == 1


# One look by hand.

look = partial(run_by_hand, 'crashmail', '--once')


@pytest.mark.parametrize('said, shown', [('', ''), ('; echo queued as 42', ': queued as 42')])
def test_once_sends_a_test_mail(tmp_path: Path, inbox: CommandInbox, said: str, shown: str) -> None:
    printed = look('-m', 'bob@example.com,al@example.com', '-o', 'db1', '-s', inbox.command + said, folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, '')
    assert re.fullmatch(rf'sent "db1: crashmail test at [^"]*" to bob@example.com, al@example.com{shown}\n',
                        printed.stdout)
    assert inbox.subjects[0] in printed.stdout
    assert 'nothing has crashed.\n' in inbox.mails[0].get_content()
    assert 'supervisor ' not in inbox.mails[0].get_content()


@pytest.mark.parametrize('command, reason', [
    ('echo no such user >&2; exit 67', 'exit status 67: no such user'),
    ('/nonexistent/sendmail -t', 'exit status 127'),
])
def test_once_is_told_of_a_refusal(tmp_path: Path, command: str, reason: str) -> None:
    printed = look('-m', 'bob@example.com', '-s', command, folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert printed.stdout.startswith(f'unable to send: {command}: {reason}')


def test_once_names_supervisord(tmp_path: Path, inbox: CommandInbox, supervisord: Supervisord) -> None:
    environments: list[dict[str, str]] = [{}, supervisord.environment]
    for arguments, environment in zip([['--configuration', str(supervisord.configuration)], []], environments):
        printed = look('-m', 'bob@example.com', '-s', inbox.command, *arguments, folder=tmp_path, **environment)
        assert (printed.returncode, printed.stderr) == (0, '')
    assert [mail.get_content().endswith(', supervisor testing\n') for mail in inbox.mails] == [True, True]


def test_once_without_supervisord_sends_all_the_same(tmp_path: Path, inbox: CommandInbox) -> None:
    printed = look('-m', 'bob@example.com', '-s', inbox.command, folder=tmp_path,
                   SUPERVISOR_SERVER_URL='unix:///nonexistent.sock')
    assert (printed.returncode, printed.stderr) == (0, '')
    note, sent = printed.stdout.splitlines()
    assert note.startswith('note: supervisord at unix:///nonexistent.sock does not answer getIdentification: ')
    assert sent.startswith('sent "crashmail test at ')
    assert len(inbox.mails) == 1


def test_once_without_a_configuration(tmp_path: Path, inbox: CommandInbox) -> None:
    printed = look('-m', 'bob@example.com', '-s', inbox.command, '--configuration=missing.conf', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (2, '')
    assert 'option --configuration: ' in printed.stderr and 'missing.conf' in printed.stderr
    assert printed.stderr.count('\n') == 1
    assert not inbox.mails


def test_outside_of_supervisord(tmp_path: Path) -> None:
    printed = run_by_hand('crashmail', '--tail=5', '-m', 'bob@example.com', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (1, '')
    assert printed.stderr.startswith('crashmail must be run as a supervisor event listener')
    assert printed.stderr.count('\n') == 1


# Beyond the usual.

class Answers(Supervisor):
    """A supervisord that has one process, and answers as it is told."""

    def __init__(self, **info: object) -> None:
        super().__init__({})
        self.info = dict(group='web', name='web', pid=0, state=100, statename='EXITED', start=1, now=2, **info)
        self.texts: dict[str, str] = {}

    def call(self, method: str, *arguments: Any) -> Any:
        if method.startswith('tail'):
            return ['', len(self.texts[method[11:17].lower()]), False]
        if method.startswith('read'):
            return self.texts[method[11:17].lower()]
        return [self.info] if method == 'getAllProcessInfo' else self.info


def test_tail_after_an_update_has_changed_the_log(tmp_path: Path) -> None:
    old, new = tmp_path / 'old', tmp_path / 'new'
    old.write_text('old\n')
    supervisor = Answers(stdout_logfile=str(old), stderr_logfile='')
    last_words = LastWords(supervisor, 5)
    crash = Crash('web', 'web', '7', 'RUNNING', 0.0)
    assert '  old' in last_words.fetch(crash)
    new.write_text('new\n')
    supervisor.info['stdout_logfile'] = str(new)
    assert '  new' in last_words.fetch(crash)


def test_tail_of_a_relative_log_is_read_by_supervisord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'web.log').write_text('a file of another\n')
    supervisor = Answers(stdout_logfile='web.log', stderr_logfile='')
    supervisor.texts['stdout'] = 'its own\n'
    told = LastWords(supervisor, 5).fetch(Crash('web', 'web', '7', 'RUNNING', 0.0))
    assert 'its own' in told and 'another' not in told


def test_digest_without_a_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, 'start', fail)
    sent: list[Sequence[Report]] = []
    digest = Digest(600, sent.append)
    a, b = make_reports(2)
    digest.add(a)
    digest.add(b)
    assert sent == [[a], [b]]


def test_password_in_an_argument_is_not_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['-m', 'bob@example.com', 'smtp://robot:secret@host']) == 2
    assert capsys.readouterr().err.startswith("crashmail: unexpected argument 'smtp://robot:***@host'; ")
