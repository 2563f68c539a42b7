"""Published models by name, as names.yaml lists them, and this project's own cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Source:
    """A place on the hub."""

    hub: str
    revision: str
    layout: str
    """'released' or 'base'."""
    file: str = ""
    """The checkpoint in the repository, where it is one file."""
    half: bool = False
    """Whether the file is in half precision."""

    @property
    def place(self) -> str:
        """owner/name, with the revision where one is pinned."""
        return self.hub if self.revision == "main" else f"{self.hub}@{self.revision}"


@dataclass(frozen=True)
class Published:
    """One entry of names.yaml."""

    name: str
    what: str
    method: str
    licence: str
    steps: str
    gigabytes: dict[str, float]
    by_hand: dict[str, str]
    sources: list[Source] = field(default_factory=list)

    def in_order(self, half: bool) -> list[Source]:
        """The places to try: first those in half precision where `half` will do, else those in full."""
        return sorted(self.sources, key=lambda source: source.half != half)

    def by_hand_words(self) -> str:
        """What to download in a browser, and where to put it."""
        files, page = self.by_hand["files"], self.by_hand["page"]
        return f"download {files} from {page} into {by_hand_folder(self.name)}"

    def how(self) -> str:
        """What to do for this model without the hub, or without a network."""
        if not self.sources:
            return self.by_hand_words()
        size = f"about {self.gigabytes['full']:g} GB"
        return (
            f"where there is a network run scripts/convert.py --prefetch {self.name} ({size}) and copy "
            f"{cache_folder()} and the hub's cache, or {self.by_hand_words()}"
        )


@cache
def published() -> dict[str, Published]:
    """Every entry by name."""
    listed: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "names.yaml").read_text("utf-8"))
    return {
        name: Published(name=name, **{**entry, "sources": [Source(**source) for source in entry["sources"]]})
        for name, entry in listed.items()
    }


def cache_folder() -> Path:
    """Where converted models stand: CONSISSR_HOME, or consissr/ in the user's cache."""
    if home := os.environ.get("CONSISSR_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "consissr"


def by_hand_folder(name: str) -> Path:
    """Where files that can only be downloaded by hand are put."""
    return cache_folder() / "by-hand" / name
