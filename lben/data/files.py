"""How is a data file downloaded? On request only; it is kept if its MD5 is right."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from lben.data.base import DataError


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file and put it in place only when its MD5 is the published one.

    Args:
        url: of the file.
        path: where it is put; missing folders are made.
        md5: that it must have, in hexadecimal digits.

    Raises:
        DataError: if the download fails or the checksum differs; nothing is left behind.

    Example:
        >>> import hashlib, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "home").write_bytes(b"content")
        >>> md5 = hashlib.md5(b"content").hexdigest()
        >>> fetch((folder / "home").as_uri(), folder / "file", md5)
        >>> (folder / "file").read_bytes()
        b'content'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
            shutil.copyfileobj(response, file)
        found = hashlib.md5(partial.read_bytes()).hexdigest()
        if found != md5:
            raise DataError(f"{url}: expected MD5 {md5}, got {found}; try again")
        os.replace(partial, path)
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"cannot download {url}: {error}; put the file at {path}") from error
    finally:
        partial.unlink(missing_ok=True)
