"""The city file: one YAML a city, checked before anything else happens."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import available_timezones

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pyproj import CRS
from pyproj.exceptions import CRSError

from roadfuse_core.errors import SHOWN_CHARACTERS, ConfigError, RoadFuseError, shorten, show
from roadfuse_core.grid import Bounds, Grid, make_grid

__all__ = [
    "City",
    "ClassName",
    "CleanSpec",
    "ClusterSpec",
    "ColumnSpec",
    "CsvSpec",
    "GateSpec",
    "GridSpec",
    "ImagerySpec",
    "InvalidCityError",
    "MapSpec",
    "ModelSpec",
    "PointsSpec",
    "describe_errors",
    "load_city",
    "parse_assignments",
    "parse_yaml",
    "read_yaml",
]


# Values of a file, its anchors followed; a city file has about a hundred.
MAX_VALUES = 100_000


class InvalidCityError(RoadFuseError, ValueError):
    """A city file with one or more wrong keys; one line each."""

    exit_code = 2


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _known_crs(text: str) -> str:
    """A CRS of positions on Earth."""
    try:
        crs = CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError("give the code of a CRS, such as EPSG:32633") from error
    if not (crs.is_projected or crs.is_geographic):
        raise ValueError("give a CRS of positions on the ground, such as EPSG:32633")
    return text


def _known_zone(text: str) -> str:
    zones = available_timezones() - {"localtime"}
    if text not in zones:
        near = difflib.get_close_matches(text, zones, 1)
        raise ValueError(f"give a name such as {near[0] if near else 'Asia/Shanghai'}, or Etc/GMT-8 for eight hours east")
    return text


CrsName = Annotated[str, AfterValidator(_known_crs)]
ZoneName = Annotated[str, AfterValidator(_known_zone)]


class GridSpec(_Spec):
    """The area of the map and its pixels."""

    bounds: tuple[float, float, float, float] = Field(description="west, south, east, north; degrees, WGS-84")
    crs: CrsName | None = Field(None, description="a projected CRS in metres; by default the UTM zone of the centre")
    resolution_m: float = Field(0.5, gt=0, le=100, description="pixel edge, metres")
    tile_px: Literal[64, 128, 256, 512, 1024, 2048] = Field(1024, description="tile edge, pixels")

    @model_validator(mode="after")
    def _ordered(self) -> GridSpec:
        west, south, east, north = self.bounds
        if west > east and abs(west) <= 180 >= abs(east):
            raise ValueError(
                "bounds must have west < east; of a city on both sides of 180 degrees make two, one city file for each side"
            )
        if not (-180 <= west < east <= 180 and -85 <= south < north <= 85):
            raise ValueError("bounds must be [west, south, east, north] in degrees with west < east and south < north")
        return self


class ColumnSpec(_Spec):
    """Which column holds what; only the position is required."""

    lon: str = Field(description="longitude, or x of a projected `crs`")
    lat: str = Field(description="latitude, or y of a projected `crs`")
    time: str | None = Field(None, description="time stamp; without it `period` must be `all`")
    vehicle: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="vehicle or trip; `filename` means one vehicle a file; `[filename, id]` one for each file and id"
    )
    speed: str | None = Field(None, description="speed in `speed_unit`")
    bearing: str | None = Field(None, description="degrees clockwise from north")
    interval: str | None = Field(None, description="seconds since the vehicle's previous sample; derived if absent")

    @property
    def vehicles(self) -> tuple[str, ...]:
        """The columns that name a vehicle together; none where the city names no vehicle."""
        if self.vehicle is None:
            return ()
        return (self.vehicle,) if isinstance(self.vehicle, str) else self.vehicle

    def named(self) -> list[tuple[str, str]]:
        """Key and column of everything that files hold: `filename` is no column of theirs."""
        single = ("lon", "lat", "time", "speed", "bearing", "interval")
        pairs = [(key, getattr(self, key)) for key in single] + [("vehicle", column) for column in self.vehicles]
        return [(key, column) for key, column in pairs if column is not None and column != "filename"]


class CsvSpec(_Spec):
    """How text files are laid out."""

    delimiter: str = Field(",", min_length=1, max_length=1, description="column separator")
    header: bool = Field(True, description="whether the first line holds the column names")
    names: tuple[str, ...] = Field((), description="column names, for files without a header")
    encoding: Literal["utf-8", "latin-1", "utf-16"] = Field("utf-8", description="how characters are written")
    decimal: Literal[".", ","] = Field(".", description="what parts whole numbers from fractions")


class CleanSpec(_Spec):
    """Which rows are rejected; every reason can be switched off."""

    null_island: float | None = Field(
        1e-4, gt=0, description="reject positions nearer to 0, 0, in units of `crs`; null keeps all"
    )
    swapped: bool = Field(True, description="reject rows that lie in the city only with x and y exchanged")
    duplicates: bool = Field(True, description="reject repeated rows of a vehicle")
    max_speed_kmh: float | None = Field(250, gt=0, description="reject rows that report more; null keeps all")
    teleport_kmh: float | None = Field(250, gt=0, description="reject samples that imply more; null keeps all")
    max_gap_s: float = Field(600, gt=0, description="longer gaps give no interval")
    time_range: tuple[datetime, datetime] | None = Field(None, description="reject rows outside [from, to)")
    stop_above: dict[
        Literal["not_finite", "null_island", "time", "swapped", "outside", "speed", "duplicate", "teleport"],
        Annotated[float, Field(ge=0, le=1)],
    ] = Field({}, description="stop when a larger share of a dump's rows is rejected for a reason, such as `outside: 0.5`")

    @field_validator("time_range")
    @classmethod
    def _forwards(cls, value: tuple[datetime, datetime] | None) -> tuple[datetime, datetime] | None:
        if value is not None:
            first, last = (t if t.tzinfo else t.replace(tzinfo=UTC) for t in value)
            if first >= last:
                raise ValueError("the first time must come before the second")
        return value


class PointsSpec(_Spec):
    """Trajectory dumps and how to read them."""

    sources: tuple[str, ...] = Field(
        min_length=1, description="files, folders or globs: Parquet, CSV, gz, or `archive.zip::pattern`"
    )
    columns: ColumnSpec
    crs: CrsName = Field("EPSG:4326", description="CRS of the positions")
    datum: Literal["wgs84", "gcj02", "bd09"] = Field("wgs84", description="gcj02 and bd09 are shifted to WGS-84 first")
    speed_unit: Literal["km/h", "m/s", "mph", "m/min", "knots"] = Field("km/h", description="unit of `speed`")
    time_unit: Literal["s", "ms", "us", "ns", "days"] = Field(
        "s", description="unit of numeric times since 1970; `days` are a spreadsheet's, since 1899-12-30"
    )
    time_zone: ZoneName = Field("UTC", description="zone of times that state none")
    period: Literal["day", "week", "month", "all"] = Field("month", description="time resolution of the cube")
    settle_s: float = Field(
        0, ge=0, description="files changed within so many seconds wait for a later run: more than a copy or a logger pauses"
    )
    csv: CsvSpec = Field(CsvSpec(), description="layout of text files")
    clean: CleanSpec = Field(CleanSpec(), description="what is rejected")

    @model_validator(mode="after")
    def _time_for_periods(self) -> PointsSpec:
        if self.columns.time is None and self.period != "all":
            raise ValueError(f"period {self.period!r} needs columns.time; name the column or set period: all")
        if self.datum != "wgs84" and self.crs != "EPSG:4326":
            raise ValueError(f"datum {self.datum!r} is for longitudes and latitudes; leave crs at EPSG:4326")
        return self


class ImagerySpec(_Spec):
    """Aerial or satellite images, or another raster, in any CRS and resolution."""

    sources: tuple[str, ...] = Field(min_length=1, description="files, folders or globs of rasters on this machine")
    crs: CrsName | None = Field(None, description="CRS, where the files do not say (a PNG with a world file)")
    nodata: float | None = Field(None, description="value of missing pixels where the files do not say")
    value_range: tuple[float, float] | None = Field(None, description="values shown as black and white; 0, 255 for bytes")

    @field_validator("value_range")
    @classmethod
    def _two_values(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] == value[1]:
            raise ValueError("black and white must be two values, such as [0, 3000]")
        return value


ClassName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]


class MapSpec(_Spec):
    """A map of roads, or of another class: a raster mask, or lines drawn at a width."""

    path: str = Field(description="raster, GeoPackage, GeoJSON, GeoParquet, .osm.pbf, .osm, or a zip of vertices and edges")
    crs: CrsName | None = Field(None, description="CRS, where the file does not say")
    layer: str | None = Field(None, description="layer of a file with several; by default the only one with lines")
    width_m: float = Field(8.0, gt=0, le=100, description="width at which lines are drawn")
    width: str | None = Field(
        None, description="column with each line's width, such as `8` or `26 ft`; `width_m` where it has none"
    )
    lane_m: float | None = Field(
        None, gt=0, le=10, description="width of a lane: lines of OpenStreetMap are drawn by `lanes`, or by their class"
    )


class ModelSpec(_Spec):
    """Who predicts."""

    weights: str = Field(
        "default",
        description="`default` (`gps` without images, `image` without points, or `fused`), `kde`, a checkpoint, a KDE (.json)",
    )
    threshold: float = Field(0.5, gt=0, lt=1, description="probability from which a pixel is road")
    batch: int | None = Field(None, ge=1, le=256, description="windows a forward pass; by default found by measurement")
    precision: Literal["auto", "32", "bf16"] = Field(
        "auto", description="auto: bf16 where the chip has it and it changes next to nothing"
    )
    turns: bool = Field(False, description="average over the eight turns of each window; eight times the work")


class GateSpec(_Spec):
    """What holds a new map back until a person releases it; null switches a rule off.

    Rules compare it with the published map; those of drift with the best since a person last released one.
    """

    g_iou_drop: float | None = Field(0.03, gt=0, le=1, description="g_iou on the test tiles falls by more than this")
    g_iou_drift: float | None = Field(
        0.06, gt=0, le=1, description="g_iou falls by more below the highest since a person last released a map"
    )
    coverage_drop: float | None = Field(0.05, gt=0, le=1, description="a larger share of the mapped area becomes no data")
    coverage_drift: float | None = Field(
        0.1, gt=0, le=1, description="a larger share is lost of the largest mapped area since a person last released a map"
    )
    road_change: float | None = Field(
        0.3, gt=0, le=1, description="the share of road in the mapped area falls by more of itself, or rises as much"
    )
    road_drift: float | None = Field(
        0.5, gt=0, le=1, description="the same against the map that a person released last, or the first one"
    )
    rejected_rise: float | None = Field(
        0.2, gt=0, le=1, description="a dump since the published map lost a share of its rows that is larger by more"
    )


class ClusterSpec(_Spec):
    """Where the work runs."""

    kind: str = Field("auto", pattern=r"^(auto|local|cuda|(tcp|tls|ucx)://.+)$",
                      description="auto, local, cuda, or a Dask scheduler's address")  # fmt: skip
    workers: int | None = Field(None, ge=1, le=10_000, description="local processes; by default one a core or GPU")
    memory_gib: float | None = Field(
        None, gt=0, description="memory of one worker; by default its share of the machine, at most 2 GiB"
    )


class City(_Spec):
    """A city: its area, its evidence, its labels, and how to run it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="lower case, digits and hyphens")]
    workspace: str = Field(description="folder for cubes, maps and reports")
    grid: GridSpec
    points: PointsSpec | None = Field(None, description="trajectories; optional where there is imagery")
    imagery: ImagerySpec | None = Field(None, description="images; optional where there are trajectories")
    lidar: ImagerySpec | None = Field(None, description="heights or intensities beside them: the first band of rasters")
    labels: dict[ClassName, MapSpec] = Field({}, description="the truth, for training and scores: a map of each class")
    target: ClassName = Field("roads", description="the class that the city's map shows and is scored against")
    existing_map: MapSpec | None = Field(None, description="the map that the new one is compared with")
    model: ModelSpec = Field(ModelSpec(), description="who predicts")
    cluster: ClusterSpec = Field(ClusterSpec(), description="where the work runs")
    gate: GateSpec = Field(GateSpec(), description="what holds a new map back")
    price_per_worker_hour: float | None = Field(None, ge=0, description="for the cost of a run, in any currency")
    root: Path = Field(Path(), exclude=True, description="folder of the city file; relative paths start here")

    @model_validator(mode="after")
    def _some_evidence(self) -> City:
        if self.points is None and self.imagery is None:
            raise ValueError("a city needs points or imagery; add one of them")
        if "://" in self.workspace:
            raise ValueError("workspace must be a local folder")
        if self.labels and self.target not in self.labels:
            known = ", ".join(self.labels)
            raise ValueError(f"labels show {known}, and the target is {self.target}; name it among labels, or set `target`")
        return self

    def path(self, text: str) -> Path:
        """A path of the city file, made absolute.

        Raises:
            ConfigError: It holds a NUL character.
        """
        if "\0" in text:
            raise ConfigError("city file", text, "is no path: it holds a NUL character", "correct the path")
        return (self.root / Path(text).expanduser()).resolve() if not os.path.isabs(text) else Path(text)

    @property
    def truth(self) -> tuple[MapSpec, str] | None:
        """The map of the target class and its dotted key, or None without labels."""
        return (self.labels[self.target], f"labels.{self.target}") if self.labels else None

    @property
    def workspace_path(self) -> Path:
        """The workspace, absolute."""
        return self.path(self.workspace)

    def make_grid(self) -> Grid:
        """The city's grid."""
        g = self.grid
        return make_grid(Bounds(*g.bounds), g.resolution_m, g.tile_px, g.crs)


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: The file.
        what: For messages.
        example: Where there is one, for messages.

    Raises:
        ConfigError: The file is missing, is no YAML or no mapping, names a key twice, or grows beyond bounds by its anchors.
    """
    if not path.is_file():
        raise ConfigError(what, str(path), "does not exist" if not path.is_dir() else "is a folder", "give the path of a file")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(what, str(path), f"cannot be read ({error.strerror})", "make it readable") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = "too deep" if isinstance(error, RecursionError) else shorten(str(error).replace("\n", " "), 300)
        raise ConfigError(what, str(path), f"is not YAML ({cause})", "correct it there") from error
    if not isinstance(raw, dict) or "root" in raw:
        raise ConfigError(what, str(path), "is not a mapping of keys", f"start from the example in {example}")
    return raw


class _Loader(yaml.SafeLoader):
    """YAML whose keys are unique and whose anchors do not multiply without bound."""

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {}, ())
        return self.construct_document(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise yaml.constructor.ConstructorError(None, None, "a text holds NUL or half a character", node.start_mark)
        return text


def _count_nodes(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node stands for once its anchors are followed."""
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an anchor holds itself", node.start_mark)
    if id(node) not in known:
        inner = node.value if isinstance(node.value, list) else []
        children = [child for one in inner for child in (one if isinstance(one, tuple) else (one,))]
        count = 1 + sum(_count_nodes(child, known, (*above, id(node))) for child in children)
        if count > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, f"it holds more than {MAX_VALUES:,} values", node.start_mark)
        known[id(node)] = count
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        YAMLError: It is not YAML, names a key twice, or holds anchors that multiply without bound.
        ValueError: A value cannot be, such as the 30th of February.
    """
    return yaml.load(text, _Loader)


def load_city(path: Path) -> City:
    """Read and validate a city file.

    Raises:
        ConfigError: The file is missing or is not YAML.
        InvalidCityError: Keys are unknown, missing or wrong; one line each, with the key, the value and the fix.
    """
    raw = read_yaml(path, "city file", "README.md")
    if isinstance(raw.get("labels"), dict):
        raw["labels"] = {k: {"path": v} if isinstance(v, str) else v for k, v in raw["labels"].items()}
    if isinstance(raw.get("existing_map"), str):
        raw["existing_map"] = {"path": raw["existing_map"]}
    try:
        return City.model_validate(raw | {"root": path.resolve().parent})
    except ValidationError as error:
        raise InvalidCityError("\n".join(describe_errors(error, City))) from error


def parse_assignments(option: str, texts: Sequence[str], example: str) -> dict[str, Any]:
    """`KEY=VALUE` of a command, with values in YAML, by key.

    Args:
        option: Of the command, for messages.
        texts: As given.
        example: A right one.

    Raises:
        ConfigError: One is something else, or names a key twice.
    """
    out: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key or not value or key in out:
            raise ConfigError(option, text, "is not KEY=VALUE with a key of its own", f"write {example}")
        try:
            out[key] = parse_yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(option, text, "is not YAML behind the equals sign", "quote the value") from error
    return out


def describe_errors(error: ValidationError, model: type[BaseModel], within: str = "") -> list[str]:
    """One line for each mistake of a file: key, value and fix.

    Args:
        error: What pydantic found.
        model: The record that the file, or its part, should have been.
        within: Dotted key of the part; empty for the file.
    """
    found = error.errors()
    # A misspelt required key is one mistake, not an unknown key and a missing one.
    misspelt = {(*e["loc"][:-1], _nearest(e["loc"], model)) for e in found if e["type"] == "extra_forbidden"}
    return [_line(e, model, within) for e in found if e["type"] != "missing" or e["loc"] not in misspelt]


def _line(error: Any, model: type[BaseModel], within: str) -> str:
    """One wrong key as `key: value problem; fix`; of several that do not fit together, `key: problem`."""
    parts = [str(p) for p in error["loc"]]
    key = ".".join(p for p in (within, *parts) if p and p != "[key]") or "file"
    kind, value = error["type"], error["input"]
    shown = show(value) if not isinstance(value, dict) else shorten("{" + ", ".join(map(str, value)) + "}", SHOWN_CHARACTERS)
    if kind == "extra_forbidden":
        near = _nearest(error["loc"], model)
        fix = f"did you mean {near}?" if near else f"known keys here: {', '.join(_keys_beside(parts, model))}"
        return f"{key}: {shown} is an unknown key; {fix}"
    if kind == "missing":
        return f"{key}: is missing; add it"
    if kind == "literal_error":
        return f"{key}: {shown} is not a known value; use {error['ctx']['expected']}"
    message = error["msg"].removeprefix("Value error, ")
    if kind == "value_error" and isinstance(value, dict):
        return f"{key}: {message}"
    return f"{key}: {shown} is wrong; {message[0].lower()}{message[1:]}"


def _nearest(loc: tuple[Any, ...], model: type[BaseModel]) -> str | None:
    """The known key that a misspelt one looks like."""
    parts = [str(p) for p in loc]
    return next(iter(difflib.get_close_matches(parts[-1], _keys_beside(parts, model), 1)), None)


def _keys_beside(parts: list[str], model: Any) -> list[str]:
    for part in parts[:-1]:
        annotation = (
            model.model_fields[part].annotation if hasattr(model, "model_fields") and part in model.model_fields else model
        )
        options = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        model = options[0] if options else MapSpec
    return [k for k in model.model_fields if k != "root"]
