"""The demo as its users run it: it shows the three listeners at work, and leaves nothing behind however it ends."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from support import PYTHON, find_children, kill_marked, make_mark, read, wait_for

pytestmark = pytest.mark.usefixtures('measured')
LIMIT_SECONDS = 60
# Runs the demo with other limits, so that a test of them is fast.
IMPATIENT = 'from superlance import demo; demo.STOP_SECONDS = 1; raise SystemExit(demo.main([]))'


def _heed_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)    # the tests themselves may run under nohup


class Demo:
    """A running demo with its own TMPDIR; what it prints goes to files in folder.

    TMPDIR has to be short: pytest's folders are too long for a unix socket.
    """

    def __init__(self, folder: Path, *arguments: str, tmpdir: str = 'demo', modules: Path | None = None,
                 **popen: Any) -> None:
        self._parent = tempfile.mkdtemp(dir='/tmp')
        self._mark = make_mark()
        self.tmpdir = Path(self._parent, tmpdir)
        self.tmpdir.mkdir()
        self._output = folder / 'output'
        self._errors = folder / 'errors'
        environment = {**os.environ, **self._mark, 'TMPDIR': str(self.tmpdir)}
        if modules:
            environment['PYTHONPATH'] = os.pathsep.join(filter(None, (str(modules), os.environ.get('PYTHONPATH'))))
        self._started = time.monotonic()
        with open(self._output, 'wb') as output, open(self._errors, 'wb') as errors:
            options: dict[str, Any] = {'stdout': output, **popen}
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [PYTHON, *(arguments or ('-m', 'superlance.demo'))], env=environment, stdin=subprocess.DEVNULL,
                stderr=errors, start_new_session=True, preexec_fn=_heed_hangup, **options)

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        kill_marked(self._mark)
        if self.process.stdout:
            self.process.stdout.close()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._parent)

    @property
    def output(self) -> str:
        return read(self._output)

    @property
    def errors(self) -> str:
        return read(self._errors)

    @property
    def folder(self) -> str:
        """The temporary folder that the demo names, or ''."""
        match = re.search('All files are in (.*)', self.output)
        return match.group(1) if match else ''

    def wait_for_output(self, pattern: str) -> None:
        wait_for(lambda: re.search(pattern, self.output) or self.process.poll() is not None, f'output {pattern!r}')
        assert re.search(pattern, self.output), self.output + self.errors

    def wait(self) -> int:
        """Return the exit status."""
        return self.process.wait(LIMIT_SECONDS)

    def check_nothing_is_left(self) -> None:
        """Fail if the demo has left a folder or a process."""
        assert list(self.tmpdir.iterdir()) == []
        assert not self.folder or not Path(self.folder).exists()
        wait_for(lambda: find_processes(str(self.tmpdir)) == [], lambda: str(find_processes(str(self.tmpdir))))

    @property
    def verdicts(self) -> list[str]:
        """The lines of the summary: 'memmon done', and so on."""
        return [' '.join(pair) for pair in re.findall(r'^(\w+) +(done|NOT done): ', self.output, re.MULTILINE)]


def find_processes(folder: str) -> list[str]:
    """Return the command lines of the processes that work in a folder or name it."""
    found = []
    for process in Path('/proc').glob('[0-9]*'):
        try:
            words = (process / 'cmdline').read_bytes().replace(b'\0', b' ').decode('utf-8', 'replace')
            if folder in words or os.readlink(process / 'cwd').startswith(folder):
                found.append(words)
        except OSError:
            continue    # it has exited
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    with Demo(tmp_path) as running:
        yield running


@pytest.mark.once
@pytest.mark.timeout(90)
def test_it_shows_the_three_listeners_at_work_and_keeps_its_folder_with_keep(tmp_path: Path) -> None:
    with Demo(tmp_path, '-m', 'superlance.demo', '--keep', tmpdir='50 %s of 100%') as demo:
        assert demo.wait() == 0, demo.output
        assert demo.errors == ''
        assert demo.verdicts == ['memmon done', 'httpok done', 'crashmail done']
        for text in (r'httpok +http://\S+: no complete response within 2s', r'httpok +restarted hanging',
                     r"supervisord +spawned: 'hanging'", r'memmon +restarted leaky \(pid',
                     r'mail +Subject: httpok: http://\S+: bad status returned \(restarted hanging\)',
                     r'mail +Subject: memmon: process leaky:leaky restarted', r'mail +Subject: crashing crashed at ',
                     r'mail +ZeroDivisionError', r'supervisord is shutting down \.\.\.',
                     r'pid \d+ -> \d+; \d+\.\dMB -> \d+\.\dMB', 'All processes have exited'):
            assert re.search(text, demo.output), f'{text} in {demo.output}'
        assert demo.folder.startswith(str(demo.tmpdir))
        assert f'To run it again: cd \'{demo.folder}\' && ' in demo.output
        assert Path(demo.folder, 'supervisord.conf').exists()
        assert Path(demo.folder, 'memmon.log').exists()
        wait_for(lambda: find_processes(str(demo.tmpdir)) == [], lambda: str(find_processes(str(demo.tmpdir))))


def test_an_early_signal_stops_it(tmp_path: Path) -> None:
    with Demo(tmp_path, tmpdir='a-long-name-' * 10) as demo:
        demo.wait_for_output('All files are in /tmp/superlance-demo-')   # supervisord could not use the long name
        os.killpg(demo.process.pid, signal.SIGINT)
        assert demo.wait() == 128 + signal.SIGINT     # before supervisord has started anything
        demo.check_nothing_is_left()


def test_a_signal_stops_the_demo_without_leftovers(demo: Demo) -> None:
    demo.wait_for_output("spawned: 'leaky'")
    os.killpg(demo.process.pid, signal.SIGHUP)     # as a terminal does
    assert demo.wait() == 128 + signal.SIGHUP
    assert 'stopped by SIGHUP; supervisord is shutting down ...\n' in demo.output
    assert demo.verdicts == []
    demo.check_nothing_is_left()


def test_a_supervisord_that_hangs_is_killed_with_its_programs(tmp_path: Path) -> None:
    with Demo(tmp_path, '-c', IMPATIENT) as demo:
        demo.wait_for_output("spawned: 'leaky'")
        supervisord, = find_children(demo.process.pid)
        os.kill(supervisord, signal.SIGSTOP)
        os.killpg(demo.process.pid, signal.SIGTERM)
        assert demo.wait() == 128 + signal.SIGTERM
        demo.check_nothing_is_left()


def replace_supervisord(folder: Path, text: str) -> Path:
    """Return a folder of modules with another supervisor.supervisord."""
    package = folder / 'modules' / 'supervisor'
    package.mkdir(parents=True)
    package.joinpath('__init__.py').touch()
    package.joinpath('supervisord.py').write_text(text, 'utf-8')
    return package.parent


BROKEN = "raise SystemExit('this supervisord is broken')\n"
# Starts nothing, but logs a start every 0.1 s.
FAKE = """import time
with open('supervisord.log', 'w') as log:
    while True:
        log.write("2026-11-25 05:02:11,123 INFO spawned: 'leaky' with pid 999999999\\n")
        log.flush()
        time.sleep(0.1)
"""


def test_it_ends_when_supervisord_is_killed(tmp_path: Path) -> None:
    with Demo(tmp_path, modules=replace_supervisord(tmp_path, FAKE)) as demo:
        demo.wait_for_output("spawned: 'leaky'")
        supervisord, = find_children(demo.process.pid)
        os.kill(supervisord, signal.SIGKILL)
        assert demo.wait() == 1
        assert 'supervisord has exited (status -9)' in demo.output
        assert demo.verdicts == ['memmon NOT done', 'httpok NOT done', 'crashmail NOT done']
        demo.check_nothing_is_left()


def test_it_shows_why_supervisord_does_not_start(tmp_path: Path) -> None:
    with Demo(tmp_path, modules=replace_supervisord(tmp_path, BROKEN)) as demo:
        assert demo.wait() == 1
        assert 'supervisord has exited (status 1)' in demo.output
        assert demo.errors == 'this supervisord is broken\n'
        demo.check_nothing_is_left()


def test_a_closed_stdout_ends_the_demo_without_leftovers(tmp_path: Path) -> None:
    with Demo(tmp_path, modules=replace_supervisord(tmp_path, FAKE), stdout=subprocess.PIPE) as demo:
        assert demo.process.stdout
        assert demo.process.stdout.readline().startswith(b'A real supervisord')
        demo.process.stdout.close()
        assert demo.wait() == 1
        assert demo.errors == ''
        demo.check_nothing_is_left()


def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    with open('/dev/full', 'wb') as full, Demo(tmp_path, stdout=full) as demo:
        assert demo.wait() == 1
        assert demo.errors == 'superlance.demo: unable to write to stdout: No space left on device\n'
        demo.check_nothing_is_left()
