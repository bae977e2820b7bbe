"""Which rows are of one vehicle: its id as a number that does not depend on how a file stores the id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["NO_VEHICLE", "quoted", "vehicle_number"]

NO_VEHICLE = -1
MISSING = ("", "None", "none", "NULL", "null", "NaN", "nan", "NA", "<NA>")
WHOLE_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")


def quoted(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def vehicle_number(columns: Sequence[str], types: Mapping[str, str]) -> str:
    """SQL of a row's vehicle: a hash of its id as BIGINT, 0 or more; -1 where the row names no vehicle.

    The number 7 and the text `7` are one vehicle, and so is 7.0, as programs write whole numbers once one of them is missing.

    Args:
        columns: The columns that name a vehicle together; a row that lacks one of them names none.
        types: DuckDB's type of each column; a column that is not in it is text.
    """
    hashes = [_hash_of(quoted(c), types.get(c, "VARCHAR")) for c in columns]
    named = hashes[0] if len(hashes) == 1 else _joint_hash(hashes)
    return f"coalesce(({named} >> 1)::BIGINT, {NO_VEHICLE})"


def _joint_hash(hashes: Sequence[str]) -> str:
    known = " AND ".join(f"{h} IS NOT NULL" for h in hashes)
    return f"(CASE WHEN {known} THEN hash({', '.join(hashes)}) END)"


def _hash_of(column: str, kind: str) -> str:
    """SQL of the hash of one id; NULL where it is missing."""
    if kind in WHOLE_TYPES:
        return f"(CASE WHEN {column} IS NOT NULL THEN hash({column}::BIGINT) END)"
    text = _text_of(column, kind)
    missing = ", ".join(f"'{word}'" for word in MISSING)
    whole = f"TRY_CAST({text} AS BIGINT)"
    return (
        f"(CASE WHEN {text} IS NULL OR {text} IN ({missing}) THEN NULL "
        f"WHEN {whole}::VARCHAR = {text} THEN hash({whole}) ELSE hash({text}) END)"
    )


def _text_of(column: str, kind: str) -> str:
    """SQL of an id as text, a whole number without its fraction or exponent."""
    if kind in ("DOUBLE", "FLOAT"):
        return _whole_or(f"{column}::DOUBLE", f"{column}::VARCHAR")
    if kind.startswith("DECIMAL"):
        digits = f"{column}::VARCHAR"
        return f"(CASE WHEN contains({digits}, '.') THEN rtrim(rtrim({digits}, '0'), '.') ELSE {digits} END)"
    read = f"coalesce(TRY(decode({column})), {column}::VARCHAR)" if kind == "BLOB" else f"{column}::VARCHAR"
    text = f"trim({read})"
    fraction = f"contains({text}, '.0') AND regexp_full_match({text}, '-?[0-9]+\\.0+')"
    exponent = f"contains({text}, 'e+') AND regexp_full_match({text}, '-?[0-9](\\.[0-9]+)?e\\+[0-9]+')"
    number = _whole_or(f"TRY_CAST({text} AS DOUBLE)", text)
    return f"(CASE WHEN {fraction} THEN split_part({text}, '.', 1) WHEN {exponent} THEN {number} ELSE {text} END)"


def _whole_or(number: str, text: str) -> str:
    """SQL of the digits of a floating-point number where it is whole, of a text where it is not."""
    return (
        f"(CASE WHEN {number} = trunc({number}) THEN coalesce(TRY_CAST({number} AS HUGEINT)::VARCHAR, {text}) ELSE {text} END)"
    )
