"""Commands in a process of their own that stop, and wait, at a moment of their work which a test names.

A test that kills such a process knows that the work was under way, and how far.
"""

import os
import signal
import subprocess
import sys

import psutil

# The progress that a command shows is also where it can be stopped: at the first report of a job that has come so far.
COMMAND = """
import sys
from tasks.progress import ConsoleProgress

wanted, least = sys.argv[1], int(sys.argv[2])
sys.argv = ["roadfuse", *sys.argv[3:]]
stopped = []

def tell(self, what, done, total):
    if what == wanted and done >= least and not stopped:
        stopped.append(True)
        print("stopped", flush=True)
        sys.stdin.readline()

ConsoleProgress.__call__ = tell
{before}
from flows.cli import main
main()
"""


class Stopped:
    """A running command that has stopped at a moment.

    Args:
        what: The job whose progress is watched, such as "reading points".
        least: How far it has come.
        arguments: Of `roadfuse`.
        before: Code that runs in the process first.
    """

    def __init__(self, what: str, least: int, arguments: list[object], before: str = "") -> None:
        command = [sys.executable, "-c", COMMAND.format(before=before), what, str(least), *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
        )
        line = self.process.stdout.readline()
        if line != "stopped\n":
            _, err = self.process.communicate()
            raise AssertionError(f"{what} never came to {least}: {line}{err}")

    def workers(self) -> list[int]:
        """Process numbers of Dask's workers."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [child.pid for child in found if any("spawn_main" in part for part in child.cmdline())]

    def kill(self) -> None:
        """Take the process and all its workers away, in the midst of their work."""
        assert self.process.poll() is None, "it was under way"
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait() == -signal.SIGKILL
        self._close()

    def go_on(self) -> int:
        """Let it go on to its end; returns the exit code."""
        self.process.communicate("\n")
        return self.process.returncode

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()
