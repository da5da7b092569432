"""crashmail with a real supervisord: exit statuses from its log, the last log lines, --shutdown, --once."""
from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from inbox import CommandInbox
from support import Listener, Supervisord, make_patient, run_command_line, wait_for, write_script

LISTENER = """
[eventlistener:crashmail]
command=BIN/crashmail -m bob@example.com -s "%(command)s" %(options)s
events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
buffer_size=100
stderr_logfile=%(folder)s/crashmail.log
"""
# Its n-th run exits with status n after a coloured line.
LOOP = 'echo x >> {0}/runs\nn=$(wc -l < {0}/runs)\nprintf "\\033[31mrun %s\\033[0m\\n" $n\nsleep 0.2\nexit $n\n'


@pytest.fixture
def inbox(tmp_path: Path) -> CommandInbox:
    return CommandInbox(tmp_path)


Run = Callable[..., Supervisord]


@pytest.fixture
def run(tmp_path: Path, inbox: CommandInbox) -> Iterator[Run]:
    """Return a function that runs supervisord with crashmail and programs."""
    running: list[Supervisord] = []

    def run(options: str, programs: str, **arguments: Any) -> Supervisord:
        listener = LISTENER % {'command': inbox.command, 'options': options, 'folder': tmp_path}
        running.append(Supervisord(tmp_path, listener + programs, environment=make_patient(tmp_path), **arguments))
        return running[-1]
    yield run
    for supervisord in running:
        supervisord.stop()


def read_crashes(folder: Path) -> list[str]:
    """Return what crashmail has logged about crashes."""
    log = (folder / 'crashmail.log').read_text('utf-8') if (folder / 'crashmail.log').exists() else ''
    return re.findall(r' crashmail: (.* (?:exited unexpectedly|is FATAL).*)', log)


def wait_for_crashes(folder: Path, number: int) -> list[str]:
    wait_for(lambda: len(read_crashes(folder)) >= number, lambda: f'{number} crashes in {read_crashes(folder)}')
    return read_crashes(folder)


def test_different_crashes_of_a_night(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    loop = write_script(tmp_path / 'loop', LOOP.format(tmp_path))
    quick = write_script(tmp_path / 'quick', 'echo no config >&2\nexit 78\n')
    supervisord = run('--tail=5', f"""
[program:loop]
command={loop}
startsecs=0
stdout_logfile=%(here)s/loop.out
[program:web]
command=sleep 1000
startsecs=0
autorestart=false
stdout_logfile=/dev/null
stderr_logfile=NONE
[program:we'b(x)]
command=sleep 1000
startsecs=0
[program:missing]
command=/nonexistent/program
startretries=0
[program:quick]
command={quick}
startretries=0
""")
    wait_for_crashes(tmp_path, 1)
    web = supervisord.info('web')['pid']
    os.kill(web, signal.SIGKILL)
    odd = supervisord.info("we'b(x)")['pid']
    os.kill(odd, signal.SIGTERM)
    names = ['web', 'b(x)', 'missing', 'quick']
    wait_for(lambda: len([line for line in read_crashes(tmp_path) if line.startswith('loop')]) >= 5
             and len(inbox.mails) >= 9 and all(f'{name} ' in str(read_crashes(tmp_path)) for name in names),
             lambda: str(read_crashes(tmp_path)))
    crashes = read_crashes(tmp_path)
    assert f'web (pid {web}) exited unexpectedly: terminated by SIGKILL' in crashes
    assert f"we'b(x) (pid {odd}) exited unexpectedly: terminated by SIGTERM" in crashes
    assert "missing is FATAL: supervisord gave up starting it: can't find command '/nonexistent/program'" in crashes
    assert ('quick is FATAL: supervisord gave up starting it: Exited too quickly (process log may have details): '
            'exit status 78') in crashes
    statuses = [line.partition(' unexpectedly')[2] for line in crashes if line.startswith('loop')]
    assert statuses == [f': exit status {number + 1}' for number in range(len(statuses))]
    bodies = '\n'.join(mail.get_content() for mail in inbox.mails)
    assert 'Unable to read its stdout log: /dev/null is not a file.' in bodies
    assert 'The last lines of its stderr log:\n  no config\n' in bodies
    first = next(mail.get_content() for mail in inbox.mails if str(mail['Subject']).startswith('loop'))
    assert re.search(r'exit status 1\n\nThe last lines of its stdout log:\n  run 1\n', first)


def test_storm(tmp_path: Path, run: Run) -> None:
    """The processes of two groups have the same names, and those of one keep running.

    How fast crashmail is, the benchmark measures: here at most 8 events wait in a buffer of 10.
    """
    number = 40
    supervisord = run('', """
[program:p]
command=sleep 1000
process_name=%(process_num)d
numprocs=40
startsecs=0
autorestart=false
[program:q]
command=sleep 1000
process_name=%(process_num)d
numprocs=3
startsecs=0
""")
    wait_for(lambda: supervisord.log.count('entered RUNNING state') >= number + 4, 'all processes')
    expected = {}
    # The first crash imports what the others need.
    os.kill(supervisord.info('q:0')['pid'], signal.SIGKILL)
    wait_for_crashes(tmp_path, 1)
    infos = [info for info in supervisord.rpc.getAllProcessInfo() if info['group'] == 'p']
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGUSR1]
    for index, info in enumerate(infos):
        expected[f"p:{info['name']} (pid {info['pid']})"] = f'terminated by {signals[index % 4].name}'
        wait_for_crashes(tmp_path, index - 6)
        os.kill(info['pid'], signals[index % 4])
    crashes = wait_for_crashes(tmp_path, number + 1)[1:]
    assert dict(line.split(' exited unexpectedly: ') for line in crashes) == expected


def crash_once(tmp_path: Path, run: Run, inbox: CommandInbox, supervisord_options: str, script: str) -> str:
    """Let a program crash under a supervisord with these options, and return the body of the mail."""
    program = write_script(tmp_path / 'program', script)
    run('--tail=2', f'[supervisord]\n{supervisord_options}\n[program:größe]\ncommand={program}\nstartsecs=0\n'
                    'autorestart=false\nstdout_logfile=größe.out\n')     # relative: only supervisord can read it
    body: str = inbox.wait()[0].get_content()
    return body


@pytest.mark.parametrize('loglevel', ['info', 'warn', 'debug', 'blather'])
def test_exit_status_at_any_loglevel(tmp_path: Path, run: Run, inbox: CommandInbox, loglevel: str) -> None:
    """At debug, what a program prints is in supervisord's log, here with characters that XML does not allow."""
    body = crash_once(tmp_path, run, inbox, f'loglevel={loglevel}', 'printf "\\033[31m日本\\033[0m\\007\\n"\nexit 3\n')
    assert re.search(r'größe \(pid \d+\) exited unexpectedly: exit status 3\n', body)
    assert 'The last lines of its stdout log:\n  日本' in body


def test_exit_status_if_the_log_is_long_and_begins_within_a_character(
        tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    body = crash_once(tmp_path, run, inbox, 'loglevel=debug',
                      f"i=0\nwhile [ $i -lt 400 ]; do echo {'日本語' * 20}; i=$((i+1)); done\nsleep 0.3\nexit 3\n")
    assert 'exited unexpectedly: exit status 3\n' in body


@pytest.mark.parametrize('logfile', ['/dev/stdout', 'syslog', '/dev/null'])
def test_supervisord_whose_log_cannot_be_read(tmp_path: Path, run: Run, inbox: CommandInbox, logfile: str) -> None:
    body = crash_once(tmp_path, run, inbox, f'logfile={logfile}\nlogfile_maxbytes=0', 'echo words\nexit 3\n')
    assert re.search(r'größe \(pid \d+\) exited unexpectedly\n\nThe last lines of its stdout log:\n  words\n', body)


def test_processes_of_the_same_name_never_get_the_status_of_one_another(tmp_path: Path, run: Run) -> None:
    programs = ''.join(f"""
[program:{group}]
command=sh -c 'sleep 0.%(process_num)d; exit {status}'
process_name=%(process_num)d
numprocs=3
startsecs=0
autorestart=unexpected
""" for group, status in (('a', 11), ('b', 22), ('c', 33)))
    run('', programs)
    crashes = wait_for_crashes(tmp_path, 20)
    found = re.findall(r'([abc]):\d \(pid \d+\) exited unexpectedly: exit status (\d+)', '\n'.join(crashes))
    assert all({'a': '11', 'b': '22', 'c': '33'}[group] == status for group, status in found)


def test_tail_after_supervisord_has_rotated_the_log(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    program = write_script(
        tmp_path / 'program',
        'i=0\nwhile [ $i -lt 30 ]; do echo line $i; sleep 0.01; i=$((i+1)); done\nprintf %0200d 0\nexit 3\n')
    run('--tail=3', f'[program:web]\ncommand={program}\nstartsecs=0\nautorestart=false\n'
                    'stdout_logfile=%(here)s/web.out\nstdout_logfile_maxbytes=200\nstdout_logfile_backups=2\n')
    body = inbox.wait()[0].get_content()
    assert (tmp_path / 'web.out').read_bytes() == b''
    assert f'log:\n  line 28\n  line 29\n  {0:0200}\n' in body or f'log:\n  {0:0200}\n' in body
    assert 'empty' not in body


# --shutdown.

def test_shutdown_after_a_crash(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    supervisord = run('--shutdown -p web', """
[program:db]
command=sh -c 'exit 9'
startsecs=0
autorestart=false
[program:web]
command=sh -c 'while [ ! -e %(here)s/go ]; do sleep 0.1; done; exit 3'
startsecs=0
[program:late]
command=sh -c 'trap "exit 5" TERM; while true; do sleep 0.1; done'
""")
    wait_for_crashes(tmp_path, 1)   # that of db, which is not watched
    (tmp_path / 'go').write_bytes(b'')
    assert supervisord.wait() == 0
    assert len(inbox.mails) == 1
    mail, = inbox.mails
    assert mail['Subject'].startswith('web crashed at ')
    assert re.search(r'web \(pid \d+\) exited unexpectedly: exit status 3\n', mail.get_content())
    log = (tmp_path / 'crashmail.log').read_text('utf-8')
    assert 'asked supervisord to shut down' in log
    assert 'sent mail "web crashed at' in log


def test_shutdown_when_supervisord_gives_up_starting_a_program(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    supervisord = run('--shutdown', '[program:missing]\ncommand=/nonexistent/program\nstartretries=0\n')
    assert supervisord.wait() == 0
    assert inbox.subjects[0].startswith('missing is FATAL: ')


# The command line, and the checks at start.

PROGRAMS = """
[program:web]
command=sleep 1000
[program:worker]
command=sleep 1000
process_name=%(process_num)d
numprocs=2
stdout_logfile=NONE
"""


def test_checks_at_start(tmp_path: Path) -> None:
    with Supervisord(tmp_path, PROGRAMS) as supervisord, Listener(
            ['crashmail', '--tail=5', '-p', 'web', '-p', 'worker', '-p', 'wbe'], supervisord.environment) as listener:
        log = listener.wait_for_log('--tail')
        listener.expect(b'READY\n')
        assert 'warning: no process matches "wbe"\n' in log
        assert 'no process is named "worker"; using all processes of group "worker"\n' in log
        assert 'warning: unable to read the stdout log of worker:0, worker:1 for --tail: there is none' in log
        assert listener.close() == 0


def test_once(tmp_path: Path, inbox: CommandInbox) -> None:
    with Supervisord(tmp_path, PROGRAMS) as supervisord:
        for arguments, environment, status in (
                (['-p', 'web', '--configuration', str(supervisord.configuration)], {}, 0),
                (['-p', 'wbe'], supervisord.environment, 1)):
            printed = run_command_line('crashmail', '--once', '-m', 'bob@example.com', '-s', inbox.command,
                                       *arguments, folder=tmp_path, **environment)
            assert (printed.returncode, printed.stderr) == (status, '')
            assert ('warning: no process matches "wbe"' in printed.stdout) == bool(status)
            assert printed.stdout.splitlines()[-1].startswith('sent mail to bob@example.com')
    assert [mail.get_content().endswith(', supervisor testing\n') for mail in inbox.mails] == [True, True]
