"""httpok with a real supervisord: a restart and the recovery after it, names, a shutdown, a core dump, --once.

Each decision and each fault is in tests/unit.
"""
from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Iterator

import pytest
from inbox import CommandInbox
from support import Listener, Supervisord, run_command_line, wait_for
from web import Site, hang, refusing, response

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

    def __init__(self, supervisord: Supervisord, folder: Path, *argv: str) -> None:
        self._supervisord = supervisord
        self._pids = find_pids(supervisord)
        self._inbox = CommandInbox(folder)
        mail = ['-m', 'bob@example.com', '-s', self._inbox.command]
        self.listener = Listener(['httpok', *mail, *argv], supervisord.environment, folder)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.__exit__()

    @property
    def log(self) -> list[str]:
        """The lines of the log after the first one, without those of the mail and of the check at start."""
        lines = [line.partition(' httpok: ')[2] for line in self.listener.log.splitlines()[1:]]
        return [line for line in lines if 'mail' not in line and not line.startswith('warning: ')]

    def tick(self) -> set[str]:
        """Serve a tick and return what has another pid since the last one."""
        self.listener.tick()
        return self.find_restarted()

    def find_restarted(self) -> set[str]:
        before, self._pids = self._pids, find_pids(self._supervisord)
        return {name for name in {*before, *self._pids} if before.get(name) != self._pids.get(name)}

    def close(self, mails: int) -> list[tuple[str, str]]:
        """Wait for so many mails, stop the listener, and return the subjects and texts of all mails."""
        self._inbox.wait(mails)
        assert self.listener.close() == 0
        return [(mail['Subject'], mail.get_content()) for mail in self._inbox.mails]


def test_a_process_that_hangs_is_restarted_and_its_recovery_is_mailed(shared: Supervisord, tmp_path: Path) -> None:
    with Site(hang, response()) as site, Watch(shared, tmp_path, '-p', 'web', '-t', '1', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        # On a busy machine, a response may take longer: then there is another restart, but no mail about it.
        watch.listener.tick_until_log('recovered after')
        (subject, text), (recovery, _) = watch.close(2)
    url = site.url()
    assert subject == f'httpok: {url}: {BAD} (restarted web)'
    assert text.startswith(f'{url}\n\nno complete response within 1s\nweb (RUNNING, pid ')
    assert re.search(r', up \S+\): restarted web\n', text)
    assert recovery.startswith(f'httpok: {url}: recovered after ')
    assert watch.log[:2] == [f'{url}: no complete response within 1s', 'restarted web']
    assert watch.log[-1].startswith(f'{url}: recovered after ')


def test_names_of_groups_match_their_running_processes(shared: Supervisord, tmp_path: Path) -> None:
    """`pool` is the name of a program with numprocs=2, so of a group."""
    with Site(FAILING) as site, Watch(shared, tmp_path, '-p', 'site:*', '-p', 'pool', site.url()) as watch:
        assert watch.tick() == {'site:front', 'site:back', 'pool:pool_0', 'pool:pool_1'}
        (subject, text), = watch.close(1)
    assert subject == f'httpok: {site.url()}: {BAD} (restarted pool:pool_0, pool:pool_1, site:back and 1 more)'
    assert 'site:idle (STOPPED): left alone: not RUNNING\n' in text
    assert shared.info('site:idle')['statename'] == 'STOPPED'


@pytest.mark.parametrize(('method', 'argv'), [('shutdown', ['-p', 'web']), ('restart', [])])
def test_a_shutdown_or_reload_is_not_an_outage(method: str, argv: list[str], tmp_path: Path) -> None:
    # It ignores SIGTERM, so that supervisord waits for it.
    section = ('[program:web]\ncommand=sh -c "trap : TERM; touch up; while :; do sleep 1; done"\ndirectory=%(here)s\n'
               'startsecs=0\nstopwaitsecs=600\n')
    with refusing() as server, Supervisord(tmp_path, section) as supervisord:
        url = f'http://127.0.0.1:{server.getsockname()[1]}/'
        with Watch(supervisord, tmp_path, '-t', '0.1', *argv, url) as watch:
            wait_for((tmp_path / 'up').exists, 'the program')
            getattr(supervisord.rpc, method)()
            for _ in range(2):
                watch.listener.tick()
            assert watch.close(0) == []
    assert len(watch.log) == 2
    assert all(line.endswith(' (ignored: supervisord is shutting down or reloading)') for line in watch.log)


def test_a_core_dump(shared: Supervisord, tmp_path: Path) -> None:
    if not os.access('/usr/bin/gcore', os.X_OK):
        pytest.skip('there is no gcore')
    pid = shared.info('web')['pid']
    with Site(FAILING) as site, Watch(shared, tmp_path, '-d', str(tmp_path), '-p', 'web', site.url()) as watch:
        assert watch.tick() == {'web:web'}
        (_, text), = watch.close(1)
    if 'ptrace' in watch.listener.log:
        pytest.skip('gcore may not trace processes here')
    core = tmp_path / f'web.{pid}'
    assert core.stat().st_size > 0
    assert core.stat().st_mode & 0o777 == 0o600
    assert watch.log[1:] == [f'wrote a core dump of web to {core}', 'restarted web']
    assert f'Saved corefile {core}' in text


def test_once_prints_what_would_be_restarted(shared: Supervisord, tmp_path: Path) -> None:
    pids = find_pids(shared)
    with Site(FAILING) as site:
        printed = run_command_line('httpok', '--once', '--configuration', str(shared.configuration), '-p', 'pool',
                                   '-p', 'idle', '-p', 'nobody', site.url(), folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert re.sub(r'pid \d+, up [^)]*', '', printed.stdout).splitlines()[3:] == [
        'verdict  status 500 No (expected 200)', 'watched  pool:pool_0 (RUNNING, ): would be restarted',
        'watched  pool:pool_1 (RUNNING, ): would be restarted', 'watched  site:idle (STOPPED): left alone: not RUNNING',
        'no process is named "pool"; using all processes of group "pool"', 'warning: no process matches "nobody"']
    assert find_pids(shared) == pids
