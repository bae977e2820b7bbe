"""Blocks that an interrupted refresh left are taken where they are whole, and made again where they are not."""

import os
import shutil

import numpy as np
import pytest

from roadfuse_core.cubes import ingest
from roadfuse_core.inference import MapReader, infer
from roadfuse_core.inference import _blocks as blocks_module
from roadfuse_core.inference import _plan as planning
from roadfuse_core.inference._scratch import BlockReport, Failure, left_report, save_block


def halves(raw):
    return raw[: len(raw) // 2]


def flipped(raw, at):
    at %= len(raw)
    return raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :]


DAMAGES = {
    "empty": lambda raw, other: b"",
    "cut": lambda raw, other: halves(raw),
    "cut by a byte": lambda raw, other: raw[:-1],
    "longer": lambda raw, other: raw + b"\0",
    "zeros": lambda raw, other: bytes(len(raw)),
    "second half zeros": lambda raw, other: halves(raw) + bytes(len(raw) - len(halves(raw))),
    "first 4 KiB zeros": lambda raw, other: bytes(4096) + raw[4096:],
    "a bit in the sums": lambda raw, other: flipped(raw, -1),
    "a bit in the middle": lambda raw, other: flipped(raw, len(raw) // 2),
    "a bit in the header": lambda raw, other: flipped(raw, 60),
    "another block's": lambda raw, other: other,
    "something else": lambda raw, other: b"no block at all" * 100,
}


def mosaic(city, group="map"):
    reader = MapReader(city, group)
    return {name: reader.window(name, 0, 0, *city.make_grid().shape) for name in reader.arrays}


@pytest.fixture
def interrupted(small_city, monkeypatch):
    """A refresh by kernel density that was stopped before its last block, and a count of the blocks that are predicted."""
    city = small_city.model_copy(update={"imagery": None})
    monkeypatch.setattr(planning, "BLOCK_PX", 128)
    ingest(city)
    predicted, real = [], blocks_module._predict

    def counted(job, *a):
        predicted.append(job.block)
        if len(predicted) == 14:
            raise KeyboardInterrupt
        return real(job, *a)

    with monkeypatch.context() as patch:
        patch.setattr(blocks_module, "_predict", counted)
        with pytest.raises(KeyboardInterrupt):
            infer(city, "kde")
    predicted.clear()
    monkeypatch.setattr(blocks_module, "_predict", lambda job, *a: (predicted.append(job.block), real(job, *a))[1])
    files = sorted((city.workspace_path / "scratch").glob("map-*/*.safetensors"))
    assert len(files) == 13
    return city, files, predicted


def test_damaged_blocks_are_predicted_again_and_whole_ones_are_not(interrupted):
    city, files, predicted = interrupted
    contents = {f: f.read_bytes() for f in files}
    for path, (name, damage) in zip(files, DAMAGES.items(), strict=False):
        path.write_bytes(damage(contents[path], contents[files[-1]]))
        assert path.read_bytes() != contents[path], name
    infer(city, "kde")
    assert len(predicted) == 1 + len(DAMAGES), "the one that was missing and those that are damaged"
    got = mosaic(city)
    infer(city, "kde", group="full", full=True)
    expected = mosaic(city, "full")
    assert (expected["road"] == 1).any()
    for name, values in expected.items():
        assert np.array_equal(got[name], values), name
    assert not list((city.workspace_path / "scratch").iterdir())


def test_blocks_of_an_earlier_form_are_made_again(interrupted):
    """Before blocks had a digest: the same file without one."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    city, files, predicted = interrupted
    for path in files:
        with safe_open(path, "np") as left:
            arrays = {name: left.get_tensor(name) for name in left.keys()}  # noqa: SIM118
        save_file(arrays, path, {"windows": "1", "failed": "[]"})
    infer(city, "kde")
    assert len(predicted) == 14


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    path = tmp_path / "map-1-128" / "0-0.safetensors"
    arrays = {"inner": np.arange(6, dtype=np.uint8).reshape(1, 2, 3), "top": np.zeros((2, 0, 3), np.uint32)}
    report = BlockReport(5, (Failure(1, 2, "why"),))
    save_block(path, arrays, report)
    whole = path.read_bytes()
    assert left_report(path) == report
    spaces = set(range(8 + whole[8:].index(b"}}") + 2, len(whole) - 6))  # padding of the header
    for at in range(len(whole)):
        for bit in range(8):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            assert left_report(path) is None or at in spaces, (at, bit)
        path.write_bytes(whole[:at])
        assert left_report(path) is None
        assert not path.exists(), "removed, so that it is made again"
    path.write_bytes(whole)
    shutil.copy(path, path.with_name("0-128.safetensors"))
    assert left_report(path.with_name("0-128.safetensors")) is None


def test_a_block_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its bytes are waited for, then it is renamed, then the folder is waited for."""
    path, order = tmp_path / "0-0.safetensors", []
    real = os.fsync

    def sync(handle):
        order.append((os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), path.exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    save_block(path, {"inner": np.zeros((1, 2, 2), np.uint8)}, BlockReport(0))
    (part, named), (folder, there) = order
    assert part.endswith(".part")
    assert not named
    assert (folder, there) == (tmp_path.name, True)
