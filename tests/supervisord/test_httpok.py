"""httpok with a real supervisord."""
from __future__ import annotations

import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Iterator

import pytest
from inbox import CommandInbox
from support import Listener, Supervisord, is_alive, read, run_command_line, wait_for, write_script
from web import Answer, Site, hang, response

PROGRAM = '[program:{}]\ncommand=sleep 10000\nstartsecs=0\nautorestart=false\nstdout_logfile=NONE\n' \
    'stderr_logfile=NONE\n'
POOL = '[program:pool]\ncommand=sleep 10000\nprocess_name=%(program_name)s_%(process_num)s\nnumprocs=2\nstartsecs=0\n' \
    'autorestart=false\nstdout_logfile=NONE\nstderr_logfile=NONE\n'
RUNNING_NAMES = {'web:web', 'lone:lone', 'site:front', 'site:back', 'pool:pool_0', 'pool:pool_1'}
FAILING = response(status='500 No')
BAD = 'bad status returned'


@pytest.fixture(scope='module')
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisord]:
    """A supervisord for all the tests that leave its processes running."""
    sections = ''.join(PROGRAM.format(name) for name in ('web', 'lone', 'front', 'back')) + POOL
    sections += PROGRAM.format('idle') + 'autostart=false\n' + '[group:site]\nprograms=front,back,idle\n'
    with Supervisord(tmp_path_factory.mktemp('shared'), sections) as supervisord:
        for name in RUNNING_NAMES:
            supervisord.wait_for_state(name)
        yield supervisord


def find_pids(supervisord: Supervisord) -> dict[str, int]:
    """Return the pids of all processes that are RUNNING."""
    return {f"{info['group']}:{info['name']}": info['pid'] for info in supervisord.rpc.getAllProcessInfo()
            if info['statename'] == 'RUNNING'}


class Watch:
    """An httpok that watches a supervisord's processes, and what it has restarted."""

    def __init__(self, supervisord: Supervisord, folder: Path, *argv: str, group: str = 'listener') -> None:
        self._supervisord = supervisord
        self._pids = find_pids(supervisord)
        self._inbox = CommandInbox(folder)
        mail = ['-m', 'bob@example.com', '-s', self._inbox.command]
        self.listener = Listener(['httpok', *mail, *argv], folder=folder,
                                 environment={**supervisord.environment, 'SUPERVISOR_GROUP_NAME': group})

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.__exit__()

    @property
    def log(self) -> list[str]:
        """The lines of the log after the first one, without those of the mail."""
        lines = [line.partition(' httpok: ')[2] for line in self.listener.log.splitlines()[1:]]
        return [line for line in lines if 'mail' not in line]

    def tick(self) -> set[str]:
        """Serve a tick and return what has another pid since the last one."""
        self.listener.tick()
        return self.find_restarted()

    def find_restarted(self) -> set[str]:
        before, self._pids = self._pids, find_pids(self._supervisord)
        return {name for name in {*before, *self._pids} if before.get(name) != self._pids.get(name)}

    def close(self) -> list[tuple[str, str]]:
        """End the listener and return the subjects and texts of its mails."""
        assert self.listener.close() == 0
        return [(mail['Subject'], mail.get_content()) for mail in self._inbox.mails]


def test_a_process_that_hangs_is_restarted_and_its_recovery_is_mailed(shared: Supervisord, tmp_path: Path) -> None:
    with Site(hang, hang, response()) as site, Watch(shared, tmp_path, '-p', 'web', '-t', '0.3', site.url()) as watch:
        assert [watch.tick() for _ in range(4)] == [{'web:web'}, {'web:web'}, set(), set()]
        (subject, text), (recovery, _) = watch.close()
    url = site.url()
    assert subject == f'httpok: {url}: {BAD} (restarted web)'
    assert text.startswith(f'{url}\n\nno complete response within 0.3s\nweb (RUNNING, pid ')
    assert re.search(r', up \S+\): restarted web\n', text)
    assert recovery.startswith(f'httpok: {url}: recovered after ')
    assert watch.log[:4] == [f'{url}: no complete response within 0.3s', 'restarted web'] * 2
    assert watch.log[4].startswith(f'{url}: recovered after ') and len(watch.log) == 5


@pytest.mark.parametrize(('argv', 'group', 'restarted', 'outcome'), [
    (['-a'], 'site', {'web:web', 'lone:lone', 'pool:pool_0', 'pool:pool_1'},    # never its own pool
     'restarted lone, pool:pool_0, pool:pool_1 and 1 more'),
    (['-p', 'site:*'], 'listener', {'site:front', 'site:back'}, 'restarted site:back, site:front'),
    (['-p', 'pool'], 'listener', {'pool:pool_0', 'pool:pool_1'}, 'restarted pool:pool_0, pool:pool_1'),
    (['-p', 'idle'], 'listener', set(), 'site:idle left alone'),
    (['-p', 'web:front'], 'listener', set(), 'nothing restarted'),
    (['-p', 'web', '--grace=1d'], 'listener', set(), ''),
    (['-p', 'web', '--dry-run'], 'listener', set(), 'dry run: web not restarted'),
])
def test_which_processes_are_restarted(argv: list[str], group: str, restarted: set[str], outcome: str,
                                       shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, *argv, site.url(), group=group) as watch:
        assert watch.tick() == restarted
        mails = watch.close()
    assert [subject for subject, _ in mails] == ([f'httpok: {site.url()}: {BAD} ({outcome})'] if outcome else [])
    assert shared.info('site:idle')['statename'] == 'STOPPED'


def test_a_process_that_was_started_during_the_check_is_left_alone(shared: Supervisord, tmp_path: Path) -> None:
    def restart(client: socket.socket) -> None:
        began = int(time.time())
        wait_for(lambda: time.time() > began + 1)   # supervisord's times are whole seconds
        shared.rpc.stopProcess('web:web')
        shared.rpc.startProcess('web:web')
        client.sendall(FAILING)

    with Site(restart) as site, Watch(shared, tmp_path, '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        pid = shared.info('web:web')['pid']
        (subject, _), = watch.close()
    assert watch.log[-1] == 'left web alone: it was started during the check'
    assert subject.endswith('(web left alone)')
    assert shared.info('web:web')['pid'] == pid


def test_a_tick_from_before_a_restart_is_skipped(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        watch.listener.serve_event('TICK_5', f'when:{int(time.time()) - 5}')
        assert len(site.requests) == 1
        assert watch.tick() == {'web:web'}
        watch.close()


def test_restarts_are_possible_again_after_the_limit(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site, Watch(shared, tmp_path, '--max-restarts=1/0.5', '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        wait_for(watch.tick, 'another restart')
        watch.close()


def test_not_eager(shared: Supervisord, tmp_path: Path) -> None:
    with Site(FAILING) as site:
        with Watch(shared, tmp_path, '-E', '-p', 'idle', site.url()) as watch:
            watch.tick()
            watch.tick()
            assert (site.requests, watch.close()) == ([], [])
            assert watch.log == [f'{site.url()}: not checked: no watched process is RUNNING']
        with Watch(shared, tmp_path, '-E', '-p', 'idle', '-p', 'web', site.url()) as watch:
            assert watch.tick() == {'web:web'}


def test_a_process_that_cannot_be_started_is_started_later(tmp_path: Path) -> None:
    program = write_script(tmp_path / 'program', 'echo up > up\nexec sleep 10000\n')
    backup = tmp_path / 'backup'
    shutil.copy(str(program), str(backup))
    section = f'[program:web]\ncommand={program}\ndirectory=%(here)s\nstartsecs=0\nautorestart=false\n'
    with Supervisord(tmp_path, section) as supervisord, Site(FAILING, response()) as site:
        pid = supervisord.wait_for_state('web')['pid']
        with Watch(supervisord, tmp_path, '-p', 'web', site.url()) as watch:
            wait_for(lambda: read(tmp_path / 'up'), 'the program')   # has been read
            program.unlink()
            watch.tick()
            watch.listener.wait_for_log('failed to start web')
            backup.rename(program)
            watch.tick()
            supervisord.wait_for_restart('web', pid)
            watch.tick()
            subjects = [subject.partition(f'{site.url()}: ')[2] for subject, _ in watch.close()]
    assert subjects[:2] == [f'{BAD} (failed to start web)', 'process web restarted']
    assert subjects[2].startswith('recovered after ') and len(subjects) == 3


# Shutdown.

# A server that closes its socket on SIGTERM and drains its connections for a while.
DRAINING = """import signal, socket, sys, time
server = socket.socket()
server.bind(('127.0.0.1', int(sys.argv[1])))
server.listen(5)
def drain(*_):
    server.close()
    open('draining', 'w').close()
    time.sleep(600)
signal.signal(signal.SIGTERM, drain)
open('up', 'w').close()
while True:
    client = server.accept()[0]
    client.recv(65536)
    client.sendall(b'HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok')
    client.close()
"""


def find_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.mark.parametrize('argv', [['-p', 'web'], [], ['-p', 'web', '--grace=1']])
@pytest.mark.parametrize('method', ['shutdown', 'restart'])
def test_a_shutdown_or_reload_is_not_an_outage(method: str, argv: list[str], tmp_path: Path) -> None:
    port = find_port()
    url = f'http://127.0.0.1:{port}/'
    (tmp_path / 'server.py').write_text(DRAINING, 'utf-8')
    section = f'[program:web]\ncommand=PYTHON server.py {port}\ndirectory=%(here)s\nstartsecs=0\nstopwaitsecs=600\n'
    with Supervisord(tmp_path, section) as supervisord, \
            Watch(supervisord, tmp_path, '-t', '0.3', *argv, url) as watch:
        wait_for((tmp_path / 'up').exists, 'the server')
        watch.listener.tick()
        getattr(supervisord.rpc, method)()
        wait_for((tmp_path / 'draining').exists, 'SIGTERM for the server')
        for _ in range(2):
            watch.listener.tick()
        assert watch.close() == []
    assert watch.log == [f'{url}: Connection refused (ignored: supervisord is shutting down or reloading)'] * 2


def test_a_shutdown_during_the_check_is_not_an_outage(tmp_path: Path) -> None:
    def shut_down(client: socket.socket) -> None:
        supervisord.rpc.shutdown()
        client.sendall(FAILING)

    # It ignores SIGTERM, so that supervisord waits for it.
    section = '[program:web]\ncommand=sh -c "trap : TERM; while :; do sleep 1; done"\nstartsecs=0\nstopwaitsecs=600\n'
    with Supervisord(tmp_path, section) as supervisord, Site(shut_down) as site:
        supervisord.wait_for_state('web')
        with Watch(supervisord, tmp_path, '-p', 'web', site.url()) as watch:
            watch.listener.tick()
            assert watch.close() == []
    assert watch.log == [f'{site.url()}: status 500 No (expected 200) '
                         '(ignored: supervisord is shutting down or reloading)']


# Core dumps.

def test_a_core_dump(shared: Supervisord, tmp_path: Path) -> None:
    if not os.access('/usr/bin/gcore', os.X_OK):
        pytest.skip('there is no gcore')
    pid = shared.info('web')['pid']
    with Site(FAILING) as site, Watch(shared, tmp_path, '-d', str(tmp_path), '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        (_, text), = watch.close()
    if 'ptrace' in watch.listener.log:
        pytest.skip('gcore may not trace processes here')
    core = tmp_path / f'web.{pid}'
    assert core.stat().st_size > 0
    assert core.stat().st_mode & 0o777 == 0o600
    assert watch.log[1:] == [f'wrote a core dump of web to {core}', 'restarted web']
    assert f'Saved corefile {core}' in text


def test_a_signal_ends_the_core_dump_command_and_nothing_is_restarted_or_mailed(
        shared: Supervisord, tmp_path: Path) -> None:
    script = write_script(tmp_path / 'gcore', 'echo $$ > pid.new\nmv pid.new pid\nexec sleep 600\n')
    with Site(FAILING) as site, Watch(
            shared, tmp_path, '-p', 'web', '-d', str(tmp_path), '-g', str(script), site.url()) as watch:
        watch.listener.expect(b'READY\n')
        watch.listener.send_event('TICK_5', f'when:{int(time.time())}')
        pid = int(wait_for(lambda: read(tmp_path / 'pid'), 'the command'))
        assert is_alive(pid)
        assert watch.listener.terminate() == 0
        assert not is_alive(pid)
        assert watch.find_restarted() == set()
        watch.listener.expect(b'RESULT 2\nOK')
    assert not (tmp_path / 'inbox').exists()


def test_unusual_process_names_reach_no_shell_and_stay_in_the_directory(tmp_path: Path) -> None:
    names = ['$(touch${IFS}x)', '`touch${IFS}x`', 'a"b\'c', '..', '.hidden', '-o', 'a&touch${IFS}x&', 'a\\b']
    cores = tmp_path / 'here' / 'cores'
    cores.mkdir(parents=True)
    written = tmp_path / 'written'
    script = write_script(tmp_path / 'gcore', f'touch "$1" && printf "%s\\n" "$1" >> {written}\n')
    sections = ''.join(PROGRAM.format(name) for name in names)
    with Supervisord(tmp_path, sections) as supervisord, Site(FAILING) as site:
        for name in names:
            supervisord.wait_for_state(f'{name}:{name}')
        before = set(os.listdir(tmp_path))
        with Watch(supervisord, tmp_path, '-a', '-d', str(cores), '-g', str(script), site.url()) as watch:
            assert watch.tick() == {f'{name}:{name}' for name in names}
            watch.close()
    paths = read(written).splitlines()
    assert len(paths) == len(names) and {os.path.dirname(path) for path in paths} == {str(cores)}
    assert sorted(map(os.path.basename, paths)) == sorted(os.listdir(cores))
    assert os.listdir(cores.parent) == ['cores']
    assert set(os.listdir(tmp_path)) - before <= {'written', 'inbox', 'supervisord.log', 'supervisord.pid'}


# --once

def find_watched(text: str) -> list[str]:
    return [re.sub(r'pid \d+, up [^)]*', '', line[9:]) for line in text.splitlines() if line.startswith('watched  ')]


@pytest.mark.parametrize(('argv', 'answer', 'status', 'watched'), [
    (['-p', 'web'], response(), 0, ['web (RUNNING, )']),
    (['-p', 'web'], FAILING, 1, ['web (RUNNING, ): would be restarted']),
    (['-p', 'web', '--grace=30d'], FAILING, 1, ['web (RUNNING, ): left alone: grace period of 30d']),
    (['-p', 'idle'], response(), 0, ['site:idle (STOPPED)']),
    (['-p', 'pool', '-p', 'nobody'], response(), 1, ['pool:pool_0 (RUNNING, )', 'pool:pool_1 (RUNNING, )']),
])
def test_once_prints_what_is_watched(argv: list[str], answer: Answer, status: int, watched: list[str],
                                     shared: Supervisord) -> None:
    pids = find_pids(shared)
    with Site(answer) as site:
        printed = run_command_line('httpok', '--once', *argv, site.url(), SUPERVISOR_SERVER_URL=shared.url)
    assert (printed.returncode, printed.stderr, find_watched(printed.stdout)) == (status, '', watched)
    assert ('warning: no process matches "nobody"\n' in printed.stdout) == ('nobody' in argv)
    assert find_pids(shared) == pids


def test_once_finds_supervisord_as_supervisorctl_does(shared: Supervisord, tmp_path: Path) -> None:
    with Site() as site:
        by_option = run_command_line('httpok', '--once', '--configuration', str(shared.configuration), '-a', site.url(),
                                     folder=tmp_path)
        by_folder = run_command_line('httpok', '--once', '-a', site.url(), folder=shared.folder)
    assert by_option.returncode == by_folder.returncode == 0
    assert len(find_watched(by_option.stdout)) == len(find_watched(by_folder.stdout)) == len(RUNNING_NAMES) + 1
