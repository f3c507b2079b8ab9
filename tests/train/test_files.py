"""Files that are replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastrag.train.files import replacing


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    target, link = tmp_path / "config.yaml", tmp_path / "here" / "config.yaml"
    target.write_text("old")
    link.symlink_to(Path("..", target.name))
    with replacing(link) as temporary:
        temporary.write_text("new")
        assert link.read_text() == "old"
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "here"]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "config.yaml"
    target.write_text("old")
    with pytest.raises(KeyError), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["config.yaml"]
