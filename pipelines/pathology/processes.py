"""Worker processes that read and encode: spawned, ready before they are needed, never orphans."""

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pipelines.pathology.tile_features import start_worker

_TRIES = 3
_TILES_PER_WORKER = 400  # fewer tiles of one slide do not repay the start of a process


def start_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool with a process that runs; all end when this one does, even by a kill.

    Raises RuntimeError where none can start.
    """
    for _ in range(_TRIES):  # a process may be killed while it starts, for want of memory
        pool, started = _begin_pool(processes)
        if _has_started(started):
            return pool
        pool.shutdown(wait=False)
    raise RuntimeError(
        "worker processes cannot start; call extract_features below "
        "`if __name__ == '__main__':` or with workers=1"
    )


def _begin_pool(processes: int) -> "tuple[ProcessPoolExecutor, Future[int]]":
    # spawned, not forked: the parent may hold threads and locks of torch
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker)
    return pool, pool.submit(os.getpid)


def _has_started(started: "Future[int]") -> bool:
    try:
        started.result()
    except BrokenProcessPool:
        return False
    return True


class TilePool:
    """Processes that read the tiles of one slide: started for the first slide that repays it."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        self._started: Future[int] | None = None

    def prepare(self, count: int) -> None:
        """Let processes start, while tissue is sought, if `count` tiles repay it."""
        least = _TILES_PER_WORKER * self.processes
        if self._pool is None and self.processes > 1 and count >= least:
            self._pool, self._started = _begin_pool(self.processes)

    def for_tiles(self, count: int) -> ProcessPoolExecutor | None:
        """Return the pool, or None where `count` tiles are read sooner without."""
        self.prepare(count)
        if self._started is not None and not _has_started(self._started):
            self.discard()
            self._pool = start_pool(self.processes)
        return self._pool

    def discard(self) -> None:
        """Give up the processes, one of which may have died."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._started = None

    def __enter__(self) -> "TilePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()
