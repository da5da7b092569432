"""The check at start as part of a process, with a supervisord that accepts connections and never answers."""
from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from support import TIMEOUT, Listener, serving


@pytest.mark.parametrize('command', [['memmon', '-a', '1GB'], ['crashmail', '-a']])
def test_sigterm_interrupts_the_check_at_start(tmp_path: Path, command: list[str]) -> None:
    connected, finished = threading.Event(), threading.Event()

    def hang(client: socket.socket) -> None:
        connected.set()
        finished.wait(TIMEOUT)

    path = str(tmp_path / 's.sock')
    try:
        with serving(hang, socket.AF_UNIX, path), \
                Listener(command, {'SUPERVISOR_SERVER_URL': f'unix://{path}'}) as listener:
            listener.expect(b'READY\n')
            assert connected.wait(TIMEOUT)
            start = time.monotonic()
            assert listener.terminate() == 0
            assert time.monotonic() - start < 3     # the check itself may take 5 seconds
            assert 'warning' not in listener.log
    finally:
        finished.set()
