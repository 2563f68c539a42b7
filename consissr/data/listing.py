"""Which photographs there are: folders, text lists, tar shards and patterns of them, as one list of references.

Ten million references must neither fill the memory of every process nor take minutes: names are packed, and what a tar
shard holds is noted in a cache, by its path, size and time of change.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from consissr.config.machine import cache_folder, cores, whole
from consissr.data.patterns import matching
from consissr.data.photo import EXTENSIONS, PhotoFile
from consissr.errors import UserError
from consissr.images.tree import tree

log = logging.getLogger(__name__)

MANY_SHARDS = 16
"""From this many unknown shards on they are read by processes side by side (about 35 us per member and core)."""


@dataclass(frozen=True, slots=True)
class PackedFiles:
    """The images of one folder, list or shard in order, packed."""

    root: str
    """What stands before every name to make a path (a folder with its slash); a shard's own path."""
    text: bytes
    """All names, one after another, UTF-8."""
    ends: np.ndarray
    """(n,) int64: where each name ends in `text`."""
    places: np.ndarray | None = None
    """(n, 2) int64: first byte and size of a shard's members; None for ordinary files."""

    @classmethod
    def pack(cls, root: str, names: Iterable[str], places: np.ndarray | None = None) -> PackedFiles:
        """The names in order."""
        encoded = [os.fsencode(name) for name in names]
        return cls(root, b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64), places)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> PhotoFile:
        name = os.fsdecode(self.text[self.ends[i - 1] if i else 0 : self.ends[i]])
        if self.places is None:
            return PhotoFile(name.replace(os.sep, "/"), os.path.join(self.root, name))
        return PhotoFile(name, self.root, int(self.places[i, 0]), int(self.places[i, 1]))


class Photos(Sequence[PhotoFile]):
    """Several sources as one list."""

    def __init__(self, sources: Iterable[PackedFiles]) -> None:
        self.sources = [source for source in sources if len(source)]
        self._starts = np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> PhotoFile:
        if not 0 <= i < len(self):
            raise IndexError(i)
        which = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self.sources[which][int(i - self._starts[which])]


def list_photos(entry: str | Path) -> Photos:
    """The photographs of a folder (recursive), a text list, a tar shard, or a pattern of those; sorted.

    A pattern has wildcards (*, ?, [abc], ** for any depth), ranges {000..099} or choices {a,b}. A text list has one
    path per line, absolute or relative to the list; empty lines and lines that start with # are none. Raises UserError
    where there are no photographs.
    """
    return Photos(sources(os.path.expanduser(str(entry))))


def sources(entry: str) -> list[PackedFiles]:
    """What `entry` names, as `list_photos` describes it."""
    if not os.path.exists(entry):
        matches = matching(entry)
        if not matches:
            raise UserError(f"data path {entry} does not exist: give a folder, a text list, a tar shard or a pattern")
        note_shards([match for match in matches if match.endswith(".tar")])
        return [source for match in matches for source in sources(match)]
    if os.path.isdir(entry):
        listed = from_folder(entry)
    elif entry.endswith(".tar"):
        listed = [from_shard(entry)]
        if not len(listed[0]):
            raise UserError(f"shard {entry} holds no complete image: fetch it again or take it off the list")
    elif entry.lower().endswith(EXTENSIONS):
        listed = [PackedFiles.pack(os.path.join(os.path.dirname(entry), ""), [os.path.basename(entry)])]
    else:
        listed = [from_list(entry)]
    if not any(map(len, listed)):
        raise UserError(f"data path {entry} holds no images ({', '.join(EXTENSIONS)}) and no tar shards with images")
    return listed


def from_folder(folder: str) -> list[PackedFiles]:
    """Images below `folder` and in its tar shards, in the order of a sorted walk (`tree`); hidden files are none."""
    base = os.path.join(folder, "")
    entries: list[str | None] = []
    shards: list[str] = []
    for here, names in tree(base):
        below = os.path.join(*here.relative_to(folder).parts, "")
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(EXTENSIONS):
                entries.append(below + name)
            elif name.endswith(".tar"):
                shards.append(base + below + name)
                entries.append(None)  # its images come here
    if not shards:
        return [PackedFiles.pack(base, entries)]
    note_shards(shards)
    packed, names = [], []
    for name in [*entries, None]:
        if name is not None:
            names.append(name)
            continue
        packed.append(PackedFiles.pack(base, names))
        names = []
        if shards:
            packed.append(from_shard(shards.pop(0)))
    return packed


def from_list(path: str) -> PackedFiles:
    """Images of a text list; UserError if none of the first is there."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"data path {path} is no text list, image or tar shard; unpack other archives first") from error
    base = os.path.join(os.path.dirname(os.path.abspath(path)), "")
    names = [os.path.normpath(line) for line in lines if line and not line.startswith("#")]
    head = [os.path.join(base, name) for name in names[:20]]
    if head and not any(map(os.path.isfile, head)):
        raise UserError(f"list {path}: none of its first {len(head)} files exists (looked for {head[0]} first)")
    return PackedFiles.pack(base, names)


# --- tar shards -------------------------------------------------------------------------------------------------------


def from_shard(path: str) -> PackedFiles:
    """Images of a tar file, from the cache or by its headers. A truncated shard gives what is whole, with a warning."""
    noted = note_of(path)
    try:
        with np.load(noted) as arrays:
            return PackedFiles(path, arrays["text"].tobytes(), arrays["ends"], arrays["places"])
    except (OSError, ValueError, KeyError, EOFError):
        pass
    source, damage = read_shard(path)
    if damage:
        log.warning("shard %s is damaged (%s): its first %d images are used", path, damage, len(source))
    else:
        write_note(noted, source)
    return source


def read_shard(path: str) -> tuple[PackedFiles, str]:
    """The complete images of a tar file, and what is wrong with it ('': nothing)."""
    names, places, damage, total = [], [], "", os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # else it keeps every header
                if not member.isfile() or not member.name.lower().endswith(EXTENSIONS):
                    continue
                if member.offset_data + member.size > total:
                    raise tarfile.ReadError(f"it ends inside {member.name}")
                names.append(member.name)
                places.append((member.offset_data, member.size))
    except tarfile.TarError as error:
        damage = str(error)
    return PackedFiles.pack(path, names, np.array(places, dtype=np.int64).reshape(-1, 2)), damage


def note_of(path: str) -> Path:
    """Where the cache has what this state of a shard holds."""
    stat = os.stat(path)
    key = hashlib.blake2b(f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(), digest_size=16)
    return cache_folder() / "shards" / f"{key.hexdigest()}.npz"


def write_note(noted: Path, source: PackedFiles) -> None:
    """Remember a shard; a cache that cannot be written is none."""
    try:
        noted.parent.mkdir(parents=True, exist_ok=True)
        with whole(noted) as part:
            np.savez(part, text=np.frombuffer(source.text, np.uint8), ends=source.ends, places=source.places)
    except OSError:
        log.debug("%s could not be written", noted)


def note_shards(paths: list[str]) -> None:
    """Bring many shards that the cache does not know into it, by several processes."""
    unknown = [path for path in paths if not note_of(path).is_file()]
    if len(unknown) < MANY_SHARDS:
        return
    workers = min(cores(), 32)
    log.info("reading the headers of %d tar shards, once, in %d processes", len(unknown), workers)
    code = "import sys; from consissr.data.listing import note_shard; [note_shard(line[:-1]) for line in sys.stdin]"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    call = [sys.executable, "-c", code]
    readers = [subprocess.Popen(call, stdin=subprocess.PIPE, text=True, env=environment) for _ in range(workers)]
    for number, reader in enumerate(readers):
        reader.stdin.write("".join(f"{path}\n" for path in unknown[number::workers]))
        reader.stdin.close()
    for reader in readers:
        reader.wait()


def note_shard(path: str) -> None:
    """One shard, in a process of its own; damage, and what such a process missed, is told by the one that lists."""
    source, damage = read_shard(path)
    if not damage:
        write_note(note_of(path), source)
