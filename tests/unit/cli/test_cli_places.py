"""Where results go is looked at before anything is measured: each command here has no model, and no server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ropeway.cli.main import main
from ropeway.cli.places import Place
from ropeway.errors import ConfigError

NOWHERE = "no/such/model"


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a command that is refused."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["bench", "throughput", NOWHERE, "--output-json"], "result"),
        (["bench", "batching", NOWHERE, "--no-plot", "--output-json"], "result"),
        (["bench", "batching", NOWHERE, "--plot"], "picture"),
        (["bench", "serve", "--base-url", "http://127.0.0.1:1", "--save-result", "--result-dir"], "result"),
        (["calibrate", NOWHERE, "--output"], "profile"),
        (["sim", "--num-requests", "5", "--output-json"], "result"),
        (["sim", "--num-requests", "5", "--plot"], "picture"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_at_once(
    words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a-file").touch()
    place = tmp_path / "a-file" / "r.png"
    said = told([*words, str(place)], capsys)
    assert said.startswith(f"RW-CFG: The {what} cannot be written to {place}")
    assert said.endswith(f"Check {words[-1]}.")


@pytest.mark.parametrize("words", [["sim", "--num-requests", "5"], ["bench", "batching", NOWHERE]])
def test_a_picture_that_cannot_be_drawn_is_told_at_once(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("seats.abacus", "seats"):
        said = told([*words, "--plot", str(tmp_path / name)], capsys)
        assert said.startswith(f"RW-CFG: --plot is {tmp_path / name}; its name must end with one of ")
        assert ".png" in said
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    said = told([*words, "--plot", str(tmp_path / "seats.png")], capsys)
    otherwise = "leave out --plot" if words[0] == "sim" else "give --no-plot"
    assert said == f"RW-CFG: The picture needs matplotlib: pip install 'ropeway[plots]', or {otherwise}."


def test_looking_at_a_place_changes_nothing_but_makes_its_folders(tmp_path: Path) -> None:
    new, old = tmp_path / "a" / "b" / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    places = [Place(path, "--output") for path in (new, old)]
    assert (new.parent.is_dir(), new.exists(), old.read_text()) == (True, False, "kept")
    for place in places:
        place.write("written")
    assert new.read_text() == old.read_text() == "written"
    new.unlink()
    new.parent.rmdir()
    with pytest.raises(ConfigError, match="No such file or directory"):
        places[0].write("what can be written no more")
