"""httpok: its options, and the listener in-process, between a scripted check and a pretended supervisord."""
from __future__ import annotations

import re
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Sequence, Union

import pytest
from support import write_script

from superlance import __version__, coredump, httpok, mail
from superlance.fetch import FetchFailed, Response
from superlance.listener import Event, ExitRequest
from superlance.options import EVERY, Name, Rate, UsageError, read_argv
from superlance.restart import Outcome, Result
from superlance.rpc import Process, Refused, State, Unknown

URL = 'http://127.0.0.1:8080/'
# Beyond the largest pid, so that no process has it.
PID = 10 ** 8

Answer = Union[int, str, Exception]    # a status, or what the check raises or returns; 'exit': a signal arrives


def build(*argv: str) -> httpok.Options:
    return httpok.build_options(*read_argv([*argv, URL], httpok.OPTIONS))


# Options.

def test_defaults() -> None:
    got = build()
    assert got.check.url == URL
    assert (got.names, got.eager, got.failures, got.grace_seconds, got.remind_seconds) == ((), True, 1, 0, 3600)
    assert (got.max_restarts, got.dry_run, got.core_directory) == (None, False, None)
    assert got.gcore == ['/usr/bin/gcore', '-o']
    assert (got.name, got.verbose, got.once, got.configuration, got.warnings) == (None, False, False, None, ())


def test_all_options() -> None:
    got = build('-p', 'web', '--program=site:*', '-E', '--failures=3', '--grace=2m', '--remind=0',
                '--max-restarts=3/1h', '--dry-run', '-d', '/cores', '-g', '''dump "a b" 'c $d' ''', '-n', 'me',
                '-v', '--once', '--configuration=/c')
    assert got.names == (Name(None, 'web'), Name('site', None))
    assert (got.eager, got.failures, got.grace_seconds, got.remind_seconds) == (False, 3, 120, 0)
    assert (got.max_restarts, got.dry_run, got.core_directory) == (Rate(3, 3600.0), True, '/cores')
    assert got.gcore == ['dump', 'a b', 'c $d']
    assert (got.name, got.verbose, got.once, got.configuration) == ('me', True, True, '/c')
    assert build('-a', '-p', 'web').names == (EVERY,)
    assert build('-E', '-p', 'web', '-e').eager


def test_empty_values_are_ignored_with_a_warning_as_in_2_0_0() -> None:
    got = build('-n', '', '-b', '', '-d', '', '-g', '', '-s', '')
    assert (got.name, got.check.search.text, got.core_directory) == (None, None, None)
    assert (got.gcore, got.mail.sendmail) == (['/usr/bin/gcore', '-o'], mail.SENDMAIL)
    assert sorted(got.warnings) == [f'ignored option -{letter}: its value is empty' for letter in 'bdgns']


@pytest.mark.parametrize(('argv', 'reason'), [
    (['-E'], 'option -E requires -p or -a: without them no process is watched'),
    (['-p', ':'], "option -p: ':' is not a process name"),
    (['--failures=0'], "option --failures: '0' is not a count"),
    (['--grace=x'], "option --grace: 'x' is not a time"),
    (['--remind=x'], "option --remind: 'x' is not a time"),
    (['--max-restarts=3'], "option --max-restarts: '3' is not a"),
    (['-g', '"'], "option -g: '\"' is not a command: No closing quotation"),
    (['-m', 'bob smith'], "option -m: 'bob smith' is not a mail address"),
    (['http://bob:secret@b/'], '2 URLs are given: http://bob:***@b/ http://127.0.0.1:8080/; '),
    (['--nonsense'], 'option --nonsense not recognized'),
])
def test_usage_errors(argv: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as raised:
        build(*argv)
    assert str(raised.value).startswith(reason)
    assert httpok.main([*argv, URL]) == 2
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith(f'httpok: {reason}')
    assert err.endswith("; try 'httpok --help'\n") and err.count('\n') == 1
    assert 'secret' not in err


@pytest.mark.parametrize(('argv', 'expected'), [
    (['--help'], httpok.__doc__), (['-h'], httpok.__doc__), (['--version'], f'httpok {__version__}\n')])
def test_help_and_version(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert httpok.main(argv) == 0
    assert capsys.readouterr() == (expected, '')


def test_help_fits_a_terminal() -> None:
    assert httpok.__doc__ and max(map(len, httpok.__doc__.splitlines())) < 80


def test_outside_supervisord_it_says_how_it_is_started(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv('SUPERVISOR_SERVER_URL', raising=False)
    assert httpok.main([URL]) == 1
    assert capsys.readouterr().err.startswith('httpok must be started by supervisord')


@pytest.mark.parametrize(('argv', 'expected'), [
    ([], 'restarts nothing; no mail'),
    (['-p', 'web', '-p', 'api:*', '-m', 'bob@example.com'],
     'restarts web, api:*; mail to bob@example.com through /usr/sbin/sendmail -t -i'),
    (['-a', '-E', '--failures=3', '--grace=90', '--max-restarts=1/1h'],
     'only if a watched process is RUNNING; restarts everything after 3 failed checks in a row; '
     'grace period 1m 30s; at most 1 restart of a process in 1h; no mail'),
    (['-p', 'web', '--dry-run'], 'dry run, would restart web; no mail'),
])
def test_the_first_line_of_the_log(argv: list[str], expected: str) -> None:
    assert httpok.describe_options(build(*argv)) == \
        f'httpok {__version__}: checks {URL} (timeout 10s, expects status 200); {expected}'


@pytest.mark.parametrize(('argv', 'names', 'restarts', 'problems'), [
    ([], [], True, []),
    (['-p', 'web', '-g', '/nonexistent'], ['web'], True, []),
    (['-p', 'web', '--dry-run', '-d', '/nonexistent', '-g', 'sh'], ['web'], False, ['core directory /nonexistent: ']),
    (['-d', '/', '-g', '/nonexistent'], [], True, ['core dump command "/nonexistent" not found: ']),
])
def test_what_is_checked_at_start(argv: list[str], names: list[str], restarts: bool, problems: list[str]) -> None:
    wants = httpok.describe_wants(build(*argv))
    assert (list(map(str, wants.names)), wants.restarts) == (names, restarts)
    found = list(filter(None, wants.find_problems()))
    assert len(found) == len(problems) and all(map(str.startswith, found, problems)), found


# The listener.

class FakeSupervisor:
    """supervisord as far as httpok sees it: a restart takes no time, and faults can be set."""

    def __init__(self, **processes: tuple[str, int]) -> None:
        self.calls: list[str] = []
        self.fault: Exception | None = None     # the answer to every call
        self.on_list: Callable[[], object] = lambda: None
        self.now = 1_000_000
        self.processes = {name: Process(name, name, PID if state in ('RUNNING', 'STARTING') else 0, State[state], state,
                                        self.now - uptime, self.now, '') for name, (state, uptime) in processes.items()}

    def call(self, method: str, *arguments: Any) -> Any:
        if self.fault:
            raise self.fault
        name = arguments[0].partition(':')[0] if arguments else ''
        if method == 'stopProcess':
            self.set(name, 'STOPPED', pid=0)
        elif method == 'startProcess':
            self.set(name, 'RUNNING', pid=PID + len(self.calls) + 1, start=self.now)
        self.calls.append(f"{method.replace('Process', '')} {name}".strip())
        return True

    def set(self, name: str, state: str, **fields: Any) -> None:
        self.processes[name] = self.processes[name]._replace(state=State[state], state_name=state, **fields)

    def get_process(self, namespec: str) -> Process:
        if self.fault:
            raise self.fault
        return self.processes[namespec.partition(':')[0]]._replace(now=self.now)

    def get_processes(self) -> list[Process]:
        self.on_list()
        if self.fault:
            raise self.fault
        return [process._replace(now=self.now) for process in self.processes.values()]

    def call_in_helper(self, calls: Sequence[tuple[str]], seconds: float, interrupt: ExitRequest) -> list[Any]:
        return [self.call(*call) for call in calls]


class Rig:
    """An Httpok whose checks, clock, supervisord and mail belong to the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, supervisor: FakeSupervisor, *argv: str) -> None:
        self.supervisor = supervisor
        self.now = 5000.0
        self.log: list[str] = []
        self.mails: list[tuple[str, str]] = []
        self.request = ExitRequest()
        self.answers: list[Answer] = []
        monkeypatch.setattr(httpok, 'make_log', lambda program: self.log.append)
        monkeypatch.setattr(httpok, 'Supervisor', lambda environment: supervisor)
        monkeypatch.setattr(httpok, 'Outbox', lambda *arguments: SimpleNamespace(
            put=lambda subject, body, server: self.mails.append((subject, body)), close=lambda: None))
        monkeypatch.setattr(httpok, 'StartCheck', lambda *arguments: SimpleNamespace(
            run=lambda: None, run_again=lambda: None))
        monkeypatch.setattr(httpok, 'time', SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: float(supervisor.now)))
        monkeypatch.setattr(httpok, 'probe', self._probe)
        self.options = build(*argv)
        self.httpok = httpok.Httpok(self.options, {'SUPERVISOR_GROUP_NAME': 'own'}, self.request)

    def _probe(self, check: Any, background: Any) -> Response | FetchFailed | None:
        answer = self.answers.pop(0)
        if answer == 'exit':
            self.request.requested = True
            return None
        if isinstance(answer, FetchFailed):
            return answer
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, int)
        headers: Any = Message()
        return Response(answer, 'x', headers, True if answer == 200 else None, b'', 0.25)

    def tick(self, *answers: Answer, seconds: float = 5) -> tuple[list[str], list[str]]:
        """Serve a tick for each answer; return the new lines of the log and the new subjects, without the URL."""
        log, mails = len(self.log), len(self.mails)
        for answer in answers:
            self.answers = [answer]
            self.now += seconds
            self.supervisor.now += int(seconds)
            self.httpok.handle(Event('TICK_5', '', 'testing', 0.0))
        strip = f'httpok: {URL}: '
        return [line.replace(f'{URL}: ', '') for line in self.log[log:]], \
            [subject.replace(strip, '') for subject, _ in self.mails[mails:]]


BAD = 'bad status returned'
BAD_LINE = 'status 500 x (expected 200)'
Tick = Any


@pytest.fixture
def make_rig(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rig]:
    return lambda supervisor, *argv: Rig(monkeypatch, supervisor, *argv)


def test_the_start_is_logged(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(), '-p', 'web')
    rig.httpok.start()
    assert rig.log == [httpok.describe_options(rig.options)]


def test_only_ticks_are_served(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor())
    rig.httpok.handle(Event('PROCESS_STATE_EXITED', 'processname:web', '', 0.0))
    assert not rig.log and not rig.mails


def test_an_outage_with_a_restart_at_every_tick(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100), idle=('STOPPED', 0)), '-p', 'web', '-p', 'idle')
    first = rig.tick(500)
    assert first == ([BAD_LINE, 'restarted web', 'left idle alone: not RUNNING'], [f'{BAD} (restarted web)'])
    assert rig.mails[0][1] == (f'{URL}\n\n{BAD_LINE}\nweb (RUNNING, pid {PID}, up 1m 45s): restarted web\n'
                               'idle (STOPPED): left alone: not RUNNING\n')
    assert rig.tick(500, 500) == ([BAD_LINE, 'restarted web'] * 2, [])
    assert rig.tick(200) == (['recovered after 15s: status 200 in 0.250s'], ['recovered after 15s'])
    assert rig.mails[-1][1] == f'{URL}\n\nstatus 200 in 0.250s\nrecovered after 15s and 3 restarts\n'
    assert rig.supervisor.calls == ['stop web', 'start web'] * 3
    assert rig.tick(200, 200) == ([], [])


def test_an_outage_includes_the_time_of_its_restart(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')
    rig.supervisor.on_list = lambda: setattr(rig, 'now', rig.now + 60)
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']
    assert rig.tick(200)[1] == ['recovered after 1m 5s']


def test_a_reminder_has_the_number_of_restarts(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '--remind=10', '--failures=2')
    assert rig.tick(500, 500)[1] == [f'{BAD} (restarted web)']
    log, mails = rig.tick(500)
    assert (log, mails) == ([f'{BAD_LINE} (failed check 1 of 2)'], [])
    assert rig.tick(500) == ([BAD_LINE, 'restarted web'], [f'{BAD} (restarted web)'])
    assert 'failing for 15s, 2 restarts so far\n' in rig.mails[-1][1]
    assert rig.tick(500, seconds=20) == (
        [f'{BAD_LINE} (failed check 1 of 2)'], [f'{BAD} (failed check 1 of 2)'])
    assert 'up 20s): left alone: failed check 1 of 2\nfailing for 35s, 2 restarts so far\n' in rig.mails[-1][1]


def test_without_a_program_it_only_sends_mail(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(), '-n', 'site\nBcc: x')
    assert rig.tick(500, 500, FetchFailed('Connection refused'))[0] == [BAD_LINE, BAD_LINE, 'Connection refused']
    (subject, text), = rig.mails
    assert subject == f'httpok [site\nBcc: x]: {URL}: {BAD}'    # the mail makes it one line
    assert text == f'{URL}\n\n{BAD_LINE}\n'
    assert rig.supervisor.calls == ['getState']
    rig.tick(500, seconds=3600)
    assert rig.mails[-1][1] == f'{URL}\n\n{BAD_LINE}\nfailing for 1h\n'
    rig.tick(200)
    assert rig.mails[-1][1] == f'{URL}\n\nstatus 200 in 0.250s\n'


def test_names_of_groups_and_the_own_pool(make_rig: Callable[..., Rig]) -> None:
    supervisor = FakeSupervisor()
    supervisor.processes = {name: Process(group, name, PID, State.RUNNING, 'RUNNING', 1, 9, '') for group, name in (
        ('web', 'web_00'), ('own', 'httpok'), ('lone', 'lone'))}
    for argv, expected in ((['-p', 'web'], ['web_00']), (['-a'], ['web_00', 'lone']), (['-p', 'own'], []),
                           (['-p', 'lone:*', '-p', 'web:web_00'], ['web_00', 'lone'])):
        rig = make_rig(supervisor, *argv, '--dry-run')
        rig.tick(500)
        assert [line.split(':')[-1].split()[-1] for line in rig.log if 'dry run' in line] == expected
        if not expected:
            assert rig.log[-1] == 'nothing restarted: no process is watched'
            assert rig.mails[0][0].endswith('(nothing restarted)')


def test_a_dry_run_is_reported_once_per_pid(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '--dry-run', '--remind=0')
    assert rig.tick(500) == ([BAD_LINE, 'dry run: would have restarted web'], [f'{BAD} (dry run: web not restarted)'])
    assert rig.tick(500) == ([BAD_LINE], [f'{BAD} (dry run: web not restarted)'])
    assert rig.supervisor.calls == []


def test_the_restart_limit_is_mailed_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '--max-restarts=1/1h')
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']
    log, mails = rig.tick(500)
    assert log[1].startswith('left web alone: restart limit reached (1 in 1h); ')
    assert mails == [f'{BAD} (web left alone)']
    assert rig.tick(500, 500) == ([BAD_LINE] * 2, [])
    # The limit is still reached in the next outage.
    assert rig.tick(200, 500)[1] == ['recovered after 20s', f'{BAD} (web left alone)']
    assert 'left alone: restart limit reached\n' in rig.mails[-1][1]


def test_a_process_that_cannot_be_stopped(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100), api=('RUNNING', 100)), '-a')

    def restart(process: Process, prepare: Any) -> Outcome:
        result = Result.STOP_FAILED if process.program == 'web' else Result.RESTARTED
        outcome = Outcome(process, result, f'{result.value} {process.title}')
        rig.httpok._note_outcome(outcome)
        return outcome
    monkeypatch.setattr(rig.httpok._restarter, 'restart', restart)
    assert rig.tick(500) == ([BAD_LINE, 'failed to stop web', 'restarted api'],
                             [f'{BAD} (restarted api; failed to stop web)'])


@pytest.mark.parametrize(('argv', 'processes', 'log', 'mails'), [
    # Every process is in its grace period: not counted, nothing is restarted.
    (['-a'], {'web': ('RUNNING', 5), 'api': ('STARTING', 0)}, [f'{BAD_LINE} (grace period)'], []),
    (['-p', 'web', '--failures=2'], {'web': ('RUNNING', 5), 'api': ('RUNNING', 99)},
     [f'{BAD_LINE} (grace period)'], []),
    # Some are older: these are restarted.
    (['-a'], {'web': ('RUNNING', 55), 'api': ('RUNNING', 54)},
     [BAD_LINE, 'restarted web', 'left api alone: grace period of 1m'], [f'{BAD} (restarted web)']),
    # None is RUNNING.
    (['-a'], {'web': ('STOPPED', 5)}, [BAD_LINE, 'left web alone: not RUNNING'], [f'{BAD} (web left alone)']),
    # Too few failed checks.
    (['-a', '--failures=2'], {'web': ('RUNNING', 99)}, [f'{BAD_LINE} (failed check 1 of 2)'], []),
])
def test_grace(argv: list[str], processes: dict[str, tuple[str, int]], log: list[str], mails: list[str],
               make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(**processes), '--grace=1m', *argv)
    assert rig.tick(500) == (log, mails)


def test_a_program_that_always_dies_in_its_grace_period_is_mailed_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 0)), '--grace=1m', '-p', 'web')
    mails: list[str] = []
    for _ in range(30):
        rig.supervisor.set('web', 'RUNNING', start=rig.supervisor.now)
        mails += rig.tick(500)[1]
    assert mails == [f'{BAD} (web left alone: grace period)']
    assert 'up 5s): left alone: grace period of 1m\nfailing for 1m, 0 restarts so far\n' in rig.mails[0][1]
    assert rig.tick(200)[1] == ['recovered after 2m 30s']
    assert rig.supervisor.calls == []


def test_a_process_that_was_started_during_the_check_is_left_alone(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')

    def restart() -> None:
        rig.supervisor.now += 2
        rig.supervisor.set('web', 'RUNNING', start=rig.supervisor.now - 1)
    rig.supervisor.on_list = restart
    assert rig.tick(500) == ([BAD_LINE, 'left web alone: it was started during the check'], [f'{BAD} (web left alone)'])


def test_not_eager(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('STOPPED', 0)), '-E', '-p', 'web')
    assert rig.tick(500, 500) == (['not checked: no watched process is RUNNING'], [])
    rig.supervisor.set('web', 'RUNNING', pid=PID)
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']
    # In an outage, no reminder and no recovery.
    rig.supervisor.set('web', 'STOPPED', pid=0)
    assert rig.tick(500, seconds=7200) == (['not checked: no watched process is RUNNING'], [])
    rig.supervisor.fault = Unknown('supervisord does not answer')
    assert rig.tick(500, 500) == (['not checked: supervisord does not answer'], [])


def test_unknown_is_logged_on_change_and_changes_nothing(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '--failures=2')
    full = Unknown('Too many open files')
    line = 'unable to check: Too many open files'
    assert rig.tick(500, full, full) == ([f'{BAD_LINE} (failed check 1 of 2)', line], [])
    assert rig.tick(Unknown('DNS')) == (['unable to check: DNS'], [])
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']   # the count was not changed
    assert rig.tick(full, seconds=7200) == ([line], [])     # no reminder
    assert rig.tick(200)[1] == ['recovered after 2h']


def test_nothing_is_restarted_if_supervisord_does_not_answer(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '--grace=1')
    rig.supervisor.fault = Unknown('supervisord does not answer')
    line = 'nothing restarted: supervisord does not answer'
    assert rig.tick(500, 500) == ([BAD_LINE, line, BAD_LINE], [f'{BAD} (nothing restarted)'])
    assert rig.mails[0][1] == f'{URL}\n\n{BAD_LINE}\n{line}\n'
    rig.supervisor.fault = Refused('FAILED', 'no')
    assert rig.tick(500) == ([BAD_LINE, 'nothing restarted: no'], [])
    rig.supervisor.fault = None
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']


SHUTDOWN = Refused('SHUTDOWN_STATE', 'SHUTDOWN_STATE')


@pytest.mark.parametrize(('argv', 'words'), [
    (['-p', 'web'], BAD_LINE), (['-p', 'web', '--grace=1'], BAD_LINE), ([], BAD_LINE), (['-E', '-a'], 'not checked')])
def test_a_shutdown_of_supervisord_is_not_an_outage(argv: list[str], words: str, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), *argv)
    rig.supervisor.fault = SHUTDOWN
    assert rig.tick(500, 500) == ([f'{words} (ignored: supervisord is shutting down or reloading)'] * (
        1 if words != BAD_LINE else 2), [])
    assert rig.supervisor.calls == []


@pytest.mark.parametrize('argv', [[], ['-p', 'web']])
def test_a_shutdown_during_an_outage_mails_no_reminder(argv: list[str], make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('EXITED', 0)), *argv, '--failures=2', '--remind=0')
    assert len(rig.tick(500, 500)[1]) == 1
    rig.supervisor.fault = SHUTDOWN
    assert rig.tick(500) == ([f'{BAD_LINE} (ignored: supervisord is shutting down or reloading)'], [])


def test_a_shutdown_that_begins_during_the_restart_is_not_an_outage(make_rig: Callable[..., Rig],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')

    def restart(process: Process, prepare: Any) -> Outcome:
        rig.supervisor.fault = SHUTDOWN
        outcome = Outcome(process, Result.LEFT_ALONE, 'left web alone: SHUTDOWN_STATE')
        rig.httpok._note_outcome(outcome)
        return outcome
    monkeypatch.setattr(rig.httpok._restarter, 'restart', restart)
    assert rig.tick(500) == ([BAD_LINE, 'left web alone: SHUTDOWN_STATE',
                              f'{BAD_LINE} (ignored: supervisord is shutting down or reloading)'], [])
    assert not rig.httpok._outage.is_on


def test_a_process_that_has_changed_is_left_alone_with_a_mail(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')
    rig.supervisor.get_process = lambda namespec: rig.supervisor.processes['web']._replace(  # type: ignore[method-assign]
        pid=PID + 5)
    log, mails = rig.tick(500)
    assert log[1].startswith('left web alone: it is now RUNNING with pid')
    assert mails == [f'{BAD} (web left alone)']
    # If it is not known whether supervisord is shutting down, it is taken for running.
    rig.supervisor.fault = Unknown('no answer')
    rig.supervisor.get_processes = lambda: list(rig.supervisor.processes.values())  # type: ignore[method-assign]
    assert rig.tick(500, seconds=7200)[1] == [f'{BAD} (web left alone)']


@pytest.mark.parametrize('argv', [[], ['-p', 'web'], ['-p', 'web', '--grace=1h']])
def test_a_signal_during_the_check_abandons_it(argv: list[str], make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), *argv)
    assert rig.tick('exit') == (['check abandoned: httpok is shutting down'], [])


@pytest.mark.parametrize('argv', [
    ['-p', 'web'], ['-p', 'web', '--grace=1h'], ['-p', 'web', '--failures=2', '--remind=0']])
def test_a_signal_after_the_check_restarts_and_mails_nothing(argv: list[str], make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), *argv)
    if '--failures=2' in argv:
        rig.tick(500, 500)

    def request_exit() -> None:
        rig.request.requested = True
    rig.supervisor.on_list = request_exit
    number = len(rig.supervisor.calls)
    assert rig.tick(500) == ([f'{BAD_LINE} (ignored: httpok is shutting down)'], [])
    assert rig.supervisor.calls[number:] == []


def test_a_signal_in_a_row_of_restarts_completes_one_and_begins_no_other(
        make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100), api=('RUNNING', 100)), '-a')
    really_call = rig.supervisor.call

    def call(method: str, *arguments: Any) -> Any:
        rig.request.requested = True
        return really_call(method, *arguments)
    monkeypatch.setattr(rig.supervisor, 'call', call)
    assert rig.tick(500)[1] == [f'{BAD} (restarted web)']
    assert rig.supervisor.calls == ['stop web', 'start web']
    assert '): left alone: the listener is shutting down\n' in rig.mails[0][1]


def test_a_signal_during_a_core_dump_restarts_and_mails_nothing(make_rig: Callable[..., Rig],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '-d', '/nonexistent')

    def dump_core(process: Process) -> None:
        rig.request.requested = True
    monkeypatch.setattr(rig.httpok, '_dump_core', dump_core)
    assert rig.tick(500) == ([BAD_LINE, f'{BAD_LINE} (ignored: httpok is shutting down)'], [])
    assert rig.supervisor.calls == []


def test_a_signal_while_supervisord_is_asked_for_its_state_mails_nothing(make_rig: Callable[..., Rig],
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor())

    def call(method: str) -> None:
        rig.request.requested = True
    monkeypatch.setattr(rig.supervisor, 'call', call)
    assert rig.tick(500) == ([f'{BAD_LINE} (ignored: httpok is shutting down)'], [])


def test_a_fault_other_than_shutdown_state_is_not_a_shutdown(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(FakeSupervisor())
    rig.supervisor.fault = Refused('FAILED', 'no')
    assert rig.tick(500)[1] == [BAD]


def test_an_outcome_is_not_mailed_again_at_exit(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')

    def restart(process: Process, prepare: Any) -> Outcome:
        outcome = Outcome(process, Result.START_FAILED, 'failed to start web')
        rig.httpok._note_outcome(outcome)
        return outcome
    monkeypatch.setattr(rig.httpok._restarter, 'restart', restart)
    rig.tick(500)
    rig.httpok.finish()
    assert len(rig.mails) == 1


@pytest.mark.parametrize(('result', 'subject'), [
    (Result.RESTARTED, 'process web restarted'), (Result.START_FAILED, 'failed to start process web')])
def test_the_outcome_of_an_earlier_restart_is_mailed(result: Result, subject: str, make_rig: Callable[..., Rig],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web')

    def retry() -> bool:
        rig.httpok._note_outcome(Outcome(rig.supervisor.processes['web'], result, f'{result.value} web: why'))
        rig.httpok._note_outcome(Outcome(rig.supervisor.processes['web'], Result.LEFT_ALONE, 'left web alone'))
        return result is Result.RESTARTED
    monkeypatch.setattr(rig.httpok._restarter, 'retry', retry)
    log, mails = rig.tick(200)
    assert (log, mails) == ([f'{result.value} web: why', 'left web alone'], [subject])
    assert bool(rig.answers) == (result is Result.RESTARTED)    # after a restart, the check waits for the next tick
    monkeypatch.setattr(rig.httpok._restarter, 'finish', retry)
    rig.httpok.finish()
    assert rig.mails[1][0] == f'httpok: {URL}: {subject}'


def test_a_stale_tick_is_skipped(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(FakeSupervisor())
    monkeypatch.setattr(rig.httpok._restarter, 'is_stale', lambda event: True)
    assert rig.tick(500) == ([], [])


def test_every_check_is_logged_with_verbose(make_rig: Callable[..., Rig]) -> None:
    assert make_rig(FakeSupervisor(), '-v').tick(200) == (['status 200 in 0.250s'], [])


# Core dumps.

def test_a_core_dump_precedes_the_restart_and_is_mailed(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    script = write_script(tmp_path / 'gcore', 'echo saved\n')
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '-d', str(tmp_path), '-g', str(script))
    assert rig.tick(500)[0] == [BAD_LINE, 'wrote a core dump of web', 'restarted web']
    assert f'\n{BAD_LINE}\nwrote a core dump of web\nsaved\nweb (' in rig.mails[0][1]


def test_a_signal_interrupts_the_core_dump_command(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch,
                                                   tmp_path: Path) -> None:
    def write_core_dump(*arguments: Any) -> list[str]:
        arguments[-1].requested = True
        return really_write(*arguments)
    really_write = coredump.write_core_dump
    monkeypatch.setattr(coredump, 'write_core_dump', write_core_dump)
    script = write_script(tmp_path / 'gcore', 'exec sleep 600\n')
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)), '-p', 'web', '-d', str(tmp_path), '-g', str(script))
    log, mails = rig.tick(500)
    assert re.fullmatch('unable to write a core dump of web: .*: interrupted, .*', log[1])
    assert (log[2:], mails, rig.supervisor.calls) == ([f'{BAD_LINE} (ignored: httpok is shutting down)'], [], [])


# --once

def once(rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: Answer,
         *argv: str) -> tuple[int, list[str]]:
    rig.answers = [answer]
    monkeypatch.setattr(httpok, 'find_supervisor', lambda configuration, environment: rig.supervisor)
    monkeypatch.setattr(rig.supervisor, 'call', lambda method, *arguments: [
        {'group': name, 'name': name, 'stopwaitsecs': 10} for name in rig.supervisor.processes])
    status = httpok.run_once(build('--once', *argv), {})
    return status, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(('answer', 'argv', 'status', 'lines'), [
    (200, [], 0, ['status   200 x', 'time     0.250s', 'verdict  ok']),
    (200, ['-b', 'fine'], 0, ['status   200 x', 'time     0.250s', "body     contains 'fine'", 'verdict  ok']),
    (500, ['-b', 'fine'], 1, ['status   500 x', 'time     0.250s', f'verdict  {BAD_LINE}']),
    (FetchFailed('Connection refused'), [], 1, ['verdict  Connection refused']),
    (Unknown('Too many open files'), ['-p', 'web'], 1, [
        'verdict  unable to check: Too many open files', f'watched  web (RUNNING, pid {PID}, up 1m 40s)']),
    (200, ['-p', 'web'], 0, ['status   200 x', 'time     0.250s', 'verdict  ok',
                             f'watched  web (RUNNING, pid {PID}, up 1m 40s)']),
    (FetchFailed('x'), ['-a', '--grace=1m'], 1, [
        'verdict  x', f'watched  web (RUNNING, pid {PID}, up 1m 40s): would be restarted',
        f'watched  young (RUNNING, pid {PID}, up 5s): left alone: grace period of 1m',
        'watched  idle (STOPPED): left alone: not RUNNING']),
    (200, ['-p', 'wbe', '-n', ''], 1, [
        'status   200 x', 'time     0.250s', 'verdict  ok', 'warning: ignored option -n: its value is empty',
        'warning: no process matches "wbe"']),
])
def test_once(answer: Answer, argv: list[str], status: int, lines: list[str], make_rig: Callable[..., Rig],
              monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100), young=('RUNNING', 5), idle=('STOPPED', 0)))
    assert once(rig, monkeypatch, capsys, answer, *argv) == (status, [f'url      {URL}', *lines])


def test_once_if_the_process_list_cannot_be_read(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    rig = make_rig(FakeSupervisor(web=('RUNNING', 100)))
    rig.supervisor.fault = Unknown('no answer')
    status, lines = once(rig, monkeypatch, capsys, 200, '-p', 'web')
    assert (status, lines[-1]) == (1, 'watched  unknown: no answer')
