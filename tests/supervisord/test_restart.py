"""Restarter on a real supervisord; and the simulation of tests/simulation.py compared with a real one."""
from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NamedTuple
from xmlrpc.client import Fault

import pytest
from simulation import OPERATOR, Child, World
from support import Supervisord, is_alive, read, wait_for, write_script

from superlance import restart
from superlance.listener import ExitRequest
from superlance.restart import Outcome, Restarter, Result
from superlance.rpc import Process, Refused, Supervisor, Unknown, find_supervisor, make_process

PROGRAM = '[program:web]\ncommand=/bin/sleep 1000\nstartsecs=0\nautorestart=false\n'


def check(supervisord: Supervisord, name: str = 'web') -> Process:
    return make_process(supervisord.wait_for_state(name))


def make_restarter(supervisor: Supervisor, **arguments: Any) -> tuple[Restarter, list[Outcome]]:
    outcomes: list[Outcome] = []
    return Restarter(supervisor, outcomes.append, request=ExitRequest(), **arguments), outcomes


def texts(outcomes: list[Outcome]) -> list[str]:
    return [outcome.text for outcome in outcomes]


def test_sigterm_while_a_process_stops_acknowledges_the_event(tmp_path: Path) -> None:
    """Else supervisord would send the tick again to the next listener, which would restart the process once more."""
    program = write_script(tmp_path / 'web', f'''exec {sys.executable} -c '
import signal, sys, time
def stop(*_):
    time.sleep(2)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
open("ready", "w").close()
time.sleep(1000)'
''')
    sections = (f'[program:web]\ncommand={program}\ndirectory=%(here)s\nstartsecs=0\nautorestart=true\n'
                '[eventlistener:memmon]\ncommand=BIN/memmon -p web=1KB\nevents=TICK_5\nautorestart=false\n'
                'stopwaitsecs=30\nstderr_logfile=%(here)s/memmon.log\n')
    with Supervisord(tmp_path, sections) as supervisord:
        wait_for((tmp_path / 'ready').exists)
        supervisord.wait_for_state('web', 'STOPPING')
        supervisord.rpc.stopProcess('memmon')
        assert supervisord.info('memmon')['exitstatus'] == 0
        supervisord.wait_for_state('web')
        assert supervisord.log.count("spawned: 'web'") == 2
        assert 'rebuffering event' not in supervisord.log
        assert read(tmp_path / 'memmon.log').count('restarted web') == 1


def test_only_children_that_outlive_the_stop_are_reported(tmp_path: Path) -> None:
    """wrapper leaves its child behind; the children of group end with it, as zombies or not; plain has none."""
    wrapper = write_script(tmp_path / 'wrapper', 'sleep 1000 &\necho $! > wrapper.pid\nwait\n')
    group = write_script(tmp_path / 'group', 'sleep 1000 &\nsleep 1000 &\ntouch group.ready\nwait\n')
    sections = ''.join(
        f'[program:{name}]\ncommand={command}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\nstopasgroup={group}\n'
        for name, command, group in (('wrapper', wrapper, 'false'), ('group', group, 'true'),
                                     ('plain', '/bin/sleep 1000', 'false')))
    with Supervisord(tmp_path, sections) as supervisord:
        restarter, outcomes = make_restarter(Supervisor(supervisord.environment))
        child = int(wait_for(lambda: read(tmp_path / 'wrapper.pid')))
        wait_for((tmp_path / 'group.ready').exists)
        for name in ('wrapper', 'group', 'plain'):
            restarter.restart(check(supervisord, name))
        assert texts(outcomes) == [
            f'restarted wrapper, but 1 of its child processes outlived the stop (pid {child}): set stopasgroup=true '
            'and killasgroup=true in [program:wrapper]', 'restarted group', 'restarted plain']
        assert is_alive(child)


@pytest.fixture
def hour_later() -> Callable[[], float]:
    """A clock that advances by an hour at every reading."""
    now = [0.0]

    def clock() -> float:
        now[0] += 3600
        return now[0]
    return clock


def test_start_that_fails_for_good_ends_when_its_operator_starts_it(tmp_path: Path,
                                                                    hour_later: Callable[[], float]) -> None:
    program = write_script(tmp_path / 'web', 'exec sleep 1000\n')
    with Supervisord(tmp_path, f'[program:web]\ncommand={program}\nstartsecs=1\nstartretries=0\n') as supervisord:
        restarter, outcomes = make_restarter(Supervisor(supervisord.environment))
        checked = check(supervisord)
        write_script(program, 'exit 3\n')
        restarter.restart(checked)
        # It is repeated at once, unless it was seen in BACKOFF, in which supervisord itself would repeat it.
        spawned = supervisord.log.count('spawned:')
        assert spawned in (2, 3)
        restarter._clock = hour_later
        failed = supervisord.info('web')['start']
        wait_for(lambda: time.time() >= failed + 1)     # supervisord reports it in whole seconds
        with suppress(Fault):   # SPAWN_ERROR, if it has exited before supervisord answers
            supervisord.rpc.startProcess('web', False)
        supervisord.wait_for_state('web', 'FATAL')
        for _ in range(3):
            restarter.retry()
        assert supervisord.log.count('spawned:') == spawned + 1
        assert [outcome.result for outcome in outcomes] == [Result.START_FAILED, Result.LEFT_ALONE]
        assert texts(outcomes)[1] == 'left web alone: somebody else has started it, and it is now FATAL'


def test_start_that_takes_longer_than_it_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, 'FOLLOW_SECONDS', 0.3)
    with Supervisord(tmp_path, PROGRAM.replace('startsecs=0', 'startsecs=1')) as supervisord:
        restarter, outcomes = make_restarter(Supervisor(supervisord.environment))
        restarter.restart(check(supervisord))
        assert texts(outcomes) == ['web: started, still STARTING after 0.3s']
        wait_for(restarter.retry)
        assert texts(outcomes)[1:] == ['restarted web']


def test_stop_that_takes_effect_late(tmp_path: Path) -> None:
    """supervisord hangs when the stop is sent, and obeys when nobody waits for its answer any more."""
    class Freezing(Supervisor):
        def call(self, method: str, *arguments: Any) -> Any:
            if method == 'stopProcess':
                os.kill(supervisord.pid, signal.SIGSTOP)
            return super().call(method, *arguments)

    with Supervisord(tmp_path, PROGRAM) as supervisord:
        restarter, outcomes = make_restarter(Freezing(supervisord.environment, timeout_seconds=0.3))
        checked = check(supervisord)
        try:
            restarter.restart(checked)
            assert [outcome.result for outcome in outcomes] == [Result.STOP_FAILED]
            assert 'does not answer stopProcess: timed out' in outcomes[0].text
            restarter.retry()
            assert len(outcomes) == 1
        finally:
            os.kill(supervisord.pid, signal.SIGCONT)
        wait_for(restarter.retry)
        assert [outcome.result for outcome in outcomes] == [Result.STOP_FAILED, Result.RESTARTED]
        assert supervisord.log.count('spawned:') == 2


def test_configuration_and_helper_with_a_password_beyond_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = 'username=bob\npassword=größe\n'
    with Supervisord(tmp_path, PROGRAM.replace('web', 'größe'), login) as supervisord:
        with pytest.raises(Unknown, match=r'\(401\): set SUPERVISOR_USERNAME'):
            find_supervisor(str(supervisord.configuration), {}).call('getState')
        text = supervisord.configuration.read_text('utf-8')
        supervisord.configuration.write_text(text.replace('[supervisorctl]', '[supervisorctl]\n' + login), 'utf-8')
        supervisor = find_supervisor(str(supervisord.configuration), {})
        monkeypatch.delitem(sys.modules, 'supervisor.childutils')
        assert [process.namespec for process in supervisor.get_processes_in_helper(20)] == ['größe:größe']
        assert 'supervisor.childutils' not in sys.modules
        assert [process.namespec for process in supervisor.get_processes()] == ['größe:größe']
        with pytest.raises(Refused, match='ALREADY_STARTED') as refused:
            supervisor.call('startProcess', 'größe')
        assert refused.value.fault == 'ALREADY_STARTED'


# The simulation.

class Script(NamedTuple):
    """A program, and what is done with it: a call, and the state in which it is then."""

    command: str        # of the real one
    child: tuple[float | None, int, float | None]   # of the simulated one: it exits after so long, so, stops after
    options: dict[str, Any]
    begins: str
    steps: list[tuple[str, tuple[Any, ...], str]]


LOOP = 'while :; do sleep 0.05; done'
SCRIPTS = {
    'good': Script('exec sleep 1000', (None, 0, 0.01), {}, 'RUNNING', [
        ('startProcess', (False,), 'RUNNING'), ('stopProcess', (True,), 'STOPPED'), ('stopProcess', (True,), 'STOPPED'),
        ('startProcess', (False,), 'RUNNING')]),
    'starting': Script('exec sleep 1000', (None, 0, 0.01), {'startsecs': 1}, 'STARTING', [
        ('stopProcess', (True,), 'STOPPED'), ('startProcess', (False,), 'RUNNING')]),
    # If a program exits at once, supervisord may have reaped it before it answers (SPAWN_ERROR).
    'fatal': Script('sleep 0.2; exit 3', (0.05, 3 << 8, 0.01), {'startsecs': 1, 'startretries': 0}, 'FATAL', [
        ('stopProcess', (True,), 'FATAL'), ('startProcess', (False,), 'FATAL'), ('removeProcessGroup', (), '')]),
    'backoff': Script('sleep 0.2; exit 3', (0.05, 3 << 8, 0.01), {'startsecs': 1, 'startretries': 9}, 'BACKOFF', [
        ('startProcess', (False,), 'BACKOFF'), ('stopProcess', (True,), 'STOPPED')]),
    'slow': Script(f"trap 'sleep 1; exit 0' TERM; touch slow.ready; {LOOP}", (None, 0, 1.0), {}, 'RUNNING', [
        ('stopProcess', (False,), 'STOPPING'), ('stopProcess', (True,), 'STOPPING'),
        ('startProcess', (False,), 'STOPPING'), ('removeProcessGroup', (), 'STOPPED'),
        ('removeProcessGroup', (), '')]),
    'exits': Script('sleep 0.1; exit 3', (0.1, 3 << 8, 0.01), {'autorestart': 'false'}, 'EXITED', [
        ('stopProcess', (True,), 'EXITED'), ('startProcess', (False,), 'EXITED')]),
    'again': Script('sleep 0.3', (0.3, 0, 0.01), {'autorestart': 'true'}, 'RUNNING', [
        ('getProcessInfo', (), 'EXITED'), ('getProcessInfo', (), 'RUNNING')]),
}


def run_real(supervisord: Supervisord, name: str, script: Script) -> list[Any]:
    supervisor = Supervisor(supervisord.environment)
    found: list[Any] = []

    def settle(state: str) -> None:
        if state:
            info = supervisord.wait_for_state(name, state)
            found.append((bool(info['pid']), info['spawnerr']))

    settle(script.begins)
    if name == 'slow':
        wait_for((supervisord.folder / 'slow.ready').exists)
    for method, arguments, state in script.steps:
        try:
            answer = supervisor.call(method, name, *arguments)
            found.append(answer is True or type(answer))
        except Refused as why:
            found.append(why.fault)
        settle(state)
    return found


def run_simulated(name: str, script: Script) -> list[Any]:
    world = World(random.Random(1))
    seconds, status, stop_seconds = script.child
    world.make_child = lambda pid: Child(pid, seconds, status, stop_seconds, 0.01)
    found: list[Any] = []

    def settle(state: str) -> None:
        if not state:
            return
        end = world.now + 30
        while True:
            info = world.execute(OPERATOR, 'getProcessInfo', name)
            if info['statename'] == state:
                found.append((bool(info['pid']), info['spawnerr']))
                return
            assert world.now < end, f'{name} is not {state}'
            world.sleep(0.02)

    with world.as_clock():
        world.add_program(name, **{'startsecs': 0, 'autorestart': 'false', **script.options})
        settle(script.begins)
        for method, arguments, state in script.steps:
            try:
                answer = world.wait_for_answer(world.execute(OPERATOR, method, name, *arguments), 30)
                found.append(answer is True or type(answer))
            except Refused as why:
                found.append(why.fault)
            settle(state)
    return found


def test_simulated_supervisord_is_like_a_real_one(tmp_path: Path) -> None:
    sections = ''
    for name, script in SCRIPTS.items():
        write_script(tmp_path / f'{name}.sh', script.command + '\n')
        options = {'startsecs': 0, 'autorestart': 'false', **script.options}
        sections += (f'[program:{name}]\ncommand=%(here)s/{name}.sh\ndirectory=%(here)s\n'
                     + ''.join(f'{key}={value}\n' for key, value in options.items()))
    with Supervisord(tmp_path, sections) as supervisord:
        for name, script in sorted(SCRIPTS.items(), key=lambda item: item[1].begins != 'STARTING'):
            assert run_simulated(name, script) == run_real(supervisord, name, script), name
