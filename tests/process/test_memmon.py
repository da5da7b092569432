"""memmon as a process, without a supervisord that answers."""
from __future__ import annotations

import os
import time
from pathlib import Path

from support import Listener, wait_for, write_script


def test_sigterm_interrupts_ps_and_the_event_is_acknowledged(tmp_path: Path) -> None:
    write_script(tmp_path / 'ps', f'touch {tmp_path}/started; exec sleep 600\n')
    with Listener(['memmon', '-a', '1GB'], {'PATH': f"{tmp_path}:{os.environ['PATH']}"}) as listener:
        listener.expect(b'READY\n')
        listener.send_event('TICK_5', f'when:{int(time.time())}')
        wait_for((tmp_path / 'started').exists)
        assert listener.terminate() == 0
        listener.expect(b'RESULT 2\nOK')
        assert 'unable' not in listener.log
