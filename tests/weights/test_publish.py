"""convert.py --push: a model folder and its card through the hub's client; what nobody could use is refused."""

import shutil
from types import SimpleNamespace

import pytest

from consissr.config.loading import save_config
from consissr.errors import UserError
from consissr.weights.files import read_config
from consissr.weights.publish import push


@pytest.fixture
def calls(monkeypatch):
    """What the client is asked to do."""
    made = []

    class Api:
        def create_repo(self, place, **words):
            made.append(("create", place, words))
            return f"https://hub/{place}"

        def repo_info(self, place):
            return SimpleNamespace(private=place == "me/model")

        def upload_folder(self, **words):
            made.append(("folder", words["repo_id"], words))

        def upload_file(self, **words):
            made.append(("card", words["path_in_repo"], words["path_or_fileobj"].decode()))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return made


def test_a_folder_goes_up_with_its_card(calls, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    with pytest.raises(UserError, match="which nobody else has"):
        push(folder, "me/model")
    config = read_config(folder)
    config.model.base = "sd21-base"
    save_config(config, folder / "config.yaml")
    assert push(folder, "me/model", private=True) == "https://hub/me/model"
    (create, _, words), (_, _, uploaded), (_, card, text) = calls
    assert create == "create" and words == {"private": True, "exist_ok": True}
    assert uploaded["folder_path"] == folder and card == "README.md"
    assert text.startswith("---\nlibrary_name: consissr") and "# tiny" in text


def test_nothing_private_goes_into_a_public_repository(calls, root):
    """The hub leaves a repository that is there as public as it was."""
    with pytest.raises(UserError, match="me/shown is public already: make it private on its page, or name another"):
        push(root / "consissr" / "assets" / "nano" / "nano-ccsr", "me/shown", private=True)
    assert [call[0] for call in calls] == ["create"]
    assert push(root / "consissr" / "assets" / "nano" / "nano-ccsr", "me/shown") == "https://hub/me/shown"


def test_other_folders_and_names_are_refused(calls, tiny_model, tmp_path):
    for folder, place, said in ((tmp_path, "me/model", "config.yaml"), (tiny_model, "model", "owner/name")):
        with pytest.raises(UserError, match=said):
            push(folder, place)
    assert calls == []
