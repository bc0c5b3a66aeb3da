"""Whether the other processes of a run are still there, whatever this one is waiting for.

Every process says so every few seconds, from a thread that goes on while the program computes, reads files or waits for
a GPU.  One that has been silent for ``SILENCE`` is gone: killed where nothing closed its connections, or with its
machine.  One that is merely busy is not silent, however long it takes.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch.distributed import TCPStore

INTERVAL = 5.0  # seconds
SILENCE = 120.0  # seconds
GOODBYE = 2**40  # what a process that has ended well counts on to; nobody waits for its next beat


def start_heartbeats(rank: int, processes: int, lost: Callable[[int], None]) -> Callable[[], None]:
    """Tell the others and listen to them from now on.

    Args:
        lost: called, in a thread of its own, with the rank of a process that is silent.

    Returns:
        what is to be called when this process has ended well.
    """
    # A connection of its own: on another one it would have to wait for what the program asks there.
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    started = time.monotonic()
    heard = {other: (0, started) for other in range(processes) if other != rank}  # beats, and when the last one came

    def beat() -> None:
        while True:
            store.add(f"heartbeats/{rank}", 1)
            for other, (before, _) in heard.items():
                count = store.add(f"heartbeats/{other}", 0)
                if count != before:
                    heard[other] = count, time.monotonic()
            time.sleep(INTERVAL)

    def beat_while_the_store_answers() -> None:
        with suppress(RuntimeError):  # where it does not, or only blocks, nobody is heard of any more
            beat()

    def judge() -> None:
        while True:
            time.sleep(INTERVAL)
            for other, (count, last) in heard.items():
                if count < GOODBYE and time.monotonic() - last > SILENCE:
                    lost(other)

    def goodbye() -> None:
        with suppress(RuntimeError):
            store.add(f"heartbeats/{rank}", GOODBYE)

    for thread in (beat_while_the_store_answers, judge):
        threading.Thread(target=thread, daemon=True).start()
    return goodbye
