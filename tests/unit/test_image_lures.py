"""Images and virtual rasters read their own files and nothing else: no address, no other file, no endless nesting."""

import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from roadfuse_core.errors import DataError
from tests.unit.test_rasters import HEIGHT, WIDTH, at, label, read, rectangle, virtual, write


@pytest.fixture
def server():
    """A server on this machine and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()


WMS = ('<GDAL_WMS><Service name="TMS"><ServerUrl>{url}/${{z}}/${{x}}/${{y}}.png</ServerUrl></Service><DataWindow><UpperLeftX>-20037508'
       "</UpperLeftX><UpperLeftY>20037508</UpperLeftY><LowerRightX>20037508</LowerRightX><LowerRightY>-20037508</LowerRightY><TileLevel>18"
       "</TileLevel><TileCountX>1</TileCountX><TileCountY>1</TileCountY><YOrigin>top</YOrigin></DataWindow><Projection>EPSG:3857"
       "</Projection><BandsCount>3</BandsCount></GDAL_WMS>")  # fmt: skip


def lure(kind, folder, url):
    """The file of an image that leads to a server, or to a file of the machine that is no image."""
    place, out = at(30, 50), folder / "lure.tif"
    (folder / "wms.xml").write_text(WMS.format(url=url))
    passwd = '<VRTRasterBand dataType="Byte" band="1" subClass="VRTRawRasterBand"><SourceFilename relativetoVRT="0">/etc/passwd</SourceFilename>'
    sources = {"an address": f"/vsicurl/{url}/plain.tif", "a service behind a file": "wms.xml", "a subdataset": f"WMS:{url}/wms?LAYERS=a",
               "a packed address": f"/vsizip//vsicurl/{url}/a.zip/a.tif", "XML in XML": "&lt;VRTDataset/&gt;"}  # fmt: skip
    if kind == "a service":
        out.write_text(WMS.format(url=url))
    elif kind == "raw bytes":
        out.write_text(virtual([], place).replace("</VRTDataset>", f"{passwd}</VRTRasterBand></VRTDataset>"))
    elif kind == "raw bytes by a link":
        (folder / "bytes.dat").symlink_to("/etc/passwd")
        out.write_text(
            virtual([], place).replace(
                "</VRTDataset>", f"{passwd.replace('/etc/passwd', str(folder / 'bytes.dat'))}</VRTRasterBand></VRTDataset>"
            )
        )
    elif kind == "overviews elsewhere":
        write(out, np.full((3, HEIGHT, WIDTH), 40, np.uint8), place)
        where = f"<PAMDataset><Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>/vsicurl/{url}/o.tif</MDI></Metadata></PAMDataset>"
        out.with_name("lure.tif.aux.xml").write_text(where)
    elif kind in ("a warped address", "steps of a process"):
        warped = kind == "a warped address"
        tag, name = ("GDALWarpOptions", "Warped") if warped else ("Input", "Processed")
        inner = (
            f"<SourceDataset relativeToVRT='0'>/vsicurl/{url}/a.tif</SourceDataset>"
            if warped
            else f"<SourceFilename>/vsicurl/{url}/a.tif</SourceFilename>"
        )
        text = virtual([], place).replace("<VRTDataset", f"<VRTDataset subClass='VRT{name}Dataset'")
        out.write_text(text.replace("</VRTDataset>", f"<{tag}>{inner}</{tag}></VRTDataset>"))
    else:
        out.write_text(
            virtual([("", "SOURCE", 1)], place)
            .replace('relativeToVRT="1"', 'relativeToVRT="0"')
            .replace("SOURCE", sources[kind])
        )
        if kind == "a service behind a file":
            out.write_text(virtual([("", "wms.xml", 1)], place))
    return out


LURES = ["a service", "an address", "a service behind a file", "a subdataset", "a packed address", "XML in XML", "raw bytes",
         "raw bytes by a link", "overviews elsewhere", "a warped address", "steps of a process"]  # fmt: skip


@pytest.mark.parametrize("kind", LURES)
def test_an_image_fetches_nothing_and_shows_no_other_file(tmp_path, server, kind):
    url, asked = server
    path = lure(kind, tmp_path, url)
    with pytest.raises(DataError, match=r"^imagery\.sources: ") as caught:
        read([path])
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"^labels\.roads\.path: "):
        label(path)
    assert asked == []


def test_a_virtual_raster_of_files_is_read_whichever_way_they_are_named(tmp_path):
    (tmp_path / "sheets").mkdir()
    sheet = write(tmp_path / "sheets/a [1].tif", np.full((1, HEIGHT, WIDTH), 40, np.uint8), at(30, 50))
    (tmp_path / "inner.vrt").write_text(virtual([("", "sheets/a [1].tif", 1)], at(30, 50)))
    (tmp_path / "a.vrt").write_text(virtual([("", sheet, 1), ("", "inner.vrt", 1), ("", "inner.vrt", 1)], at(30, 50)))
    rgb, known = read([tmp_path / "a.vrt"])
    assert np.array_equal(known, rectangle(30, 50))
    assert (rgb[:, known] == 40).all()


def test_members_of_an_archive_are_images_and_lead_nowhere(tmp_path, server):
    url, asked = server
    write(tmp_path / "sheet.tif", np.full((1, HEIGHT, WIDTH), 40, np.uint8), at(30, 50))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "sheet.tif", "in/sheet.tif")
        archive.writestr("in/wms.xml", WMS.format(url=url))
        archive.writestr(
            "in/lure.vrt", virtual([("", f"/vsicurl/{url}/plain.tif", 1)], at(30, 50)).replace("relativeToVRT", "x")
        )
    (tmp_path / "a.vrt").write_text(virtual([("", f"/vsizip/{tmp_path}/a.zip/in/sheet.tif", 1)], at(30, 50)))
    rgb, known = read([tmp_path / "a.vrt"])
    assert np.array_equal(known, rectangle(30, 50))
    assert (rgb[:, known] == 40).all()
    for member in ("wms.xml", "lure.vrt", "none.tif"):
        (tmp_path / "b.vrt").write_text(virtual([("", f"/vsizip/{tmp_path}/a.zip/in/{member}", 1)], at(30, 50)))
        with pytest.raises(DataError, match=r"is not a readable raster"):
            read([tmp_path / "b.vrt"])
    assert asked == []


def test_virtual_rasters_without_end_are_refused(tmp_path):
    """Thirteen files, each of which names the next one six times: GDAL would open 6^13."""
    write(tmp_path / "13.vrt", np.full((1, HEIGHT, WIDTH), 40, np.uint8), at(30, 50))
    for number in range(13):
        (tmp_path / f"{number}.vrt").write_text(virtual([("", f"{number + 1}.vrt", 1)] * 6, at(30, 50)))
    with pytest.raises(DataError, match=r"leads to more than 1,000,000 files"):
        read([tmp_path / "0.vrt"])
    (tmp_path / "a.vrt").write_text(virtual([("", "b.vrt", 1)], at(30, 50)))
    (tmp_path / "b.vrt").write_text(virtual([("", "a.vrt", 1)], at(30, 50)))
    with pytest.raises(DataError, match=r"[ab]\.vrt refers to itself"):
        read([tmp_path / "a.vrt"])
