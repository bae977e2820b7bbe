"""Files that are complete or not there, and known again by their digest."""

import os

import pytest

from roadfuse_core.files import DamagedFileError, digest_of, read_record, replacing, write_record, write_whole


def test_a_record_with_numbers_as_keys_is_read_with_text_as_keys(tmp_path):
    path = write_record(tmp_path / "r.json", {"tiles": {10: (1, 2), 9: (3,)}})
    assert read_record(path) == {"tiles": {"10": [1, 2], "9": [3]}}


RECORD = {"rows": 1003, "name": "straße", "tiles": {"7": [1, 2.5, None]}}


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\0" * len(b), lambda b: b.replace(b"1003", b"1004"),
    lambda b: b"[]", lambda b: b"null", lambda b: b"\xff\xfe" + b, lambda b: b"[" * 100_000,
])  # fmt: skip
def test_a_record_that_was_damaged_is_not_read(tmp_path, damage):
    path = write_record(tmp_path / "new/r.json", RECORD)
    assert read_record(path) == RECORD
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"r\.json: is damaged"):
        read_record(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_record(path)


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path):
    path = write_whole(tmp_path / "a.txt", "before")

    def fail():
        with replacing(path) as part:
            part.write_text("aft")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def test_two_writers_of_one_file_do_not_share_a_temporary_name(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as one, replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert one != two
    assert path.read_text() == "one"


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, seen, real = tmp_path / "a.txt", [], os.fsync

    def fsync(descriptor):
        seen.append((os.readlink(f"/proc/self/fd/{descriptor}"), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, "x")
    (bytes_of, early), (folder, late) = seen
    assert bytes_of.endswith(".part")
    assert (early, folder, late) == (False, str(tmp_path), True)


def test_a_file_and_its_bytes_have_one_digest(tmp_path):
    for content in (b"", b"x" * 100_003):
        (tmp_path / "f").write_bytes(content)
        assert digest_of(tmp_path / "f") == digest_of(content)
        assert digest_of(content + b"y") != digest_of(content)
