"""From a name to a directory, without any network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from ropeway import hub
from ropeway.errors import ModelError


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert hub.locate(str(tmp_path)) == tmp_path


def test_a_missing_directory_is_not_looked_up_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("/no/such/model", "./none", "../none", "~/none", "a/b/c"):
        with pytest.raises(ModelError, match=f"The directory {name} does not exist"):
            hub.locate(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file"):
        hub.locate(str(tmp_path / "model.safetensors"))


def test_only_harmless_files_of_one_revision_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.locate("owner/name", revision="abc", download_dir="/cache") == tmp_path
    hub.locate("owner/name", weights=False)
    (name, full), (_, light) = asked
    assert (name, full["revision"], full["cache_dir"]) == ("owner/name", "abc", "/cache")
    assert "model*.safetensors" in full["allow_patterns"]
    assert set(full["allow_patterns"]) - set(light["allow_patterns"]) == {"model*.safetensors"}
    assert all(p.endswith((".json", ".jinja", ".safetensors")) for p in full["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalEntryNotFoundError("offline"), "'x/y' is not in the local cache and the hub cannot.*Go online once"),
        (HFValidationError("bad"), "nor a possible hub name.*Check the spelling"),
        (OSError("disk full"), "OSError: disk full.*Check the network"),
    ],
)
def test_failures_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message):
        hub.locate("x/y")


def test_an_installation_without_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "BUNDLED", tmp_path)
    with pytest.raises(ModelError, match=r"bundled model is not in this installation .*Name another model"):
        hub.locate("bundled")
