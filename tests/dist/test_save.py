"""What ranks save is an ordinary Hugging Face checkpoint: plain transformers loads it in one process, complete."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from moe_accel.checkpoint.files import open_weights
from moe_accel.errors import CheckpointError
from tests.dist.ranks import run_alone, run_ranks, with_moe_config
from tests.dist.test_resume import whole
from tests.families import build_tiny, model_class, tiny_inputs, tiny_loss

FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h", "granitemoe", "qwen3_5_moe"]
GATHERED = "gathered.pt"


def before_fork(family: str, **_) -> None:
    model_class(family)


def write_source(family: str, folder: Path) -> None:
    """A checkpoint to start from, by plain transformers."""
    build_tiny(family).save_pretrained(folder)


def train_and_save(family: str, source: Path | None, folder: Path) -> dict[str, tuple[str, str]]:
    """One step on this rank, from `source` or from a config, then save in both ways; and the errors of wrong ways."""
    from accelerate import Accelerator

    from moe_accel.checkpoint import save

    save.ONE_FILE_BYTES = 0  # a tiny model is written as a large one is
    accelerator = Accelerator()
    rank = accelerator.process_index
    model = build_tiny(family, seed=7) if source is None else model_class(family).from_pretrained(source).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(tiny_loss(model, tiny_inputs(family, seed=rank)))
    optimizer.step()
    gathered = whole(model.state_dict())
    assert not [name for name in before if torch.equal(gathered[name], before[name])], "a weight that did not change"
    if rank == 0:
        torch.save(gathered, folder / GATHERED)

    unwrapped = accelerator.unwrap_model(model)
    errors = {
        "without": error_of(lambda: save_on_one_rank(unwrapped, folder / "wrong")),
        "shards": error_of(lambda: unwrapped.save_pretrained(folder / "wrong", state_dict=model.state_dict())),
        "pickle": error_of(lambda: accelerator.save_model(model, folder / "wrong", safe_serialization=False)),
        "a file": error_of(lambda: accelerator.save_model(model, __file__)),
        "file": error_of(lambda: unwrapped.save_pretrained(__file__)),
    }
    assert not (folder / "wrong").exists()
    save.ARRIVAL_S = 60

    accelerator.save_model(model, folder / "save_model", max_shard_size="50KB")
    accelerator.unwrap_model(model).save_pretrained(
        folder / "save_pretrained",
        state_dict=accelerator.get_state_dict(model),
        is_main_process=accelerator.is_main_process,
    )
    unwrapped.save_pretrained(folder / "on_all_ranks")
    weights = accelerator.get_state_dict(model)  # of rank 0; what rank 1 might write is made the last word
    if rank == 0:
        unwrapped.save_pretrained(folder / "on_every_rank", state_dict=weights, max_shard_size="50KB")
    accelerator.wait_for_everyone()
    if rank == 1:
        unwrapped.save_pretrained(folder / "on_every_rank", state_dict=weights, max_shard_size="50KB")
    return errors


def save_on_one_rank(model: PreTrainedModel, folder: Path) -> None:
    """What a script does that saves under `if accelerator.is_main_process`."""
    from moe_accel.checkpoint import save

    save.ARRIVAL_S = 0.2
    if torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    else:
        next(save._calls)
        raise CheckpointError("1 of 2 ranks called it")


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "none"


def reload(family: str, folder: Path) -> tuple[dict[str, list[str]], list[str], set[str]]:
    """In one process without moe-accel: what from_pretrained reports, weights that differ, and the names on disk."""
    assert "MOE_ACCEL_CONFIG" not in os.environ
    assert not hasattr(PreTrainedModel.save_pretrained, "__moe_accel__")
    model, info = model_class(family).from_pretrained(folder, output_loading_info=True)
    loaded, gathered = model.state_dict(), torch.load(folder.parent / GATHERED)
    assert loaded.keys() == gathered.keys()
    differing = [name for name, weight in gathered.items() if not torch.equal(loaded[name], weight)]
    return {kind: sorted(map(str, names)) for kind, names in info.items()}, differing, set(open_weights(folder) or ())


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of a family's checkpoint by plain transformers."""

    @functools.cache
    def source(family: str) -> Path:
        folder = tmp_path_factory.mktemp("source")
        run_alone(write_source, family=family, folder=folder)
        return folder

    return source


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("created", ["from_config", "from_pretrained"])
def test_saved_weights_load_in_plain_transformers_with_nothing_missing(family, created, sources, tmp_path):
    source = sources(family)
    environment = with_moe_config(ep_size=2)
    start = source if created == "from_pretrained" else None
    errors = run_ranks(train_and_save, 2, environment, family=family, source=start, folder=tmp_path)

    for of_rank in errors:
        assert "1 of 2 ranks called it" in of_rank["without"], "and it does not wait for ever"
        assert f"{__file__} is a file, a checkpoint is a folder" in of_rank["file"]
        assert re.search(r"got \d+ weights as shards, the first is \S+\.weight", of_rank["shards"])
        assert "safetensors only" in of_rank["pickle"]
        assert f"{__file__} is a file, a checkpoint is a folder" in of_rank["a file"]

    assert len(list((tmp_path / "save_model").glob("*.safetensors"))) > 1
    hub_names = set(open_weights(source))
    for way in ("save_model", "save_pretrained", "on_all_ranks", "on_every_rank"):
        info, differing, names = run_alone(reload, family=family, folder=tmp_path / way)
        assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
        assert not any(info.values()), (way, info)
        assert not differing, way
        assert names == hub_names, way


def save_tied(family: str, folder: Path) -> list[str]:
    """Save a model whose embeddings are tied, which ranks gather as two tensors; the parameters it has."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = build_tiny(family, tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters()]
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    gathered = whole(model.state_dict())
    assert torch.equal(gathered["lm_head.weight"], gathered["model.embed_tokens.weight"])
    if accelerator.is_main_process:
        torch.save(gathered, folder / GATHERED)
    accelerator.save_model(model, folder / "save_model")
    return names


def test_tied_weights_are_written_once_and_load_tied(tmp_path):
    names = run_ranks(save_tied, 2, with_moe_config(ep_size=2), family="qwen3_moe", folder=tmp_path)[0]
    assert "lm_head.weight" not in names
    info, differing, on_disk = run_alone(reload, family="qwen3_moe", folder=tmp_path / "save_model")
    assert not any(info.values()), info
    assert not differing
    assert "model.embed_tokens.weight" in on_disk
    assert "lm_head.weight" not in on_disk
