"""One photograph: where it is, and its bytes."""

import time
from dataclasses import dataclass

from consissr.images import formats

EXTENSIONS = tuple(formats.WRITABLE)
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What waiting does not mend."""
WAITS = (0.5, 2.0, 8.0)
"""Seconds before a read that failed (a network file system's hiccup) is tried again."""


@dataclass(frozen=True, slots=True)
class PhotoFile:
    """One image file, or one member of a tar shard."""

    name: str  # path below the folder, list or shard it was found in, with forward slashes
    path: str  # the file to open
    offset: int = -1  # first byte of a shard's member; -1 for an ordinary file
    size: int = -1  # bytes of a shard's member

    @property
    def label(self) -> str:
        """What messages call the image."""
        return self.path if self.offset < 0 else f"{self.path}:{self.name}"

    def read(self) -> bytes:
        """The encoded image. Raises OSError where the file is gone, ends early or stays unreadable."""
        for wait in WAITS:
            try:
                return self._read()
            except LASTING:
                raise
            except OSError:
                time.sleep(wait)
        return self._read()

    def _read(self) -> bytes:
        with open(self.path, "rb") as file:
            if self.offset < 0:
                return file.read()
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise FileNotFoundError(f"shard ends {self.size - len(data)} bytes before the end of {self.name}")
        return data
