"""Processes that work for this one, side by side, and end with it however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def pool_of(processes: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes, started at need; at the block's end they end, whatever they are about.

    They are forked from a server which was started afresh: safe beside CUDA and threads, which do not survive a fork of
    this process.
    """
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def leave_interrupts() -> None:
    """Ctrl-C in a terminal reaches every process there; the one that started the others answers for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _begin() -> None:
    leave_interrupts()
    end_with_parent()


def end_with_parent() -> None:
    """End this process with the one that it works for, which may be killed and tell nobody."""
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
