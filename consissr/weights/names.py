"""Published models by name, as names.yaml lists them."""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from consissr.config.machine import cache_folder
from consissr.weights.cache import by_hand_folder


@dataclass(frozen=True)
class Source:
    """A repository on the hub."""

    hub: str
    revision: str
    layout: str
    """'released', 'base', or 'any' where nothing is known."""
    file: str = ""
    """The checkpoint in the repository, where it is one file."""
    half: bool = False
    """Whether the file is in half precision."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Digests of its files, where they are known."""

    @property
    def hub_id(self) -> str:
        """owner/name, with the revision where one is pinned."""
        return self.hub if self.revision == "main" else f"{self.hub}@{self.revision}"


@dataclass(frozen=True)
class Published:
    """One entry of names.yaml, which explains the fields."""

    name: str
    what: str
    licence: str
    steps: str
    gigabytes: dict[str, float]
    by_hand: list[dict[str, str]]
    sampler: dict[str, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    builds_on: str = ""

    def in_order(self, half: bool) -> list[Source]:
        """The repositories to try: first those in half precision where `half` will do, else those in full."""
        return sorted(self.sources, key=lambda source: source.half != half)

    def by_hand_words(self) -> str:
        """What to download in a browser, and where to put it; with what it builds on."""
        each = [f"{step['files']} from {step['page']} into {self.into(step)}" for step in self.by_hand]
        base = f"; and {published()[self.builds_on].by_hand_words()}" if self.builds_on else ""
        return f"download {', and '.join(each)}{base}"

    def into(self, step: dict[str, str]) -> Path:
        """The folder of one step by hand."""
        return by_hand_folder(self.name) / step.get("into", "")

    def how(self) -> str:
        """What to do for this model without the hub, or without a network."""
        if not self.sources:
            return self.by_hand_words()
        from huggingface_hub import constants

        return (
            f"where there is a network run consissr-convert --prefetch {self.name} (about "
            f"{self.gigabytes['full']:g} GB) and copy {cache_folder()} and {constants.HF_HUB_CACHE}, or "
            f"{self.by_hand_words()}"
        )


@cache
def published() -> dict[str, Published]:
    """Every entry by name."""
    listed: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "names.yaml").read_text("utf-8"))
    return {
        name: Published(name=name, **{**entry, "sources": [Source(**source) for source in entry["sources"]]})
        for name, entry in listed.items()
    }
