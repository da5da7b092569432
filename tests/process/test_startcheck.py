"""The check at start as part of a process, with a supervisord that accepts connections and never answers."""
from __future__ import annotations

import socket
import threading
from pathlib import Path

from support import TIMEOUT, Listener, serving


def test_sigterm_interrupts_the_check_at_start(tmp_path: Path) -> None:
    connected, finished = threading.Event(), threading.Event()

    def hang(client: socket.socket) -> None:
        connected.set()
        finished.wait(TIMEOUT)

    path = str(tmp_path / 's.sock')
    try:
        with serving(hang, socket.AF_UNIX, path), \
                Listener(['memmon', '-a', '1GB'], {'SUPERVISOR_SERVER_URL': f'unix://{path}'}) as listener:
            listener.expect(b'READY\n')
            assert connected.wait(TIMEOUT)
            assert listener.terminate() == 0
            # After 5 seconds the check would give up, with a warning.
            assert 'warning' not in listener.log
    finally:
        finished.set()
