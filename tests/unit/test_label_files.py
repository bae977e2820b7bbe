"""Maps of roads as people have them: widths in words, several layers, footways among roads, files of every kind."""

import bz2
import json
import struct
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import yaml

from roadfuse_core.check import check_city
from roadfuse_core.errors import ConfigError, DataError, RoadFuseError
from roadfuse_core.grid import Grid
from roadfuse_core.labels import open_map
from roadfuse_core.settings import City, InvalidCityError, MapSpec, load_city

GRID = Grid("EPSG:32633", 1.0, 64, 6250, 82_000, 4, 4)
LEFT, TOP = GRID.bounds.left, GRID.bounds.top
ROWS = (41, 91, 141, 191)


def street(row, first=10, last=240):
    return shapely.LineString([(LEFT + first, TOP - row), (LEFT + last, TOP - row)])


def table(geometries=None, **columns):
    return gpd.GeoDataFrame(columns, geometry=list(geometries or map(street, ROWS)), crs=GRID.crs)


def opened(folder, name, **spec):
    city = City(name="c", workspace="w", grid={"bounds": (13, 47, 13.1, 47.1)}, imagery={"sources": ["x"]}, root=folder)
    return open_map(city, MapSpec(path=name, **spec), "labels.roads", GRID)


def thickness(folder, name, **spec):
    """Pixels across each of the streets."""
    road, _ = opened(folder, name, **spec).window(0, 0, 256, 256)
    return [int(road[row - 20 : row + 20, 120].sum()) for row in ROWS]


@pytest.mark.parametrize(
    ("cells", "expected", "note"),
    [
        ([8.0, 8.0, 8.0, 8.0], [8, 8, 8, 8], ""),
        ([8.0, 0.0, -1.0, np.nan], [8, 4, 4, 4], "3 of 4 have no width of their own and get width_m"),
        (["8 m", "8m", "8.0 metres", " 8 "], [8, 8, 8, 8], ""),
        (["26'3\"", "26'", "26 ft", "315 in"], [8, 8, 8, 8], ""),
        (["8,0", "7;9", "7 - 9", "['7', '9']"], [8, 8, 8, 8], ""),
        (["8", "wide", "", None], [8, 4, 4, 4], "3 of 4 have no width of their own and get width_m"),
        (["8", "0", "-3", "-3 m"], [8, 4, 4, 4], "3 of 4 have no width of their own and get width_m"),
        (["800 cm", "0.008 km", "8.749 yd", "~8"], [8, 8, 8, 8], ""),
        ([8, 0, 12, 6], [8, 4, 12, 6], "1 of 4 have no width of their own and get width_m"),
    ],
)
def test_widths_are_what_their_writer_meant(tmp_path, cells, expected, note):
    table(w=cells).to_file(tmp_path / "a.gpkg")
    assert thickness(tmp_path, "a.gpkg", width="w", width_m=4) == expected
    assert opened(tmp_path, "a.gpkg", width="w", width_m=4).note == note


def test_widths_in_lists_of_parquet(tmp_path):
    table(w=[["8"], ["7", "9"], ["6 m", "10 m"], []]).to_parquet(tmp_path / "a.parquet")
    assert thickness(tmp_path, "a.parquet", width="w", width_m=4) == [8, 8, 8, 4]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([np.inf, 8.0, 8.0, 8.0], r"^labels\.roads\.width: 'w' holds 1 widths above 100 m, such as inf; correct them"),
        (["inf", "8", "8", "8"], r"^labels\.roads\.width: 'w' holds 1 widths above 100 m, such as inf"),
        ([1e308, 800.0, 8.0, 8.0], r"holds 2 widths above 100 m, such as 1e\+308"),
        ([0, 0, 0, 0], r"holds no width above zero in .*a\.gpkg; name another column"),
        (["a", "b", "c", "d"], r"holds no width above zero"),
    ],
)
def test_widths_that_cannot_be_are_refused(tmp_path, cells, message):
    table(w=cells).to_file(tmp_path / "a.gpkg")
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, "a.gpkg", width="w")


def test_lanes_in_words_and_lists(tmp_path):
    table(highway=["primary"] * 4, lanes=["2", "2;4", "['2', '4']", "-1"]).to_file(tmp_path / "a.gpkg")
    assert thickness(tmp_path, "a.gpkg", lane_m=4) == [8, 12, 12, 6]


def test_of_several_layers_the_one_with_lines_or_the_one_that_is_named(tmp_path):
    table([street(ROWS[0])]).to_file(tmp_path / "two.gpkg", layer="bridges")
    table().to_file(tmp_path / "two.gpkg", layer="roads")
    with pytest.raises(
        ConfigError, match=r"^labels\.roads\.layer: None is needed: two\.gpkg has several layers; name one of: bridges, roads$"
    ):
        opened(tmp_path, "two.gpkg")
    assert thickness(tmp_path, "two.gpkg", layer="roads") == [8, 8, 8, 8]
    assert thickness(tmp_path, "two.gpkg", layer="bridges") == [8, 0, 0, 0]
    with pytest.raises(ConfigError, match=r"layer: 'ways' is not a layer of two\.gpkg; it has: bridges, roads"):
        opened(tmp_path, "two.gpkg", layer="ways")
    table([shapely.Point(LEFT, TOP)]).to_file(tmp_path / "osmnx.gpkg", layer="nodes")
    table().to_file(tmp_path / "osmnx.gpkg", layer="edges")
    assert thickness(tmp_path, "osmnx.gpkg") == [8, 8, 8, 8]
    table([shapely.Point(LEFT, TOP)]).to_file(tmp_path / "areas.gpkg", layer="poles")
    table([street(row).buffer(3, cap_style="flat") for row in ROWS]).to_file(tmp_path / "areas.gpkg", layer="carriageways")
    assert thickness(tmp_path, "areas.gpkg") == [6, 6, 6, 6]
    table([shapely.Point(LEFT, TOP)]).to_file(tmp_path / "poles.gpkg", layer="poles")
    table([shapely.Point(LEFT, TOP)]).to_file(tmp_path / "poles.gpkg", layer="trees")
    with pytest.raises(DataError, match="holds neither lines nor areas"):
        opened(tmp_path, "poles.gpkg")


OSM = ["residential", "footway", "primary_link", "steps"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"highway": OSM}, [8, 0, 8, 0]),
        ({"highway": ["residential", None, "service", None], "railway": [None, "rail", None, "tram"]}, [8, 0, 8, 0]),
        ({"highway": ["['residential', 'path']", "['path', 'steps']", "track", "cycleway"]}, [8, 0, 8, 0]),
        ({"fclass": ["residential", "footway", "track_grade2", "steps"]}, [8, 0, 8, 0]),
        ({"class": OSM, "subtype": ["road"] * 4}, [8, 0, 8, 0]),
        (
            {"class": ["residential", "residential", "primary", "unknown"], "subtype": ["road", "water", "road", "rail"]},
            [8, 0, 8, 0],
        ),
        ({"class": ["a", "b", "c", "steps"]}, [8, 8, 8, 8]),  # somebody's own classes
        ({"highway": ["A1", "B2", "A3", "C4"]}, [8, 8, 8, 8]),
        ({"highway": ["footway"] * 4}, [8, 8, 8, 8]),  # a map of footways is one
    ],
)
def test_footways_are_no_roads(tmp_path, columns, expected):
    table(**columns).to_file(tmp_path / "a.gpkg")
    lines = opened(tmp_path, "a.gpkg")
    assert thickness(tmp_path, "a.gpkg") == expected
    assert ("2 of 4 lines are roads for cars, by `" in lines.note) == (expected != [8, 8, 8, 8])
    table(**columns).to_crs(4326).to_parquet(tmp_path / "a.parquet")
    assert thickness(tmp_path, "a.parquet") == expected


def test_overture_with_nested_columns(tmp_path):
    roads = table(subtype=["road"] * 4, **{"class": OSM}).to_crs(4326)
    roads["road_surface"] = [[{"value": "paved"}]] * 4
    roads.to_parquet(tmp_path / "overture.parquet")
    assert thickness(tmp_path, "overture.parquet") == [8, 0, 8, 0]


def test_check_says_what_was_left_out(tmp_path):
    spec = {"name": "c", "workspace": "w", "grid": {"bounds": [15.0, 47.393, 15.003, 47.3958], "resolution_m": 1.0, "tile_px": 64},
            "imagery": {"sources": ["a.tif"]}, "labels": {"roads": {"path": "a.gpkg", "width": "w"}}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    grid = load_city(tmp_path / "city.yaml").make_grid()
    with rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", height=100, width=100, count=3, dtype="uint8", crs=grid.crs,
                       transform=grid.affine) as dst:  # fmt: skip
        dst.write(np.ones((3, 100, 100), np.uint8))
    b = grid.bounds
    lines = [shapely.LineString([(b.left, b.top - 9 * k), (b.right, b.top - 9 * k)]) for k in range(1, 5)]
    gpd.GeoDataFrame({"highway": OSM, "w": [8, 8, 0, 8]}, geometry=lines, crs=grid.crs).to_file(tmp_path / "a.gpkg")
    (line,) = [found for found in check_city(load_city(tmp_path / "city.yaml")) if found.startswith("labels.roads")]
    assert line == (
        "labels.roads: readable, and inside the grid; 2 of 4 lines are roads for cars, by `highway`; "
        "1 of 2 have no width of their own and get width_m"
    )


def geojson(path, lines, **more):
    text = json.loads(lines.to_json())
    text.pop("crs", None)
    path.write_text(json.dumps(text | more))


def test_metres_in_a_geojson_that_names_no_crs(tmp_path):
    geojson(tmp_path / "a.geojson", table())
    with pytest.raises(
        ConfigError,
        match=r"a\.geojson' has coordinates that are no degrees, such as 4\d+, 5\.2\d+e\+06; state the CRS of the file as labels\.roads\.crs$",
    ):
        opened(tmp_path, "a.geojson")
    assert thickness(tmp_path, "a.geojson", crs=GRID.crs) == [8, 8, 8, 8]


def test_coordinates_without_sense_are_refused_and_far_ones_left_out(tmp_path):
    far = shapely.LineString([(-140, -60), (-141, -61)])
    gpd.GeoDataFrame(geometry=[*table().to_crs(4326).geometry, far], crs=4326).to_file(tmp_path / "far.gpkg")
    assert thickness(tmp_path, "far.gpkg") == [8, 8, 8, 8]
    for number, wrong in enumerate((1e308, 1e300, 1e15)):
        name = f"{number}.gpkg"
        table([shapely.LineString([(LEFT, TOP), (wrong, TOP)])]).to_file(tmp_path / name)
        with pytest.raises(ConfigError, match=r"cannot be placed in the city's CRS"):
            opened(tmp_path, name)
        table([shapely.LineString([(LEFT, TOP), (wrong, TOP)])]).set_crs(3857, allow_override=True).to_file(tmp_path / name)
        with pytest.raises(ConfigError, match=r"cannot be placed in the city's CRS"):
            opened(tmp_path, name)
    nowhere = [struct.pack("<BII4d", 1, 2, 2, np.nan, 1, 2, np.inf)]
    pd.DataFrame({"geometry": nowhere}).to_parquet(tmp_path / "nan.parquet")
    with pytest.raises(ConfigError, match="has coordinates that are no numbers"):
        opened(tmp_path, "nan.parquet", crs=GRID.crs)


def test_geometries_of_all_kinds(tmp_path):
    rows = [
        f"MULTILINESTRING (({LEFT + 10} {TOP - 41},{LEFT + 240} {TOP - 41}))",
        f"LINESTRING Z ({LEFT + 10} {TOP - 91} 5,{LEFT + 240} {TOP - 91} 7)",
        f"GEOMETRYCOLLECTION (POINT (0 0), LINESTRING ({LEFT + 10} {TOP - 141},{LEFT + 240} {TOP - 141}))",
        f"COMPOUNDCURVE (({LEFT + 10} {TOP - 191},{LEFT + 240} {TOP - 191}), CIRCULARSTRING ({LEFT + 240} {TOP - 191},{LEFT + 245} {TOP - 196},{LEFT + 240} {TOP - 201}))",
        "LINESTRING EMPTY",
        "POINT (1 2)",
    ]
    (tmp_path / "a.csv").write_text("WKT,name\n" + "".join(f'"{row}",x\n' for row in rows))
    assert thickness(tmp_path, "a.csv", crs=GRID.crs) == [8, 8, 8, 8]
    (tmp_path / "b.csv").write_text('WKT,name\n"LINESTRING EMPTY",x\n')
    with pytest.raises(DataError, match="holds neither lines nor areas"):
        opened(tmp_path, "b.csv", crs=GRID.crs)


def test_a_name_in_another_encoding_does_no_harm(tmp_path):
    table(name=["Straße", "Größe", "é", "x"]).to_file(tmp_path / "a.shp", encoding="ISO-8859-1")
    (tmp_path / "a.cpg").write_text("UTF-8")
    assert thickness(tmp_path, "a.shp") == [8, 8, 8, 8]


def shapefile_in_a_folder(folder):
    table(name=list("abcd")).to_file(folder / "r.shp")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for ending in ("shp", "shx", "dbf", "prj"):
            archive.write(folder / f"r.{ending}", f"data/roads/r.{ending}")
        archive.writestr("__MACOSX/data/roads/._r.shp", b"x")
        archive.writestr("data/README.txt", b"x")
    return "a.zip"


def geopackage_in_a_zip(folder):
    table().to_file(folder / "r.gpkg")
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.write(folder / "r.gpkg", "r.gpkg")
    return "a.zip"


def wkb_parquet(folder):
    pd.DataFrame({"id": range(4), "geometry": shapely.to_wkb(table().geometry)}).to_parquet(folder / "a.parquet")
    return "a.parquet"


def wkt_parquet(folder):
    pd.DataFrame({"geom": shapely.to_wkt(table().geometry)}).to_parquet(folder / "a.parquet")
    return "a.parquet"


@pytest.mark.parametrize("make", [shapefile_in_a_folder, geopackage_in_a_zip, wkb_parquet, wkt_parquet])
def test_files_that_others_read_are_read(tmp_path, make):
    assert thickness(tmp_path, make(tmp_path), crs=GRID.crs) == [8, 8, 8, 8]


def test_a_zip_of_several_maps_needs_a_name(tmp_path):
    table().to_file(tmp_path / "roads.gpkg")
    table([street(ROWS[1])]).to_file(tmp_path / "rail.gpkg")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "roads.gpkg", "in/roads.gpkg")
        archive.write(tmp_path / "rail.gpkg", "in/rail.gpkg")
    with pytest.raises(ConfigError, match=r"labels\.roads\.layer: None names no map of .*a\.zip; it has: roads, rail"):
        opened(tmp_path, "a.zip")
    assert thickness(tmp_path, "a.zip", layer="roads") == [8, 8, 8, 8]


def broken_osm(path):
    path.write_text("<osm version='0.6'><node id='1' lat='1' lon='2'/><way id='1'><nd ref='1'/>")


def one_point(path):
    path.write_text('WKT\n"LINESTRING (1 1)"\n')


def no_geometry(path):
    pd.DataFrame({"a": [1]}).to_parquet(path)


def bad_wkb(path):
    pd.DataFrame({"geometry": [b"\x01\x02"]}).to_parquet(path)


def locked_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vertices.txt", "1,2,3\n")
        archive.writestr("edges.txt", "1,1,1\n")
    raw = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = -1
        while (at := raw.find(mark, at + 1)) >= 0:
            raw[at + offset] |= 1
    path.write_bytes(raw)


UNREAD = {
    "m.jpg": (lambda p: p.write_bytes(b"x"), r"m\.jpg is packed with loss.*save the mask as GeoTIFF or PNG"),
    "r.osm.bz2": (
        lambda p: p.write_bytes(bz2.compress(b"<osm/>")),
        r"r\.osm\.bz2 is packed in a way that is not read; unpack it",
    ),
    "r.docx": (lambda p: p.write_bytes(b"PK x"), r"r\.docx is of a kind that is not read as a map; give one of: GeoPackage, "),
    "r.osm": (broken_osm, r"r\.osm is not a readable map \(.*parsing.*\); check the file"),
    "p.csv": (one_point, r"p\.csv is not a readable map \(.*point array"),
    "n.parquet": (no_geometry, r"n\.parquet is not a readable map \(no column of geometries among a\)"),
    "b.parquet": (bad_wkb, r"b\.parquet is not a readable map"),
    "l.zip": (locked_zip, r"l\.zip is not a readable map \(.*encrypted"),
    "g.gpkg": (lambda p: p.write_bytes(b"SQLite format 3\0 and no more"), r"g\.gpkg is not a readable map"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_are_not_read_get_one_true_line(tmp_path, name):
    make, message = UNREAD[name]
    make(tmp_path / name)
    with pytest.raises(RoadFuseError, match=message) as caught:
        opened(tmp_path, name, crs=GRID.crs)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("labels.roads.path: ")
    assert caught.value.exit_code in (2, 3)


def test_a_folder_is_no_map(tmp_path):
    (tmp_path / "roads.gdb").mkdir()
    with pytest.raises(ConfigError, match=r"labels\.roads\.path: 'roads\.gdb' is a folder; give the path of a file"):
        opened(tmp_path, "roads.gdb")


def test_a_map_fetches_nothing_and_shows_no_other_file(tmp_path):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_CONNECT = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        layer = "<OGRVRTDataSource><OGRVRTLayer name='a'><SrcDataSource>{0}</SrcDataSource></OGRVRTLayer></OGRVRTDataSource>"
        (tmp_path / "a.xml").write_text(layer.format(f"/vsicurl/{url}/a.geojson"))
        (tmp_path / "b.gpkg").write_text(layer.format(f"{url}/a.geojson"))
        (tmp_path / "c.xml").write_text(f"<OGRWFSDataSource><URL>{url}/wfs</URL></OGRWFSDataSource>")
        for name in ("a.xml", "b.gpkg", "c.xml"):
            with pytest.raises(DataError, match="only refers to another map"):
                opened(tmp_path, name)
        geojson(
            tmp_path / "d.geojson",
            table().to_crs(4326),
            crs={"type": "link", "properties": {"href": f"{url}/crs", "type": "proj4"}},
        )
        opened(tmp_path, "d.geojson", crs="EPSG:4326")
        server.shutdown()
    assert asked == []


def test_a_line_that_crosses_itself_at_random_is_drawn_in_bounded_time(tmp_path):
    """Its buffer as one shape costs the square of its vertices: minutes for these 3,000."""
    xy = np.array([LEFT, TOP - 256]) + 256 * np.random.default_rng(0).random((3000, 2))
    table([shapely.LineString(xy)]).to_file(tmp_path / "a.gpkg")
    start = time.process_time()
    road, known = opened(tmp_path, "a.gpkg", width_m=1).window(0, 0, 256, 256)
    assert time.process_time() - start < 20
    pixels = np.floor((xy - [LEFT, TOP]) * [1, -1]).astype(int)
    assert road[pixels[:, 1], pixels[:, 0]].mean() > 0.6
    assert known.mean() > 0.95


def test_pieces_of_a_long_line_cover_what_the_line_covers(tmp_path):
    angle = np.linspace(0, 4 * np.pi, 500)
    line = shapely.LineString(
        np.column_stack([LEFT + 128 + (30 + 5 * angle) * np.cos(angle), TOP - 128 + (30 + 5 * angle) * np.sin(angle)])
    )
    table([line]).to_file(tmp_path / "a.gpkg")
    road, _ = opened(tmp_path, "a.gpkg", width_m=7).window(0, 0, 256, 256)
    x, y = np.meshgrid(LEFT + np.arange(256) + 0.5, TOP - np.arange(256) - 0.5)
    distance = shapely.distance(line, shapely.points(x, y))
    assert road[distance < 3.45].all()
    assert not road[distance > 3.55].any()


def test_the_line_of_a_wrong_map_is_one_of_check(tmp_path):
    geojson(tmp_path / "a.geojson", table())
    spec = {"name": "c", "workspace": "w", "grid": {"bounds": [15.0, 47.393, 15.003, 47.3958], "resolution_m": 1.0, "tile_px": 64},
            "imagery": {"sources": ["a.tif"]}, "labels": {"roads": "a.geojson"}}  # fmt: skip
    (tmp_path / "city.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(InvalidCityError) as caught:
        check_city(load_city(tmp_path / "city.yaml"))
    assert [line for line in str(caught.value).splitlines() if "labels.roads.path" in line and "no degrees" in line]
