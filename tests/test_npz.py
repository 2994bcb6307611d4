"""The reader of .npz archives."""

from __future__ import annotations

import os
import stat
import sys
import zipfile

import numpy as np
import pytest

from numba_attn.commands import npz


@pytest.fixture
def arrays():
    return {"x": np.random.default_rng(0).standard_normal((2, 4, 5, 8)), "y": np.arange(3)}


@pytest.mark.parametrize(
    "x",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(24.0).reshape(4, 6)),
        np.arange(5, dtype=">i4"),
        np.array(7),
        np.array([True, False]),
    ],
    ids=["C", "Fortran", "big-endian", "scalar", "bool"],
)
def test_stored_members_are_mapped_read_only(tmp_path, x):
    np.savez(tmp_path / "a.npz", before=np.ones(3), x=x)
    mapped = npz.load(tmp_path / "a.npz")["x"]
    assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
    assert mapped.dtype == x.dtype and mapped.shape == x.shape
    assert mapped.flags.f_contiguous == x.flags.f_contiguous
    np.testing.assert_array_equal(mapped, x)


def test_a_local_header_may_differ_from_the_central_directory(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10.0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        info = zipfile.ZipInfo("x.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(info, (tmp_path / "x.npy").read_bytes())
        info.extra = b""
    mapped = npz.load(tmp_path / "a.npz")["x"]
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, np.arange(10.0))


def test_what_cannot_be_mapped_is_read(tmp_path, arrays):
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    packed = npz.load(tmp_path / "packed.npz")
    assert not isinstance(packed["x"], np.memmap)
    np.testing.assert_array_equal(packed["x"], arrays["x"])
    np.savez(tmp_path / "empty.npz", x=np.empty((0, 3)))
    assert npz.load(tmp_path / "empty.npz")["x"].shape == (0, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_bfloat16_is_two_bytes_without_a_type(tmp_path, monkeypatch, save):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.linspace(-3, 3, 12).reshape(3, 4).astype(ml_dtypes.bfloat16)
    save(tmp_path / "a.npz", x=x, y=np.zeros(2, "V3"))
    loaded = npz.load(tmp_path / "a.npz")
    assert loaded["x"].dtype == x.dtype and loaded["y"].dtype == "V3"
    assert isinstance(loaded["x"], np.memmap) == (save is np.savez)
    np.testing.assert_array_equal(loaded["x"], x)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match=r"cannot read x\.npy: bfloat16 numbers need the package ml_dtypes"):
        npz.load(tmp_path / "a.npz")


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    with pytest.raises(ValueError, match=r"a\.npz: cannot read x\.npy: Object arrays"):
        npz.load(tmp_path / "a.npz")


def test_a_header_that_promises_more_than_there_is(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10.0))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match="72 bytes of data, its header says 80"):
        npz.load(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [0.2, 0.9])
def test_a_truncated_archive(tmp_path, arrays, keep):
    archive = tmp_path / "a.npz"
    np.savez(archive, **arrays)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"is not an \.npz archive"):
        npz.load(archive)


@pytest.mark.parametrize("place", [60, 2000], ids=["first", "middle"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_compressed_data(tmp_path, compression, place):
    path = tmp_path / "a.npz"
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal(1000))
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    content = bytearray(path.read_bytes())
    content[place : place + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: cannot read x\.npy"):
        npz.load(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': (",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 2, 3)}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
        "{[]: 1}",
    ],
)
def test_a_damaged_header(tmp_path, compression, header):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\1\0\x7f\0" + header.ljust(127).encode() + bytes(48))
    with pytest.raises(ValueError, match=r"a\.npz: cannot read x\.npy"):
        npz.load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [({6: 200}, "zip file version 20"), ({9: 8, 46: 255}, "'utf-8' codec")],
    ids=["version needed", "name"],
)
def test_a_damaged_central_directory(tmp_path, arrays, damage, message):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    for place, byte in damage.items():
        content[content.index(b"PK\1\2") + place] = byte
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.npz is not an \.npz archive: {message}"):
        npz.load(path)


@pytest.mark.parametrize("second", ["x.npy", "x"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(tmp_path, second):
    np.save(tmp_path / "x.npy", np.ones(3))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for name in ("x.npy", second):
            archive.write(tmp_path / "x.npy", name)
    with pytest.raises(ValueError, match=r"a\.npz must have one member of each name, got x twice"):
        npz.load(tmp_path / "a.npz")


def test_a_link_stays_and_leads_to_what_is_new(tmp_path):
    (tmp_path / "real.npz").write_bytes(b"before")
    (tmp_path / "link.npz").symlink_to("real.npz")
    with npz.replacing(tmp_path / "link.npz") as file:
        file.write(b"after")
    assert (tmp_path / "link.npz").is_symlink() and (tmp_path / "real.npz").read_bytes() == b"after"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file"), npz.replacing(tmp_path / "pipe"):
        pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_is_replaced_by_a_complete_one_or_not_at_all(tmp_path, error):
    path = tmp_path / "a.npz"
    path.write_bytes(b"before")

    def fail():
        with npz.replacing(path) as file:
            file.write(b"part")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_bytes() == b"before"
    with npz.replacing(path) as file:
        file.write(b"all")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"all" and list(tmp_path.iterdir()) == [path]
