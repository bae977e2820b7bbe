"""Times of dumps: what their numbers and stamps mean, as SQL, and whether that can be."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from roadfuse_core.errors import ConfigError
from roadfuse_core.settings import PointsSpec

__all__ = [
    "GPS_BEGAN_US",
    "Clock",
    "clock_of_numbers",
    "clock_of_texts",
    "describe_suspects",
    "is_number",
    "rolled_over_us",
    "time_sql",
]

US_PER_UNIT = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3, "days": 86_400e6}
# Spreadsheets count days from 1899-12-30.
SPREADSHEET_DAY_OF_1970 = 25_569
SPREADSHEET_DAYS = (32_874, 73_051)  # 1990 to 2100
GPS_BEGAN_US = int(datetime(1980, 1, 6, tzinfo=UTC).timestamp()) * 1_000_000
LAST_US = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
LIKELY_FROM_US = int(datetime(1990, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
ROLLOVER_US = 1024 * 7 * 86_400 * 1_000_000
DIGITS = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
WORD_AT_END = r"(?:^|[\s\d])([A-Za-z]{2,5})$"
LAST_WORD = r"\s*[A-Za-z]+$"
YEAR_FIRST = r"^\d{4}[-/]"
UNIVERSAL = ("UTC", "GMT")
# What DuckDB reads as it is; anything else is first brought into this form.
PLAIN_STAMP = r"\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d+)?)?)?(Z|[+-]\d{2}(:?\d{2})?)?"
REWRITTEN = (
    (r"^(\d{4})(\d{2})(\d{2})$", r"\1-\2-\3"),
    (r"^(\d{4})(\d{2})(\d{2})[Tt ]?(\d{2})(\d{2})(\d{2})(\D.*)?$", r"\1-\2-\3 \4:\5:\6\7"),
    (r"^(\d{4})(\d{2})(\d{2})[Tt ]?(\d{2})(\d{2})(\D.*)?$", r"\1-\2-\3 \4:\5\6"),
    (r"^(\d{4})(\d{2})(\d{2})[Tt ](\d.*)$", r"\1-\2-\3 \4"),
    (r"^([\d-]+)t", r"\1T"),
    (r"(:\d{2}),(\d)", r"\1.\2"),
    (r"\s*[Zz]$", "Z"),
    (r"\s+([+-]\d)", r"\1"),
)


class Clock(Enum):
    """How the times of a file are to be read."""

    INSTANT = "instants, whatever zone they are shown in"
    LOCAL = "stamps without a zone"
    NUMBER = "numbers in points.time_unit since 1970"
    DATE = "numbers whose digits are a date: 20260331, or with hours and minutes, and seconds"
    STAMP = "text"


def is_number(text: str) -> bool:
    """Whether a text is a number."""
    return re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text) is not None


def clock_of_numbers(numbers: Sequence[float], spec: PointsSpec, where: str) -> Clock:
    """How a column of numbers is to be read, by some of them.

    Args:
        numbers: Some values; may be empty.
        spec: The stated unit.
        where: The file, for messages.

    Raises:
        ConfigError: In the stated unit the times cannot be, and in another they would be.
    """
    some = [n for n in numbers if np.isfinite(n)]
    if some and all(_is_date(n) for n in some):
        return Clock.DATE
    _require_unit(some, spec, where)
    return Clock.NUMBER


def clock_of_texts(texts: Sequence[str], spec: PointsSpec, where: str) -> Clock:
    """How a column of text is to be read, by some of it.

    Args:
        texts: Some values, none of them empty; may be no value.
        spec: The stated unit and zone.
        where: The file, for messages.

    Raises:
        ConfigError: As for numbers; or stamps end in a name of a zone that is none of `points.time_zone`.
    """
    if texts and all(is_number(t) for t in texts):
        clock = clock_of_numbers([float(t) for t in texts], spec, where)
        return Clock.STAMP if clock is Clock.DATE else clock
    known = {*UNIVERSAL, *_offsets(spec.time_zone)}
    for text in texts:
        word = re.search(WORD_AT_END, text.strip())
        if word and word[1].upper() not in known and re.match(YEAR_FIRST, text.strip()):
            raise ConfigError(
                "points.time_zone", spec.time_zone, f"does not say what {word[1]!r} means in {text!r} of {where}",
                "set it to the zone of these times, such as America/Chicago or Asia/Shanghai",
            )  # fmt: skip
    return Clock.STAMP


def _is_date(number: float) -> bool:
    digits = f"{number:.0f}"
    if number != int(number) or len(digits) not in DIGITS:
        return False
    try:
        return 1980 <= datetime.strptime(digits, DIGITS[len(digits)]).year < 2200
    except ValueError:
        return False


def _share(numbers: Sequence[float], unit: str, low_us: float, high_us: float) -> float:
    """Share of numbers that lie in [low, high) when taken in a unit."""
    us = (np.asarray(numbers) - (SPREADSHEET_DAY_OF_1970 if unit == "days" else 0)) * US_PER_UNIT[unit]
    return float(np.mean((us >= low_us) & (us < high_us)))


def _require_unit(numbers: Sequence[float], spec: PointsSpec, where: str) -> None:
    unit = spec.time_unit
    if not numbers or _share(numbers, unit, GPS_BEGAN_US, LAST_US) >= 0.5:
        return
    soon_us = (datetime.now(UTC) + timedelta(days=730)).timestamp() * 1e6
    for other in ("s", "ms", "us", "ns"):
        if other != unit and _share(numbers, other, LIKELY_FROM_US, soon_us) >= 0.9:
            raise ConfigError("points.time_unit", unit, f"cannot be the unit of times such as {numbers[0]:.15g} in {where}",
                              f"set it to {other}")  # fmt: skip
    if "time_unit" not in spec.model_fields_set and _are_days(numbers):
        raise ConfigError(
            "points.time_unit", unit, f"gives 1970 for times such as {numbers[0]:.15g} in {where}, which look like days",
            "set it to days (a spreadsheet's), or to s where they are seconds",
        )  # fmt: skip


def _are_days(numbers: Sequence[float]) -> bool:
    """Whether numbers look like days of this age with the time of day behind the point."""
    inside = all(SPREADSHEET_DAYS[0] <= n < SPREADSHEET_DAYS[1] for n in numbers)
    return inside and any(abs(n * 1e4 - round(n * 1e4)) > 1e-3 for n in numbers)


@lru_cache(maxsize=8)
def _offsets(zone: str) -> dict[str, str]:
    """Names that a zone's times go by, with their offset; an empty one where a name has had several."""
    found: dict[str, set[str]] = defaultdict(set)
    place = ZoneInfo(zone)
    for month in range(12 * (datetime.now(UTC).year - 1980 + 2)):
        moment = datetime(1980 + month // 12, month % 12 + 1, 1, tzinfo=place)
        found[moment.tzname() or ""].add(moment.strftime("%z"))
    return {name: offsets.pop() if len(offsets) == 1 else "" for name, offsets in found.items() if name.isalpha()}


def time_sql(column: str, kind: str, clock: Clock, spec: PointsSpec) -> str:
    """SQL for microseconds since 1970, NULL where a value is no time.

    Args:
        column: SQL for the value; of text, without spaces around it.
        kind: Its type, as DuckDB names it.
        clock: How it is to be read.
        spec: Unit and zone; DuckDB's own zone must be set to it.
    """
    number = _number_sql(column, spec)
    if clock is Clock.INSTANT:
        return f"epoch_us({column})"
    if clock is Clock.LOCAL:
        return f"epoch_us({column}::TIMESTAMPTZ)"
    if clock is Clock.DATE:
        return _stamp_sql(f"CAST(TRY_CAST({column} AS BIGINT) AS VARCHAR)", spec)
    if kind != "VARCHAR":
        return number
    stamp = _stamp_sql(column, spec)
    if clock is Clock.NUMBER:
        return f"coalesce({number}, {stamp})"
    return f"coalesce({stamp}, CASE WHEN {number} >= {GPS_BEGAN_US} THEN {number} END)"


def _number_sql(column: str, spec: PointsSpec) -> str:
    number = f"TRY_CAST({column} AS DOUBLE)"
    if spec.time_unit != "days":
        return f"TRY_CAST(round({number} * {US_PER_UNIT[spec.time_unit]!r}) AS BIGINT)"
    ms = f"TRY_CAST(round(({number} - {SPREADSHEET_DAY_OF_1970}) * 86400000) AS BIGINT)"
    return f"CASE WHEN {number} BETWEEN 0 AND 200000 THEN epoch_us(make_timestamp({ms} * 1000)::TIMESTAMPTZ) END"


def _stamp_sql(text: str, spec: PointsSpec) -> str:
    """Stamps, most of them in a form that DuckDB reads; a name of a zone counts only where `time_zone` goes by it."""
    form = text
    for pattern, replacement in REWRITTEN:
        form = f"regexp_replace({form}, {_quoted(pattern)}, {_quoted(replacement)})"
    word = f"upper(regexp_extract({form}, {_quoted(WORD_AT_END)}, 1))"
    cases = "".join(f" WHEN {_quoted(name)} THEN {form}" for name in ("", *UNIVERSAL))
    for name, offset in _offsets(spec.time_zone).items():
        if name not in UNIVERSAL:
            in_offset = f"regexp_replace({form}, {_quoted(LAST_WORD)}, {_quoted(offset)})"
            cases += f" WHEN {_quoted(name.upper())} THEN {in_offset}"
    dated = f"CASE WHEN regexp_matches({form}, {_quoted(YEAR_FIRST)}) THEN CASE {word}{cases} END END"
    plain = f"regexp_full_match({text}, {_quoted(PLAIN_STAMP)})"
    return f"epoch_us(TRY_CAST(CASE WHEN {plain} THEN {text} ELSE {dated} END AS TIMESTAMPTZ))"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def count_suspects(time_us: NDArray[np.int64], rolled_over_us: int) -> tuple[int, int]:
    """How many times lie before GPS began, and how many after that and before `rolled_over_us`."""
    before = int(np.count_nonzero(time_us < GPS_BEGAN_US))
    return before, max(0, int(np.count_nonzero(time_us < rolled_over_us)) - before)


def rolled_over_us() -> int:
    """Times before this may be 1,024 weeks early: adding them gives no time of the future."""
    return int(datetime.now(UTC).timestamp() * 1e6) - ROLLOVER_US


def describe_suspects(before_gps: int, rolled_over: int, rows: int) -> list[str]:
    """What is to be said of times that may be wrong, one line each.

    Args:
        before_gps: Rows before 1980-01-06.
        rolled_over: Rows after that, and more than 1,024 weeks ago.
        rows: Of all.
    """
    said = []
    if before_gps:
        said.append(f"{before_gps:,} of {rows:,} times lie before 1980-01-06, when GPS began: check points.time_unit "
                    "(days for a spreadsheet's), unless they count from a start of their own")  # fmt: skip
    if rolled_over:
        said.append(f"{rolled_over:,} of {rows:,} times lie more than 1,024 weeks ago: a receiver whose week number rolled "
                    "over gives dates that much too early; correct them unless they are right")  # fmt: skip
    return said
