"""The demo as its users run it: it does its three jobs, and leaves nothing behind however it ends."""
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
from support import PYTHON, find_children, is_alive, read, run_by_hand, wait_for

LIMIT_SECONDS = 60
# Where a file of this name is on PYTHONPATH, every Python runs it at its start.
NO_MEMMON = '''\
import os
with open('/proc/self/cmdline', 'rb') as file:
    if b'superlance.memmon' in file.read().split(b'\\0'):
        os._exit(3)
'''


def _heed_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)    # the tests themselves may run under nohup


class Demo:
    """A running demo with a TMPDIR of its own; what it prints goes to files in folder.

    TMPDIR has to be short: pytest's folders are too long for a unix socket.
    """

    def __init__(self, folder: Path, name: str = 'demo', module_path: Path | None = None, **popen: Any) -> None:
        self._parent = tempfile.mkdtemp(dir='/tmp')
        self.tmpdir = Path(self._parent, name)
        self.tmpdir.mkdir()
        self._output = folder / 'output'
        self._errors = folder / 'errors'
        env = dict(os.environ, TMPDIR=str(self.tmpdir))
        if module_path:
            env['PYTHONPATH'] = os.pathsep.join(filter(None, (str(module_path), os.environ.get('PYTHONPATH'))))
        self._started = time.monotonic()
        with open(self._output, 'wb') as output, open(self._errors, 'wb') as errors:
            popen = dict(dict(stdout=output), **popen)
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [PYTHON, '-m', 'superlance.demo'], env=env, stdin=subprocess.DEVNULL, stderr=errors,
                start_new_session=True, preexec_fn=_heed_hangup, **popen)

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        supervisords = find_children(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in supervisords:
            for child in [*find_children(pid), pid]:
                if is_alive(child):
                    os.kill(child, signal.SIGKILL)
        if self.process.stdout:
            self.process.stdout.close()
        for folder in (self.folder, self._parent):
            shutil.rmtree(folder or self._parent, ignore_errors=True)

    @property
    def output(self) -> str:
        return read(self._output)

    @property
    def errors(self) -> str:
        return read(self._errors)

    @property
    def folder(self) -> str:
        """The temporary folder as the demo tells it, or ''."""
        match = re.search('all files are in (.*)', self.output)
        return match.group(1) if match else ''

    def wait_for_output(self, pattern: str) -> None:
        wait_for(lambda: re.search(pattern, self.output) or self.process.poll() is not None, f'output {pattern!r}')
        assert re.search(pattern, self.output), self.output + self.errors

    def wait(self) -> int:
        """Return the exit status, after a look for what it has left behind."""
        status = self.process.wait(LIMIT_SECONDS)
        assert time.monotonic() - self._started < LIMIT_SECONDS
        assert self.errors == ''
        if self.folder:
            assert not Path(self.folder).exists()
            assert find_processes(self.folder) == []
        assert list(self.tmpdir.iterdir()) == []
        assert find_processes(str(self.tmpdir)) == []
        return status

    @property
    def jobs(self) -> list[str]:
        """The lines about the three jobs: 'memmon done', and so on."""
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
            pass  # it has ended since
    return found


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    with Demo(tmp_path) as running:
        yield running


@pytest.mark.parametrize('name, is_used', [('50 %s of 100%', True), ('a-long-name-' * 10, False)])
def test_three_jobs_are_done_wherever_the_folder_is(tmp_path: Path, name: str, is_used: bool) -> None:
    with Demo(tmp_path, name) as demo:
        assert demo.wait() == 0, demo.output
        assert demo.folder.startswith(str(demo.tmpdir)) == is_used
        assert demo.jobs == ['memmon done', 'httpok done', 'crashmail done']
        for text in (r'httpok +http://\S+: status 200 in ', r'httpok +http://\S+: no complete reply within 2 s',
                     r'httpok +restarted hanging', r"supervisord +spawned: 'hanging'", r'memmon +restarted leaky \(pid',
                     r'crashmail +program crashing', r'\| Subject: httpok: http://\S+: bad status returned',
                     r'\| Subject: memmon: process leaky restarted', r'\| Subject: crashing crashed at ',
                     r'\|   ZeroDivisionError'):
            assert re.search(text, demo.output), f'{text} in {demo.output}'


def test_an_early_signal_ends_it_and_the_sections_shown_are_right(demo: Demo) -> None:
    demo.wait_for_output('all files are in')
    os.killpg(demo.process.pid, signal.SIGINT)
    assert demo.wait() == 128 + signal.SIGINT     # early: nothing runs yet
    for name in ('memmon', 'httpok', 'crashmail'):
        command = re.search(rf'\[eventlistener:{name}\]\n +command={name} (.*)\n +events=\w+\n', demo.output)
        assert command, demo.output
        once = run_by_hand(name, *command.group(1).split())
        assert once.returncode == 1 and 'must be run as a supervisor event listener' in once.stderr


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(demo: Demo, signum: signal.Signals) -> None:
    demo.wait_for_output("spawned: 'leaky'")
    os.killpg(demo.process.pid, signum)     # as a terminal does
    assert demo.wait() == 128 + signum
    assert f'ended by {signum.name}\n' in demo.output
    assert demo.jobs == []


def test_a_supervisord_that_hangs_is_killed_with_its_programs(demo: Demo) -> None:
    demo.wait_for_output("spawned: 'leaky'")
    supervisord, = find_children(demo.process.pid)
    os.kill(supervisord, signal.SIGSTOP)
    os.killpg(demo.process.pid, signal.SIGTERM)
    assert demo.wait() == 128 + signal.SIGTERM


def test_a_supervisord_that_is_killed_ends_the_demo(demo: Demo) -> None:
    demo.wait_for_output("spawned: 'leaky'")
    supervisord, = find_children(demo.process.pid)
    os.kill(supervisord, signal.SIGKILL)
    assert demo.wait() == 1
    assert 'supervisord has ended (status -9)' in demo.output
    assert demo.jobs == ['memmon NOT done', 'httpok NOT done', 'crashmail NOT done']


def test_a_supervisord_that_does_not_start_is_told(tmp_path: Path) -> None:
    broken = tmp_path / 'modules' / 'supervisor'
    broken.mkdir(parents=True)
    broken.joinpath('__init__.py').touch()
    broken.joinpath('supervisord.py').write_text("raise SystemExit('I am not well today')\n", 'utf-8')
    broken.joinpath('childutils.py').write_text('def getRPCInterface(_): raise OSError\n', 'utf-8')
    broken.joinpath('xmlrpc.py').write_text('Faults = getFaultDescription = None\n', 'utf-8')
    with Demo(tmp_path, module_path=broken.parent) as demo:
        assert demo.wait() == 1
        assert 'supervisord has ended (status 1)' in demo.output and 'I am not well today' in demo.output


def test_a_listener_that_does_not_run_leaves_its_job_undone(tmp_path: Path) -> None:
    modules = tmp_path / 'modules'
    modules.mkdir()
    modules.joinpath('sitecustomize.py').write_text(NO_MEMMON, 'utf-8')
    with Demo(tmp_path, module_path=modules) as demo:
        assert demo.wait() == 1
        assert 'supervisord is unable to start memmon' in demo.output
        assert 'memmon NOT done' in demo.jobs
        assert 'memmon     NOT done: never restarted leaky, never mailed about it' in demo.output


def test_a_reader_that_goes_early_ends_it_in_order(tmp_path: Path) -> None:
    with Demo(tmp_path, stdout=subprocess.PIPE) as demo:
        assert demo.process.stdout
        assert demo.process.stdout.readline().startswith(b'Three programs')
        demo.process.stdout.close()
        assert demo.wait() == 1


def test_arguments_are_refused_and_help_is_printed() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([PYTHON, '-m', 'superlance.demo', *arguments], stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=30)
    refused, helped = run('fast'), run('--help')
    assert (refused.returncode, refused.stdout) == (2, '') and refused.stderr.count('\n') == 1
    assert (helped.returncode, helped.stderr) == (0, '') and helped.stdout.startswith('Usage: python -m superlance')


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with open('/dev/full', 'wb') as full, Demo(tmp_path, stdout=full) as demo:
        assert demo.process.wait(LIMIT_SECONDS) == 1
        assert demo.errors == 'the demo ended early: [Errno 28] No space left on device\n'
        assert os.listdir(str(demo.tmpdir)) == []


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    text = 'from superlance import demo; demo.DEADLINE_SECONDS = 0; raise SystemExit(demo.main([]))'
    folder = tempfile.mkdtemp(dir='/tmp')
    try:
        done = subprocess.run([PYTHON, '-c', text], env=dict(os.environ, TMPDIR=folder), stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS)
        assert os.listdir(folder) == []
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 1
    assert 'that was not all, but 0 s are over' in done.stdout and 'NOT done: never restarted leaky' in done.stdout
