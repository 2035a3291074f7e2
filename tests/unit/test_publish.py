"""A kill at any point of replacing a checkpoint leaves the old one or the new one, whole."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_accel.checkpoint import publish
from moe_accel.checkpoint.files import open_weights
from moe_accel.checkpoint.publish import old_name, place_folder, publish_weights, recover_folder, staging_name

NAMES = [f"layers.{layer}.weight" for layer in range(6)]


class Killed(BaseException):
    """Instead of the next change to the file system."""


def make_staging(folder: Path, value: float, num_files: int) -> list[tuple[Path, list[str]]]:
    staging = folder / ".staging"
    staging.mkdir(parents=True)
    (staging / "config.json").write_text(str(value))
    files = []
    for at in range(num_files):
        file, names = staging / f"{at}-0.safetensors", NAMES[at::num_files]
        save_file({name: torch.full((2,), value) for name in names}, file)
        files.append((file, names))
    return files


def write(folder: Path, value: float, num_files: int) -> None:
    shutil.rmtree(folder / ".staging", ignore_errors=True)
    publish_weights(folder / ".staging", folder, make_staging(folder, value, num_files), {"total_size": 1})


def values(folder: Path) -> set[float]:
    """All values in the folder's weights, which are there and no others."""
    weights = open_weights(folder)
    assert weights is not None
    assert sorted(weights) == NAMES
    return {value for weight in weights.values() for value in weight[...].tolist()}


def kill_at(monkeypatch, count: int) -> None:
    """Let the change number `count` to the file system, and all after it, not happen."""
    left = [count]

    def counted(change):
        def change_or_die(*args, **kwargs):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return change(*args, **kwargs)

        return change_or_die

    for owner, name in ((os, "replace"), (os, "rename"), (Path, "unlink"), (publish.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_kill_at_any_change_leaves_one_whole_checkpoint(tmp_path, before, after):
    seen = []
    for count in range(50):
        folder = tmp_path / str(count)
        write(folder, 1.0, before)
        files = make_staging(folder, 2.0, after)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                publish_weights(folder / ".staging", folder, files, {"total_size": 1})
                done = True
            except Killed:
                done = False
        assert len(values(folder)) == 1, "never some of each"
        seen.append(values(folder).pop())
        if done:
            break
        write(folder, 3.0, after)  # the next save clears up
        assert values(folder) == {3.0}
        assert not (folder / ".staging").exists()
        assert len(list(folder.glob("*.safetensors"))) == after
    assert seen == sorted(seen), "once new, it stays new"
    assert {seen[0], seen[-1]} == {1.0, 2.0}


def test_of_the_old_files_none_is_left(tmp_path):
    for value, num_files in enumerate([4, 2, 2, 1, 3, 3]):
        write(tmp_path, float(value), num_files)
        assert values(tmp_path) == {float(value)}
        assert len(list(tmp_path.glob("*.safetensors"))) == num_files
        assert (tmp_path / "model.safetensors.index.json").exists() == (num_files > 1)
        assert (tmp_path / "config.json").read_text() == str(float(value))


def test_a_kill_while_a_folder_is_replaced_leaves_one_that_is_whole_and_loses_no_other_file(tmp_path):
    for count in range(20):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "state").write_text("old")
        (folder / "notes of the user").write_text("kept")
        staging_name(folder).mkdir()
        (staging_name(folder) / "state").write_text("new")
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                place_folder(staging_name(folder), folder)
                done = True
            except Killed:
                done = False
        recover_folder(folder)
        assert (folder / "state").read_text() in ("old", "new")
        assert (folder / "notes of the user").read_text() == "kept"
        assert not old_name(folder).exists()
        if done:
            assert (folder / "state").read_text() == "new"
            return
    pytest.fail("it never got to the end")
