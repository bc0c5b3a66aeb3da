"""Whether the other processes of a run are still there, whatever this one is waiting for.

Every process sends a beat every few seconds, from a thread that also runs while the program computes, reads files or
waits for a GPU.  One that has been silent for ``SILENCE`` is gone: killed where nothing closed its
connections, or with its machine.  One that is merely busy is not silent, however long it takes.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from torch.distributed import TCPStore

INTERVAL = 5.0  # seconds
SILENCE = 120.0  # seconds
GOODBYE = 2**40  # the last count of a process that has ended well: its next beat is not waited for


@contextmanager
def heartbeats(rank: int, processes: int, lost: Callable[[str], None]) -> Iterator[None]:
    """Tell the others and listen to them meanwhile.

    Args:
        lost: called in a separate thread with a sentence about the silent process.
    """
    # A separate connection: the program's own one may be blocked by its requests.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    started, ended = time.monotonic(), threading.Event()
    heard = {other: (0, started) for other in range(processes) if other != rank}  # beats, and the time of the last one

    def beat() -> None:
        with suppress(RuntimeError):  # if the store does not answer, or only blocks, no process can be heard
            while not ended.wait(INTERVAL):
                store.add(f"heartbeats/{rank}", 1)
                for other, (before, _) in heard.items():
                    count = store.add(f"heartbeats/{other}", 0)
                    if count != before:
                        heard[other] = count, time.monotonic()

    def judge() -> None:
        while not ended.wait(INTERVAL):
            for other, (count, last) in heard.items():
                if count < GOODBYE and time.monotonic() - last > SILENCE:
                    lost(f"process {other} has not responded for {SILENCE:.0f} s")

    threads = [threading.Thread(target=target, daemon=True) for target in (beat, judge)]
    for thread in threads:
        thread.start()
    try:
        yield
        with suppress(RuntimeError):
            store.add(f"heartbeats/{rank}", GOODBYE)
    finally:
        ended.set()
        for thread in threads:
            thread.join(INTERVAL)
