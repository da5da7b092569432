"""crashmail with a real supervisord: exit statuses from its log, the last log lines, --shutdown, --once."""
from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest
from inbox import CommandInbox
from support import Supervisord, make_patient, read, run_command_line, wait_for, write_script

LISTENER = """
[eventlistener:crashmail]
command=BIN/crashmail -m bob@example.com -s "%(command)s" %(options)s
events=PROCESS_STATE_EXITED,PROCESS_STATE_FATAL
buffer_size=100
stderr_logfile=%(folder)s/crashmail.log
"""
# Its n-th run exits with status n after a coloured line; the fourth keeps running.
LOOP = ('echo x >> {0}/runs\nn=$(wc -l < {0}/runs)\n[ $n -gt 3 ] && exec sleep 1000\n'
        'printf "\\033[31mrun %s\\033[0m\\n" $n\nsleep 0.2\nexit $n\n')
# supervisord rotates its log after the last line.
ROTATING = 'i=0\nwhile [ $i -lt 30 ]; do echo line $i; i=$((i+1)); done\nprintf %0200d 0\nexit 3\n'


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
    return re.findall(r' crashmail: ((?!sent mail).* (?:exited unexpectedly|is FATAL).*)', log)


def wait_for_crashes(folder: Path, number: int) -> list[str]:
    wait_for(lambda: len(read_crashes(folder)) >= number, lambda: f'{number} crashes in {read_crashes(folder)}')
    return read_crashes(folder)


def wait_for_exec(pid: int) -> int:
    """Wait until a process runs sleep, and return its pid: before that it may handle signals as supervisord does."""
    wait_for(lambda: read(Path(f'/proc/{pid}/comm')) == 'sleep\n', 'exec')
    return pid


def test_different_crashes_of_a_night(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    loop = write_script(tmp_path / 'loop', LOOP.format(tmp_path))
    quick = write_script(tmp_path / 'quick', 'echo no config >&2\nexit 78\n')
    rotating = write_script(tmp_path / 'rotating', ROTATING)
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
startsecs=600
startretries=0
[program:rotating]
command={rotating}
startsecs=0
autorestart=false
stdout_logfile=%(here)s/rotating.out
stdout_logfile_maxbytes=200
stdout_logfile_backups=2
[program:expected]
command=false
startsecs=0
exitcodes=1
autorestart=unexpected
""")
    web, odd = (wait_for_exec(supervisord.wait_for_state(name)['pid']) for name in ('web', "we'b(x)"))
    os.kill(web, signal.SIGKILL)
    os.kill(odd, signal.SIGTERM)
    supervisord.wait_for_state('expected', 'EXITED')
    # Of loop, the first.
    bodies = {str(mail['Subject']).split()[0]: mail.get_content() for mail in reversed(inbox.wait(8))}
    crashes = read_crashes(tmp_path)
    assert len(crashes) == len(inbox.mails) == 8     # that of `expected` is none
    assert f'web (pid {web}) exited unexpectedly: terminated by SIGKILL' in crashes
    assert f"we'b(x) (pid {odd}) exited unexpectedly: terminated by SIGTERM" in crashes
    assert "missing is FATAL: supervisord gave up starting it: can't find command '/nonexistent/program'" in crashes
    assert ('quick is FATAL: supervisord gave up starting it: Exited too quickly (process log may have details): '
            'exit status 78') in crashes
    statuses = [line.partition(' unexpectedly')[2] for line in crashes if line.startswith('loop')]
    assert statuses == [': exit status 1', ': exit status 2', ': exit status 3']
    assert 'Unable to read its stdout log: /dev/null is not a file.' in bodies['web']
    assert 'The last lines of its stderr log:\n  no config\n' in bodies['quick']
    assert re.search(r'exit status 1\n\nThe last lines of its stdout log:\n  run 1\n', bodies['loop'])
    assert (tmp_path / 'rotating.out').read_bytes() == b''
    assert re.search(r'The last lines of its stdout log:\n(  line \d+\n)*  0{200}\n', bodies['rotating'])
    assert 'empty' not in bodies['rotating']


def test_storm_loses_no_crash_and_no_mail(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    """30 processes exit at once. Another group has processes of the same names, which keep running."""
    number = 30
    supervisord = run('', """
[program:p]
command=sleep 1000
process_name=%(process_num)d
numprocs=30
startsecs=0
autorestart=false
[program:q]
command=sleep 1000
process_name=%(process_num)d
numprocs=3
startsecs=0
""")
    wait_for(lambda: supervisord.log.count('entered RUNNING state') >= number + 4, 'all processes')
    infos = [info for info in supervisord.rpc.getAllProcessInfo() if info['group'] == 'p']
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGUSR1]
    expected = {}
    for index, info in enumerate(infos):
        expected[f"p:{info['name']} (pid {info['pid']})"] = f'terminated by {signals[index % 4].name}'
        os.kill(wait_for_exec(info['pid']), signals[index % 4])
    crashes = wait_for_crashes(tmp_path, number)
    assert dict(line.split(' exited unexpectedly: ') for line in crashes) == expected
    assert 'discarding event' not in supervisord.log
    assert sorted(subject.split()[0] for subject in [mail['Subject'] for mail in inbox.wait(number)]) == sorted(
        info['name'] for info in infos)


def crash_once(tmp_path: Path, run: Run, inbox: CommandInbox, supervisord_options: str, script: str) -> str:
    """Let a program crash under a supervisord with these options, and return the body of the mail."""
    program = write_script(tmp_path / 'program', script)
    run('--tail=2', f'[supervisord]\n{supervisord_options}\n[program:größe]\ncommand={program}\nstartsecs=0\n'
                    'autorestart=false\nstdout_logfile=größe.out\n')     # relative: only supervisord can read it
    body: str = inbox.wait()[0].get_content()
    return body


@pytest.mark.parametrize('loglevel', ['info', 'warn'])
def test_exit_status_at_a_loglevel_without_output_or_without_starts(
        tmp_path: Path, run: Run, inbox: CommandInbox, loglevel: str) -> None:
    """The others log at debug: supervisord's log has what programs print, also characters that XML does not allow."""
    body = crash_once(tmp_path, run, inbox, f'loglevel={loglevel}', 'echo 日本\nexit 3\n')
    assert re.search(r'größe \(pid \d+\) exited unexpectedly: exit status 3\n', body)
    assert 'The last lines of its stdout log:\n  日本' in body


def test_exit_status_if_the_log_is_long_and_begins_within_a_character(
        tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    body = crash_once(tmp_path, run, inbox, 'loglevel=debug',
                      f"i=0\nwhile [ $i -lt 400 ]; do echo {'日本語' * 20}; i=$((i+1)); done\nsleep 0.3\nexit 3\n")
    assert 'exited unexpectedly: exit status 3\n' in body


def test_supervisord_whose_log_cannot_be_read(tmp_path: Path, run: Run, inbox: CommandInbox) -> None:
    body = crash_once(tmp_path, run, inbox, 'logfile=/dev/stdout\nlogfile_maxbytes=0', 'echo words\nexit 3\n')
    assert re.search(r'größe \(pid \d+\) exited unexpectedly\n\nThe last lines of its stdout log:\n  words\n', body)


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
    mail, = inbox.mails
    assert mail['Subject'].startswith('web crashed at ')
    assert re.search(r'web \(pid \d+\) exited unexpectedly: exit status 3\n', mail.get_content())
    log = (tmp_path / 'crashmail.log').read_text('utf-8')
    assert 'asked supervisord to shut down' in log
    assert 'sent mail "web crashed at' in log


# The command line.

def test_once_sends_a_test_mail(tmp_path: Path, inbox: CommandInbox) -> None:
    with Supervisord(tmp_path, '[program:web]\ncommand=sleep 1000\n') as supervisord:
        printed = run_command_line('crashmail', '--once', '-m', 'bob@example.com', '-s', inbox.command, '-p', 'web',
                                   '-p', 'wbe', '--configuration', str(supervisord.configuration), folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert printed.stdout.splitlines()[1] == 'warning: no process matches "wbe"'
    assert printed.stdout.splitlines()[2].startswith('sent mail to bob@example.com')
    assert inbox.mails[0].get_content().endswith(', supervisor testing\n')
