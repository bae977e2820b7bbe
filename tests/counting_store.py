"""An S3-compatible server in a process of its own that counts requests: `python -m tests.counting_store PORT`."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

COUNT = "/__requests__"


class Counting:
    """A WSGI application that counts what reaches the one behind it; `GET /__requests__` tells and begins again."""

    def __init__(self, application) -> None:
        self.application, self.requests, self.lock = application, 0, threading.Lock()

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] == COUNT:
            with self.lock:
                told, self.requests = self.requests, 0
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [str(told).encode()]
        with self.lock:
            self.requests += 1
        return self.application(environ, start_response)


class Store:
    """The running server: its address, a client of boto3, and how many requests came since the last look."""

    def __init__(self, address: str) -> None:
        import boto3
        from botocore.config import Config

        self.address = address
        self.client = boto3.client("s3", endpoint_url=address, config=Config(max_pool_connections=16))

    def requests(self) -> int:
        """Requests since the last look."""
        with urllib.request.urlopen(self.address + COUNT) as answer:
            return int(answer.read())


@contextmanager
def running_store() -> Iterator[Store]:
    """A server with no buckets, which this process's environment names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": address}  # fmt: skip
    before = {name: os.environ.get(name) for name in settings}
    server = subprocess.Popen([sys.executable, "-m", "tests.counting_store", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.environ.update(settings)
    try:
        _wait_for(address, server)
        yield Store(address)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        server.kill()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address + COUNT):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise RuntimeError("the counting store did not start")


def main(port: int) -> None:
    """Serve until killed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    application = Counting(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
