"""Model folders to the Hugging Face hub, through its own client."""

from pathlib import Path

from consissr.errors import UserError
from consissr.weights.files import BUNDLED, CARD, MODEL_FILES, read_config
from consissr.weights.hub import asking, is_hub_id
from consissr.weights.names import published

CARD_HEADER = "---\nlibrary_name: consissr\npipeline_tag: image-to-image\ntags: [super-resolution]\n---\n\n"


def push(folder: Path | None, hub_id: str, private: bool = False) -> str:
    """Upload a model folder with its card to the repository `hub_id`, which is made if need be: its address.

    UserError for what is no model folder, a base that nobody else could find, a hub that refuses,
    or `private` where the repository is there and public.
    """
    from huggingface_hub import HfApi

    if folder is None or not (folder / "config.yaml").is_file():
        raise UserError(f"--push uploads a model folder, which has a config.yaml: {folder} has none")
    if not is_hub_id(hub_id) or "@" in hub_id:
        raise UserError(f"--push {hub_id}: give the repository as owner/name")
    base = read_config(folder).model.base
    on_hub = is_hub_id(base) and not Path(base).exists()
    if not (base.startswith("./") or base in published() or base in ("nano", *BUNDLED) or on_hub):
        raise UserError(f"{folder} builds on {base}, which nobody else has: name a published base in its config.yaml")
    card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else f"# {hub_id}\n"
    text = card if card.startswith("---\n") else CARD_HEADER + card
    files = [f"{name}*" if name.endswith("/") else name for name in MODEL_FILES if name != CARD]
    with asking(f"{hub_id} (uploading)"):
        address = (api := HfApi()).create_repo(hub_id, private=private, exist_ok=True)
        if private and not api.repo_info(hub_id).private:  # one that was there stays as it is
            raise UserError(f"--private: {hub_id} is public already: make it private on its page, or name another")
        api.upload_folder(repo_id=hub_id, folder_path=folder, allow_patterns=files)
        api.upload_file(repo_id=hub_id, path_or_fileobj=text.encode(), path_in_repo=CARD)
    return str(address)
