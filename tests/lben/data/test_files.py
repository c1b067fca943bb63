"""Downloads: in place when their MD5 is right, and not at all otherwise."""

import hashlib

import pytest

from lben.data import DataError, fetch


def test_downloads_are_checked(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"content")
    md5 = hashlib.md5(b"content").hexdigest()
    fetch(source.as_uri(), tmp_path / "new" / "file", md5)
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    with pytest.raises(DataError, match=f"expected MD5 {'0' * 32}, got {md5}"):
        fetch(source.as_uri(), tmp_path / "bad", "0" * 32)
    with pytest.raises(DataError, match=r"cannot download .*put the file at"):
        fetch((tmp_path / "absent").as_uri(), tmp_path / "bad", md5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]
