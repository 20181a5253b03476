"""Worker processes that read and encode: spawned, ready before they are needed, never orphans."""

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pipelines.pathology.tile_features import start_worker

_TILES_PER_WORKER = 400  # fewer tiles of one slide do not repay the start of a process


def new_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool whose processes end when this one does, even by a kill."""
    # spawned, not forked: the parent may hold threads and locks of torch
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker)


def check_start(pool: ProcessPoolExecutor, started: "Future[int] | None" = None) -> None:
    """Wait until a process of the pool runs; raises RuntimeError where none can."""
    try:
        (started or pool.submit(os.getpid)).result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "worker processes cannot start; call extract_features below "
            "`if __name__ == '__main__':` or with workers=1"
        ) from error


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
            self._pool = new_pool(self.processes)
            self._started = self._pool.submit(os.getpid)

    def for_tiles(self, count: int) -> ProcessPoolExecutor | None:
        """Return the pool, or None where `count` tiles are read sooner without."""
        self.prepare(count)
        if self._pool is not None:
            check_start(self._pool, self._started)
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
