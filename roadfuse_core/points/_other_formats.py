"""Files and columns that are not read as they are, and how their owner makes them readable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

__all__ = ["fix_for_column", "fix_for_file"]

AS_POINTS = "write its points as text: ogr2ogr -f CSV points.csv {name}{layer} -lco GEOMETRY=AS_XY gives columns X and Y"
FIXES = {
    (".gpx",): AS_POINTS.replace("{layer}", " track_points"),
    (".kml", ".kmz", ".geojson", ".json", ".gpkg", ".shp", ".fgb", ".gml"): AS_POINTS.replace("{layer}", ""),
    (
        ".plt",
    ): "cut off its first six lines and call it .csv; then csv: {{header: false, names: [lat, lon, zero, altitude, days, date, "
    "time]}}, columns.time: days and time_unit: days",
    (".fit", ".tcx", ".nmea", ".igc"): "convert it to CSV, for example with gpsbabel -o unicsv",
    (".xlsx", ".xls", ".ods"): "save its sheet as CSV",
    (".jsonl", ".ndjson", ".feather", ".arrow", ".orc", ".avro", ".pkl", ".h5"): "write it as Parquet, one position a row",
    (".zst", ".bz2", ".xz", ".lz4", ".7z", ".rar", ".tar", ".tgz", ".z"): "unpack it, or pack each file with gzip",
}


def fix_for_file(name: str, known: Sequence[str]) -> str:
    """What to do with a file of another kind.

    Args:
        name: Of the file.
        known: Endings that are read.
    """
    path = PurePosixPath(name)
    fix = next((fix for endings, fix in FIXES.items() if path.suffix.lower() in endings), "use {known}")
    return fix.format(name=path.name, known=", ".join(known))


def fix_for_column(column: str, names: Sequence[str], path: str) -> str:
    """What to do about a column that a file does not have.

    Args:
        column: As the city file names it.
        names: Columns of the file.
        path: The file.
    """
    near = next((name for name in names if name.strip().lower() == column.lower()), None)
    if near is not None:
        return f"did you mean {near!r}? Names are taken exactly"
    if f"/{column}=" in path:
        return "a key in the names of folders is not read; write it into the files as a column"
    if "." in column and column.split(".")[0] in names:
        return "a column within another is not read; write it as a column of its own"
    if column == "geometry" or (shapes := [n for n in names if n.lower() in ("geometry", "geom", "wkb_geometry", "wkt")]):
        named = column if column == "geometry" else shapes[0]
        return f"positions within {named!r} are not read; write their x and y as two columns of numbers"
    trips = [n for n in names if n.lower() in ("polyline", "trajectory", "path", "coordinates")]
    if trips:
        return f"a trip a row, as in {trips[0]!r}, is not read; write one row a position"
    return "it has: " + (", ".join(names[:20]) + (", …" if len(names) > 20 else "") or "none")
