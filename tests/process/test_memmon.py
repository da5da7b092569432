"""memmon as a process, without a supervisord that answers."""
from __future__ import annotations

import os
import time
from pathlib import Path

from support import Listener, run_command_line, wait_for, write_script


def test_sigterm_interrupts_ps_and_the_event_is_acknowledged(tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', f'touch {tmp_path}/started; exec sleep 600\n')
    with Listener(['memmon', '-a', '1GB'], {'PATH': f"{tmp_path}:{os.environ['PATH']}"}) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        wait_for((tmp_path / 'started').exists)
        start = time.monotonic()
        assert listener.terminate() == 0
        assert time.monotonic() - start < 5
        listener.expect(b'RESULT 2\nOK')
        assert 'unable' not in listener.log


def test_outside_supervisord_the_hint_is_a_command_that_works(tmp_path: Path) -> None:
    printed = run_command_line('memmon', '-a', '1GB', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (1, '')
    assert '--once' in printed.stderr
    assert printed.stderr.count('\n') == 1


def test_once_with_a_configuration_that_is_missing(tmp_path: Path) -> None:
    printed = run_command_line('memmon', '--once', '-a', '1MB', '--configuration=missing.conf', folder=tmp_path)
    assert (printed.returncode, printed.stdout) == (2, '')
    assert printed.stderr.startswith('memmon: option --configuration: ')
    assert 'missing.conf' in printed.stderr
    assert printed.stderr.endswith("; try 'memmon --help'\n")
    assert printed.stderr.count('\n') == 1


def test_once_with_a_supervisord_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / 'x.conf').write_text('[supervisorctl]\nserverurl=unix://%(here)s/none.sock\n', 'utf-8')
    expected = f'warning: supervisord at unix://{tmp_path}/none.sock does not answer '
    printed = run_command_line('memmon', '--once', '-a', '1MB', '--configuration=x.conf', folder=tmp_path)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert printed.stdout.startswith(expected)
    assert printed.stdout.count('\n') == 1
    url = f'unix://{tmp_path}/none.sock'
    printed = run_command_line('memmon', '--once', '-a', '1MB', folder=tmp_path, SUPERVISOR_SERVER_URL=url)
    assert (printed.returncode, printed.stderr) == (1, '')
    assert printed.stdout.startswith(expected)
