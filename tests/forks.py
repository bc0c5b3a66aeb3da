"""Scripts in processes of their own, forked from one that has imported PyTorch: that takes longer than what they do."""

import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

# One thread: sums over threads may round differently, and some tests compare bits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["main_sp", "main_prune", "main_rl_prune"])


class Forked:
    """A script that runs, in the place of ``subprocess.Popen``."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str] | None = None):
        self.arguments = [str(script), *map(str, arguments)]
        self._folder = TemporaryDirectory()
        self._written = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        given = (self.arguments, {**ENVIRONMENT, **(environment or {})}, *map(str, self._written))
        self.process = CONTEXT.Process(target=_run, args=given)
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the threads of the process that is forked from
            forkserver.ensure_running()
        self.process.start()

    def finished(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end, and kill it where that does not come."""
        try:
            self.process.join(timeout)
            assert self.process.exitcode is not None, f"{self.arguments} did not end within {timeout} s"
            return subprocess.CompletedProcess(
                self.arguments, self.process.exitcode, *(path.read_text() for path in self._written)
            )
        finally:
            self.process.kill()
            self.process.join()
            self._folder.cleanup()


def _run(arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((stdout, stderr), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
