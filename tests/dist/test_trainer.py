"""Trainer on ranks trains, evaluates, resumes and saves a mixture of experts as it does on stock FSDP2."""

import shutil

import pytest

from tests.dist.parity import UPDATE_TOLERANCE, largest_error
from tests.dist.ranks import run_alone
from tests.dist.test_resume import ALONE, EP1, EP2, EP4, STOCK, TWO_RANKS, Layout
from tests.dist.trainer_runs import (
    FAMILY,
    NUM_STEPS,
    SAVE_STEPS,
    assert_same_fit,
    cached,
    different,
    failures,
    fit_on_ranks,
    weight_errors,
)
from tests.families import model_class

STOCK_ON_2, EP1_ON_2, PLAIN = Layout(2, None), Layout(2, 1), Layout(1, None, fsdp=False)
KINDS = pytest.mark.parametrize("kind", ["FULL", "SHARDED"])
CHECKPOINT = f"checkpoint-{SAVE_STEPS}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(Fit, folder with checkpoints and a final save) of a layout; each is run once."""
    run = cached(tmp_path_factory)
    return lambda layout, kind, **how: run(layout, kind, evaluate=True, **how)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(TWO_RANKS, STOCK_ON_2), slow(EP1_ON_2, STOCK_ON_2), slow(EP2, STOCK), slow(EP4, STOCK)],
    ids=str,
)
def test_losses_norms_and_weights_are_those_of_stock_fsdp2(trained, ours, stock):
    """With the aux loss, accumulation, clipping, and another number of labels in every sequence."""
    assert_same_fit(trained(ours, "FULL")[0], trained(stock, "FULL")[0])


@pytest.mark.parametrize(("ours", "stock"), [(TWO_RANKS, STOCK_ON_2), slow(EP4, STOCK)], ids=str)
def test_evaluate_and_predict_are_those_of_stock_fsdp2_on_uneven_batches(trained, ours, stock):
    (tried, _), (truth, _) = trained(ours, "FULL"), trained(stock, "FULL")
    assert tried.eval_loss == pytest.approx(truth.eval_loss, rel=UPDATE_TOLERANCE)
    assert tried.logits.shape == truth.logits.shape
    assert largest_error(tried.logits, truth.logits, truth.logits.abs().max()) < UPDATE_TOLERANCE


def test_a_config_in_training_arguments_does_the_same_as_the_environment(trained, tmp_path):
    truth, _ = trained(TWO_RANKS, "FULL")
    tried = fit_on_ranks(STOCK_ON_2, "FULL", folder=tmp_path, ep_size_argument=2)
    assert (tried.losses, tried.norms) == (truth.losses, truth.norms)
    assert not different(tried.weights, truth.weights)


@pytest.mark.parametrize(
    ("kind", "saved", "resumed"),
    [
        ("FULL", TWO_RANKS, EP1_ON_2),
        ("SHARDED", TWO_RANKS, EP1_ON_2),
        slow("SHARDED", EP1_ON_2, TWO_RANKS),
        slow("FULL", EP1_ON_2, TWO_RANKS),
        slow("FULL", EP2, EP4),
        slow("SHARDED", EP2, EP4),
        slow("SHARDED", EP4, EP1),
        slow("FULL", EP4, EP2),
        slow("FULL", STOCK, EP4),
        slow("SHARDED", EP2, STOCK),
    ],
    ids=str,
)
def test_training_resumes_at_another_ep_size(trained, tmp_path, kind, saved, resumed):
    truth, folder = trained(saved, kind)
    tried = fit_on_ranks(resumed, kind, folder=tmp_path, seed=1, resume_from=folder / CHECKPOINT)
    assert_same_fit(tried, truth, resumed=True)


@pytest.mark.slow
def test_with_dropout_every_rank_goes_on_with_its_random_state(trained, tmp_path):
    truth, folder = trained(TWO_RANKS, "SHARDED", dropout=0.3)
    how = {"folder": tmp_path / "out", "seed": 1, "dropout": 0.3}
    tried = fit_on_ranks(TWO_RANKS, "SHARDED", **how, resume_from=folder / CHECKPOINT)
    assert (tried.losses, tried.norms) == (truth.losses[SAVE_STEPS:], truth.norms[SAVE_STEPS:])
    lost = shutil.copytree(folder / CHECKPOINT, tmp_path / CHECKPOINT)
    for file in lost.glob("rng_state_*.pth"):
        file.unlink()
    without = fit_on_ranks(TWO_RANKS, "SHARDED", **how, resume_from=lost)
    assert without.losses != tried.losses, "or the losses would say nothing about the random state"


@KINDS
def test_the_final_save_loads_in_plain_transformers_with_nothing_missing(trained, kind):
    truth, folder = trained(TWO_RANKS, kind)
    info, weights = run_alone(reload, folder=folder / "final")
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert not any(info.values()), info
    assert not different(weights, truth.weights)


def before_fork(**_):
    model_class(FAMILY)


def reload(folder):
    model, info = model_class(FAMILY).from_pretrained(folder, output_loading_info=True)
    return info, model.state_dict()


BEST = {"eval_strategy": "steps", "eval_steps": SAVE_STEPS, "load_best_model_at_end": True}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("FULL", ALONE),
        ("FULL", TWO_RANKS),
        ("SHARDED", TWO_RANKS),
        slow("FULL", EP1_ON_2),
        slow("SHARDED", EP1_ON_2),
        slow("SHARDED", EP4),
    ],
    ids=str,
)
def test_the_best_model_has_its_experts_back(tmp_path, kind, layout):
    """The learning rate of the last three steps is far too high, so the best checkpoint is that before them."""
    trained = fit_on_ranks(layout, kind, folder=tmp_path, spoil_from=SAVE_STEPS, arguments=BEST)
    assert trained.best == str(tmp_path / CHECKPOINT)
    assert len(different(trained.last, trained.saved[SAVE_STEPS])) == len(trained.last), "every weight was spoilt"
    assert not different(trained.weights, trained.saved[SAVE_STEPS])


@KINDS
def test_the_best_model_may_be_the_last(tmp_path, kind):
    """Alone, Trainer notes a checkpoint of SHARDED_STATE_DICT as the best only on ranks that see its folder in time."""
    best = {**BEST, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trained = fit_on_ranks(TWO_RANKS, kind, folder=tmp_path, spoil_from=SAVE_STEPS, arguments=best)
    assert trained.best == str(tmp_path / f"checkpoint-{NUM_STEPS}")
    assert different(trained.last, trained.saved[SAVE_STEPS])
    assert not different(trained.weights, trained.last)


def test_one_process_trains_as_plain_transformers(trained):
    assert_same_fit(trained(ALONE, "FULL")[0], trained(PLAIN, "FULL")[0])


def test_one_process_resumes_with_its_experts(trained, tmp_path):
    truth, folder = trained(ALONE, "FULL")
    tried = fit_on_ranks(ALONE, "FULL", folder=tmp_path, seed=1, resume_from=folder / CHECKPOINT)
    assert (tried.losses, tried.norms) == (truth.losses[SAVE_STEPS:], truth.norms[SAVE_STEPS:])
    assert not different(tried.weights, truth.weights)


def test_one_process_of_plain_transformers_would_lose_them(trained, tmp_path):
    """So the test above is about something; when it fails, transformers no longer needs our help."""
    truth, folder = trained(PLAIN, "FULL")
    tried = fit_on_ranks(PLAIN, "FULL", folder=tmp_path, seed=1, resume_from=folder / CHECKPOINT)
    errors = weight_errors(tried.weights, truth)
    assert min(error for name, error in errors.items() if ".experts." in name) > 100 * UPDATE_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "layout", "file"),
    [
        ("FULL", ALONE, "model.safetensors"),
        ("FULL", TWO_RANKS, "pytorch_model_fsdp.bin"),
        ("FULL", TWO_RANKS, "optimizer.bin"),
        ("SHARDED", TWO_RANKS, "pytorch_model_fsdp_0/__1_0.distcp"),
        ("SHARDED", TWO_RANKS, "optimizer_0/__1_0.distcp"),
    ],
    ids=str,
)
def test_a_checkpoint_cut_short_is_named_on_all_ranks(trained, tmp_path, kind, layout, file):
    _, folder = trained(layout, kind)
    damaged = shutil.copytree(folder / CHECKPOINT, tmp_path / CHECKPOINT)
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: len(content) // 2])
    told = failures(layout, kind, folder=tmp_path / "out", resume_from=damaged)
    assert [name for name, _ in told] == ["CheckpointError"] * layout.num_ranks, told
    for _, message in told:
        assert message.startswith(f"{damaged / file} "), "the file comes first"
        assert "hint: the save was cut short or the copy is incomplete" in message
