"""Model folders to the Hugging Face hub, through its own client."""

from __future__ import annotations

from pathlib import Path

from consissr.errors import UserError
from consissr.weights.files import BUNDLED, read_config
from consissr.weights.hub import is_place, network_errors, told
from consissr.weights.names import published

CARD_HEADER = "---\nlibrary_name: consissr\npipeline_tag: image-to-image\ntags: [super-resolution]\n---\n\n"


def push(folder: Path | None, place: str, private: bool = False) -> str:
    """Upload a model folder with its card to the repository `place`, which is made if need be: its address.

    UserError for what is no model folder, a base that nobody else could find, or a hub that refuses.
    """
    from huggingface_hub import HfApi

    if folder is None or not (folder / "config.yaml").is_file():
        raise UserError(f"--push uploads a model folder, which has a config.yaml: {folder} has none")
    if not is_place(place) or "@" in place:
        raise UserError(f"--push {place}: give the repository as owner/name")
    base = read_config(folder).model.base
    if not (base.startswith("./") or base in published() or base in ("nano", *BUNDLED) or is_place(base)):
        raise UserError(f"{folder} builds on {base}, which nobody else has: name a published base in its config.yaml")
    card = (folder / "README.md").read_text("utf-8") if (folder / "README.md").is_file() else f"# {place}\n"
    text = card if card.startswith("---\n") else CARD_HEADER + card
    api = HfApi()
    try:
        address = api.create_repo(place, private=private, exist_ok=True)
        api.upload_folder(repo_id=place, folder_path=folder, ignore_patterns=["README.md", "checkpoint-*", "*.part"])
        api.upload_file(repo_id=place, path_or_fileobj=text.encode(), path_in_repo="README.md")
    except network_errors() as error:
        raise told(f"{place} (uploading)", error) from error
    return str(address)
