"""Every error that RoadFuse raises on purpose.

RoadFuseError
├── ConfigError       a setting is wrong or does not fit the data   (also ValueError; exit 2)
├── DataError         a file cannot be read as what it claims to be (also ValueError; exit 3)
└── StoreError        a repository refuses or is in another state   (also RuntimeError; exit 4)
    └── NothingPublishedError   certainly nothing was ever published there
"""

import re

__all__ = [
    "ConfigError",
    "DataError",
    "NothingPublishedError",
    "RoadFuseError",
    "StoreError",
    "holds_credentials",
    "printable",
    "without_secrets",
]

# `user:password@` of an authority (a secret key may hold slashes), and everything behind the `?` of a signed address.
CREDENTIALS = re.compile(
    r"(?<=://)(?:(?<!http://)(?<!https://)[^\s/:@'\"]+:[^\s@'\"]*@"
    r"|(?:(?<=http://)|(?<=https://))(?:[^\s/@'\"]+|[^\s/:@'\"]+:(?!\d{1,5}/)[^\s@'\"]*)@)"
)
QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*")


def without_secrets(text: str) -> str:
    """A text whose URLs show no user, no password and no parameters, which may be a signature."""
    return QUERY.sub(r"\1?…", CREDENTIALS.sub("", text))


def holds_credentials(url: str) -> bool:
    """Whether a URL names a user or a password."""
    return CREDENTIALS.search(url) is not None


def printable(text: str) -> str:
    """A name in one line: what a terminal does not show is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


# Of a value in a message.
SHOWN_CHARACTERS = 400


def shorten(text: str, characters: int) -> str:
    """A text, its middle left out where it is longer than some characters."""
    half = characters // 2
    return text if len(text) <= characters else f"{text[:half]} … {text[-half:]}"


def show(value: object) -> str:
    """A value as a message shows it."""
    try:
        return shorten(repr(value), SHOWN_CHARACTERS)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"


class RoadFuseError(Exception):
    """Root of the tree; `exit_code` is what the command line returns for it. No message holds what a URL keeps secret."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(without_secrets(message))


class ConfigError(RoadFuseError, ValueError):
    """A key of a city file has a value that cannot work.

    Args:
        key: Dotted path of the key, for example `points.columns.lon`.
        value: What was found there.
        problem: Why it cannot work.
        fix: What to write instead.
    """

    exit_code = 2

    def __init__(self, key: str, value: object, problem: str, fix: str) -> None:
        super().__init__(f"{key}: {show(value)} {problem}; {fix}")
        self.key, self.value, self.problem, self.fix = key, value, problem, fix

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        """Keep the four parts when a worker process sends the error home."""
        return type(self), (self.key, self.value, self.problem, self.fix)


class DataError(RoadFuseError, ValueError):
    """A data file is unreadable, truncated or not what its name says."""

    exit_code = 3


class StoreError(RoadFuseError, RuntimeError):
    """A repository is locked, moved on, or holds something else than asked for."""

    exit_code = 4


class NothingPublishedError(StoreError):
    """Nothing was ever published; never raised because something could not be read."""
