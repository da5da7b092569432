"""Child processes that outlive a stop, on a real supervisord; and the simulated supervisord is like the real one."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from simulation import OPERATOR, Child, World
from support import Supervisord, is_alive, read, wait_for, write_script

from superlance.listener import ExitRequest
from superlance.restart import Outcome, Restarter
from superlance.rpc import Refused, Supervisor, make_process


def test_only_children_that_outlive_the_stop_are_reported(tmp_path: Path) -> None:
    """wrapper leaves its child behind; the children of group end with it, as zombies or not."""
    wrapper = write_script(tmp_path / 'wrapper', 'sleep 1000 &\necho $! > wrapper.pid\nwait\n')
    group = write_script(tmp_path / 'group', 'sleep 1000 &\nsleep 1000 &\ntouch group.ready\nwait\n')
    sections = ''.join(
        f'[program:{name}]\ncommand={command}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\nstopasgroup={group}\n'
        for name, command, group in (('wrapper', wrapper, 'false'), ('group', group, 'true')))
    with Supervisord(tmp_path, sections) as supervisord:
        outcomes: list[Outcome] = []
        restarter = Restarter(Supervisor(supervisord.environment), outcomes.append, request=ExitRequest())
        child = int(wait_for(lambda: read(tmp_path / 'wrapper.pid')))
        wait_for((tmp_path / 'group.ready').exists)
        for name in ('wrapper', 'group'):
            restarter.restart(make_process(supervisord.wait_for_state(name)))
        assert [outcome.text for outcome in outcomes] == [
            f'restarted wrapper, but 1 of its child processes outlived the stop (pid {child}): set stopasgroup=true '
            'and killasgroup=true in [program:wrapper]', 'restarted group']
        assert is_alive(child)


# The simulation.

class Script(NamedTuple):
    """A program, and what is done with it: a call, and the state in which it is then.

    A state must last until it is seen, however busy the machine is. 'again' is RUNNING with another pid.
    """

    command: str        # of the real one
    child: tuple[float | None, int, float | None]   # of the simulated one: it exits after so long, so, stops after
    options: dict[str, Any]
    begins: str
    steps: list[tuple[str, tuple[Any, ...], str]]


SCRIPTS = {
    'good': Script('exec sleep 1000', (None, 0, 0.01), {'startsecs': 1}, 'RUNNING', [
        ('startProcess', (False,), 'RUNNING'), ('stopProcess', (True,), 'STOPPED'), ('stopProcess', (True,), 'STOPPED'),
        ('startProcess', (False,), 'RUNNING')]),
    'starting': Script('exec sleep 1000', (None, 0, 0.01), {'startsecs': 600}, 'STARTING', [
        ('stopProcess', (True,), 'STOPPED'), ('startProcess', (False,), 'STARTING')]),
    # If a program exits at once, supervisord may have reaped it before it answers (SPAWN_ERROR).
    'fatal': Script('sleep 0.5; exit 3', (0.05, 3 << 8, 0.01), {'startsecs': 600, 'startretries': 0}, 'FATAL', [
        ('stopProcess', (True,), 'FATAL'), ('startProcess', (False,), 'FATAL'), ('removeProcessGroup', (), '')]),
    # When it is stopped, supervisord may have started it again.
    'backoff': Script('sleep 0.5; exit 3', (0.05, 3 << 8, 0.01), {'startsecs': 600, 'startretries': 9}, 'BACKOFF', [
        ('stopProcess', (True,), 'STOPPED')]),
    # It stops when slow.stop exists; the test creates that file before it waits for STOPPED.
    'slow': Script("trap 'while [ ! -e slow.stop ]; do sleep 0.05; done; exit 0' TERM; touch slow.ready; "
                   'while :; do sleep 0.05; done', (None, 0, 1.0), {'stopwaitsecs': 600}, 'RUNNING', [
        ('stopProcess', (False,), 'STOPPING'), ('stopProcess', (True,), 'STOPPING'),
        ('startProcess', (False,), 'STOPPING'), ('removeProcessGroup', (), 'STOPPED'),
        ('removeProcessGroup', (), '')]),
    'exits': Script('sleep 0.5; exit 3', (0.1, 3 << 8, 0.01), {}, 'EXITED', [
        ('stopProcess', (True,), 'EXITED'), ('startProcess', (False,), 'EXITED')]),
    'again': Script('sleep 0.5', (0.3, 0, 0.01), {'autorestart': 'true'}, 'RUNNING', [
        ('getProcessInfo', (), 'again')]),
}
STATES = {'again': 'RUNNING'}


def run_real(supervisord: Supervisord, name: str, script: Script) -> list[Any]:
    supervisor = Supervisor(supervisord.environment)
    found: list[Any] = []

    pid = 0

    def settle(state: str) -> None:
        nonlocal pid
        if not state:
            return
        if state == 'STOPPED':
            (supervisord.folder / f'{name}.stop').touch()
        info = (supervisord.wait_for_restart(name, pid) if state == 'again'
                else supervisord.wait_for_state(name, state))
        pid = info['pid']
        found.append((bool(pid), info['spawnerr']))

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

    pid = 0

    def settle(state: str) -> None:
        nonlocal pid
        if not state:
            return
        end = world.now + 30
        while True:
            info = world.execute(OPERATOR, 'getProcessInfo', name)
            if info['statename'] == STATES.get(state, state) and (state != 'again' or info['pid'] != pid):
                pid = info['pid']
                found.append((bool(pid), info['spawnerr']))
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
