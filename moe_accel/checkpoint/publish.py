"""Make a new checkpoint take the place of an old one in a single step, so that a crash leaves one of the two, whole.

Weights: the new files stand in the folder under names that the old index does not use; the rename of the index (or, of
a single file, its own) is the step; then the old files go. `from_pretrained` prefers `model.safetensors` to an index,
so that one is removed last, when an index replaces it. Whole folders: written beside, then renamed.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from moe_accel.convert.target import sync

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors(?:\.index\.json)?")


def publish_weights(
    staging: Path, folder: Path, files: list[tuple[Path, list[str]]], metadata: Mapping[str, int]
) -> None:
    """Move everything from `staging` into `folder`, the weights last and at once, and remove older weights.

    Args:
        staging: folder inside `folder`; gone afterwards.
        folder: of the checkpoint.
        files: the new files of weights in `staging`, with the names in each.
        metadata: of the index.
    """
    old = [file for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name)]
    new_weights = {file for file, _ in files}
    for file in sorted(staging.iterdir()):
        if file not in new_weights:  # config.json and the like
            sync(file)
            os.replace(file, folder / file.name)
    if len(files) == 1:
        os.replace(files[0][0], folder / SINGLE)
        sync(folder)
        keep = {SINGLE}
    else:
        names = _free_names(len(files), {file.name for file in old})
        weight_map = {}
        for (file, weights), name in zip(files, names, strict=True):
            os.rename(file, folder / name)
            weight_map.update(dict.fromkeys(weights, name))
        index = staging / INDEX
        content = {"metadata": dict(metadata), "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        sync(index)
        sync(folder)
        os.replace(index, folder / INDEX)
        sync(folder)
        keep = {INDEX, *names}
    for file in sorted(old, key=lambda file: file.name != SINGLE):  # the single file first: it hides the new index
        if file.name not in keep:
            file.unlink()
    shutil.rmtree(staging)


def _free_names(count: int, taken: set[str]) -> list[str]:
    """Names as `save_pretrained` gives them; numbered on from those of the old checkpoint where they would collide."""
    first = 1
    while True:
        of = first + count - 1
        names = [f"model-{number:05d}-of-{of:05d}.safetensors" for number in range(first, first + count)]
        if not taken.intersection(names):
            return names
        first += count


def place_folder(staging: Path, folder: Path) -> None:
    """Let `staging`, a folder that is complete, become `folder`, in place of what has that name.

    Files of the old folder that the new one does not have stay. Between two renames there may be no `folder`: then
    its old self is under `old_name`, and `recover_folder` brings it back.
    """
    recover_folder(folder)
    if folder.exists():
        os.rename(folder, old_name(folder))
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
    os.rename(staging, folder)
    sync(folder.parent)
    recover_folder(folder)


def recover_folder(folder: Path) -> None:
    """Finish what a kill in `place_folder` left: give `folder` its name back, or what the new one does not have."""
    old = old_name(folder)
    if not old.is_dir():
        return
    if not folder.exists():
        os.rename(old, folder)
        return
    for each in old.iterdir():
        if not (folder / each.name).exists():
            os.rename(each, folder / each.name)
    shutil.rmtree(old)


def staging_name(folder: Path) -> Path:
    """Where a folder is written until it is whole: a name that nobody takes for a checkpoint."""
    return folder.with_name(f".{folder.name}.saving")


def old_name(folder: Path) -> Path:
    """Where the folder from before is while it is replaced."""
    return folder.with_name(f".{folder.name}.old")
