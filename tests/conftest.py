"""Shared cities: small, simulated once a session."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

# Tests run side by side, one process a core: libraries that start a thread a core each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
from pathlib import Path

import pytest
from dask.distributed import Client
from hypothesis import settings

from roadfuse_core.settings import City, load_city
from roadfuse_core.simulate import CityKnobs, simulate_city

settings.register_profile("suite", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("suite")

SMALL = CityKnobs(seed=3, size_m=512, tile_px=128, days=3, points_per_day=3000)


@pytest.fixture(scope="session")
def simulated(tmp_path_factory) -> Path:
    """A 512 m city on disk; read-only for tests."""
    return simulate_city(tmp_path_factory.mktemp("city"), SMALL).parent


@pytest.fixture
def small_city(simulated: Path, tmp_path: Path) -> City:
    """The small city with a workspace of its own."""
    shutil.copy(simulated / "city.yaml", tmp_path / "city.yaml")
    for name in ("dumps", "imagery", "truth"):
        (tmp_path / name).symlink_to(simulated / name)
    (tmp_path / "old_map.gpkg").symlink_to(simulated / "old_map.gpkg")
    return load_city(tmp_path / "city.yaml")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of a size, as `mount` writes it; called again, the same disk with more or less room."""
    place = tmp_path / "disk"

    def sized(size: str) -> Path:
        again = ["remount"] if place.is_dir() else []
        place.mkdir(exist_ok=True)
        options = ",".join([*again, f"size={size}"])
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")
        return place

    yield sized
    if place.is_mount():
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def fill() -> Callable[[Path], None]:
    """Writes a file until the disk is full."""

    def until_full(path: Path) -> None:
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            while True:
                os.write(file, b"x" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        finally:
            os.close(file)

    return until_full


class OwnScheduler:
    """A Dask scheduler in a process of its own, which can be killed."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = "tcp://127.0.0.1:{1}".format(*free.getsockname())
        self._processes = [self._start("scheduler", "--host", self.address)]

    def _start(self, kind: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def add_workers(self, number: int) -> None:
        """Start workers and wait until they are known."""
        options = ["--nthreads", "1", "--death-timeout", "20"]
        self._processes += [self._start("worker", self.address, *options) for _ in range(number)]
        with Client(self.address, timeout="60s") as client:
            client.wait_for_workers(number, timeout="60s")

    def kill(self) -> None:
        """Take the scheduler away, without a word to anyone."""
        self._processes[0].kill()
        self._processes[0].wait()

    def end(self) -> None:
        """Take workers away too."""
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def scheduler() -> Iterator[OwnScheduler]:
    """A Dask scheduler without workers."""
    made = OwnScheduler()
    yield made
    made.end()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real, dirty data beside the project; the test is skipped where there is none."""
    path = Path(os.environ.get("ROADFUSE_DATA", Path(__file__).parents[2] / "shared/data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set ROADFUSE_DATA")
    return path
