"""Checkpoints on disk: whole or absent, chosen by what is in them, published ones too."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sana.config import SanaConfig
from sana.models.state_dict import load_transformer_state
from sana.training import checkpoint
from sana.training.checkpoint import (
    TrainingState,
    find_checkpoint,
    read_checkpoint,
    remove_leftovers,
    retain,
    write_checkpoint,
)
from sana.training.rng import rng_state, set_rng_state
from tests.factories import write_model
from tests.training.micro import trainer


def state(step: int, epoch: int = 1) -> TrainingState:
    return TrainingState(
        step=step,
        epoch=epoch,
        weights={"w": torch.full((2, 3), float(step)), "y_embedder.y_embedding": torch.ones(2, 2)},
        ema={"w": torch.zeros(2, 3), "y_embedder.y_embedding": torch.ones(2, 2)},
        ema_updates=step,
        optimizer={"w": {"step": torch.tensor(float(step)), "exp_avg": torch.ones(2, 3), "count": step}},
        schedule_start=2,
        scaler={"scale": 1024.0},
        rng=[rng_state(), rng_state()],
        data={"batch_size": 8},
    )


def write(folder: Path, step: int, epoch: int = 1) -> Path:
    return write_checkpoint(folder, state(step, epoch), SanaConfig())


def equal(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(value, two[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def test_everything_comes_back(tmp_path):
    path = write(tmp_path, 7)
    assert path.name == "epoch_1_step_7" and (path / "config.yaml").is_file()
    assert equal(vars(read_checkpoint(path)), vars(state(7)))


def test_tensors_that_parameters_share_are_stored_for_each(tmp_path):
    table = torch.arange(4.0)  # as the optimizers of bitsandbytes do
    shared = TrainingState(step=1, epoch=1, weights={}, optimizer={"a": {"map": table}, "b": {"map": table}})
    read = read_checkpoint(write_checkpoint(tmp_path, shared, SanaConfig()))
    assert equal(read.optimizer, shared.optimizer)


def test_the_folder_is_a_model_to_generate_with(tmp_path):
    model = write_model(tmp_path / "model")
    run = trainer(model, tmp_path / "run", "--model.model=SanaMS_Tiny_P1_D8", "--train.max_steps=1")
    run.train()
    path = find_checkpoint("latest", tmp_path / "run" / "checkpoints")
    for source, network in ((path, run.transformer), (path / "ema.safetensors", run.ema.model)):
        assert equal(load_transformer_state(source), dict(network.state_dict()))


def test_latest_is_the_newest_whatever_its_name(tmp_path):
    assert find_checkpoint("latest", tmp_path / "nothing") is None
    write(tmp_path, 9, epoch=2)
    write(tmp_path, 10, epoch=10)
    assert read_checkpoint(find_checkpoint("latest", tmp_path)).step == 10
    write(tmp_path, 4, epoch=1)  # a run that went back to step 3
    assert read_checkpoint(find_checkpoint("latest", tmp_path)).step == 4
    (tmp_path / "epoch_1_step_4").rename(tmp_path / "mine")  # the step is inside
    assert read_checkpoint(find_checkpoint("latest", tmp_path)).step == 4


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json", "config.yaml"]
)
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_never_chosen(tmp_path, caplog, name, how):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    file = bad / name
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        middle = len(content) // 2
        file.write_bytes(
            content[:middle] + (b"" if how == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
    assert find_checkpoint("latest", tmp_path) == good
    assert name == "checkpoint.json" or f"skipped: the checkpoint {bad} is damaged: {name}" in caplog.text
    with pytest.raises(ValueError, match="is damaged|no training checkpoint"):
        find_checkpoint(str(bad), tmp_path)
    assert find_checkpoint("latest", tmp_path) != write(tmp_path, 3) == find_checkpoint("latest", tmp_path)
    shutil.rmtree(good), shutil.rmtree(tmp_path / "epoch_1_step_3")
    with pytest.raises(ValueError, match="none of its 1 checkpoints can be resumed from; move them away"):
        find_checkpoint("latest", tmp_path)


def test_no_changed_record_is_taken_for_another(tmp_path):
    """The step, the scale and the rest are read only as they were written."""
    path, draw = write(tmp_path, 12), random.Random(0)
    content = (path / "checkpoint.json").read_bytes()
    for _ in range(60):
        place = draw.randrange(len(content))
        changed = bytes([content[place] ^ (1 << draw.randrange(7))])
        (path / "checkpoint.json").write_bytes(content[:place] + changed + content[place + 1 :])
        try:
            found = read_checkpoint(path)
        except ValueError:
            continue
        assert equal(vars(found), vars(state(12)))


def test_a_kill_while_a_step_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch):
    """The only moment in which neither lies under its name: between the renames."""
    write(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "remove_leftovers", lambda folder: None)  # a kill runs nothing
    rename = checkpoint.os.rename

    def killed(source, target):
        if checkpoint.HIDDEN in str(source):
            raise OSError("killed")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", killed)
    with pytest.raises(OSError, match="killed"):
        write(tmp_path, 3)
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    found = find_checkpoint("latest", tmp_path)
    assert read_checkpoint(found).step == 3 and [path.name for path in tmp_path.iterdir()] == [found.name]
    assert write(tmp_path, 3).name == "epoch_1_step_3"
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1_step_3"]


def test_what_cannot_be_deleted_does_not_stop_a_save(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        write(tmp_path, step)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "rename", refused)
    retain(tmp_path, 1)
    assert "cannot delete" in caplog.text and "Permission denied" in caplog.text
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def full(*_):
        raise checkpoint.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path, 2)
    assert caught.value.errno == 28
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 3)
    write_checkpoint(
        tmp_path, TrainingState(step=3, epoch=1, weights={"w": torch.tensor([5.0])}), SanaConfig()
    )
    assert read_checkpoint(find_checkpoint("latest", tmp_path)).weights["w"].item() == 5
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1_step_3"]


def test_retention_is_by_what_is_recorded(tmp_path):
    for step, epoch in ((8, 8), (9, 9), (10, 10), (11, 10)):
        write(tmp_path, step, epoch)
    other = tmp_path / "epoch_1_step_1.pth"
    other.write_bytes(b"of another program")
    retain(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch_10_step_10",
        "epoch_10_step_11",
        other.name,
    ]


def test_leftovers_of_a_kill_are_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / f"{checkpoint.HIDDEN}abc").mkdir()
    (tmp_path / f"{checkpoint.HIDDEN}abc" / "model.safetensors").write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_1_step_1"]


def test_generators_go_on_where_they_were():
    random.gauss(0, 1), np.random.normal()  # each keeps a second value for the next call
    before = rng_state()

    def draw() -> tuple[float, ...]:
        python, array = (random.gauss(0, 1), random.random()), (np.random.normal(), np.random.rand())
        return (*python, *array, torch.rand(1).item())

    drawn = draw()
    assert draw() != drawn
    set_rng_state(before)
    assert draw() == drawn


# The reference's files


def published(path: Path, run, *, version: str, named_groups: bool) -> None:
    """Write what the reference writes: one optimizer group for each parameter, its generators' states, `pos_embed`."""
    network = run.transformer
    numbers = {name: number for number, (name, _) in enumerate(network.named_parameters())}
    optimizer = {
        "state": {numbers[n]: dict(run.optimizer.state[p]) for n, p in network.named_parameters()},
        "param_groups": [{"lr": 1.0, "params": [number]} for number in numbers.values()]
        if named_groups
        else [{"lr": 1.0, "params": list(numbers.values())}],
    }
    content = {
        "state_dict": {"pos_embed": torch.zeros(1, 4, 8)} | network.state_dict(),
        "state_dict_ema": run.ema.model.state_dict(),
        "optimizer": optimizer,
        "scheduler": {"last_epoch": 99, "base_lrs": [1.0]},
        "epoch": 2,
        "rng_state": {
            "torch": torch.get_rng_state(),
            "torch_cuda": [],
            "numpy": np.random.get_state(),
            "python": random.getstate(),
            "generator": torch.Generator().get_state(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | ({"step": run.step} if version == "new" else {}), path)


@pytest.mark.parametrize("version, named_groups", [("new", True), ("nov24", False)])
@pytest.mark.parametrize("kind", ["AdamW", "CAMEWrapper"])
def test_published_training_checkpoints_resume(tmp_path, version, named_groups, kind):
    """From `latest`, in the run's folder; the run goes on as ours would have."""
    model = write_model(tmp_path / "model")
    more = (f"--train.optimizer={{type: {kind}, lr: 1e-3}}", "--train.max_steps=4")
    run = trainer(model, tmp_path / "run", *more)
    stream = run._batches()
    for _ in range(2):
        run.train_step([next(stream)])
    folder = tmp_path / "other" / "checkpoints"
    published(folder / "epoch_10_step_2.pth", run, version=version, named_groups=named_groups)
    published(folder / "epoch_9_step_1.pth", run, version="nov24", named_groups=named_groups)
    (folder / "latest.pth").symlink_to(folder / "epoch_10_step_2.pth")
    other = trainer(model, tmp_path / "other", *more, resume="latest")
    assert other.step == 2
    again = other._batches()
    for _ in range(2):
        assert other.train_step([next(again)]).loss == run.train_step([next(stream)]).loss
    assert equal(dict(other.transformer.state_dict()), dict(run.transformer.state_dict()))
    linked = trainer(model, tmp_path / "linked", *more, resume=str(folder / "latest.pth"))
    assert linked.step == 2


def test_a_checkpoint_that_does_not_fit_is_one_clear_error(tmp_path, caplog):
    model = write_model(tmp_path / "model")
    run = trainer(model, tmp_path / "run", "--train.max_steps=1")
    run.train()
    with pytest.raises(
        ValueError, match="the checkpoint's optimizer is no CAMEWrapper: .*resume_optimizer=false"
    ):
        trainer(model, tmp_path / "run", "--train.optimizer={type: CAMEWrapper, lr: 1e-3}", resume="latest")
    more = ("--train.optimizer={type: CAMEWrapper, lr: 1e-3}", "--model.resume_from.resume_optimizer=false")
    assert trainer(model, tmp_path / "run", *more, resume="latest").step == 1
    with pytest.raises(ValueError, match="does not fit the model|not this model"):
        trainer(model, tmp_path / "run", "--model.model=SanaMS_Tiny_P1_D8", resume="latest")
    with pytest.raises(ValueError, match="no such checkpoint to resume from: nowhere.pth"):
        trainer(model, tmp_path / "run", resume="nowhere.pth")


def test_broken_pth_files_are_one_clear_error(tmp_path, caplog):
    (tmp_path / "half.pth").write_bytes(b"PK\x03\x04 not much")
    with pytest.raises(ValueError, match="cannot read the checkpoint .*half.pth"):
        find_checkpoint(str(tmp_path / "half.pth"), tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "epoch_1_step_2.pth")
    with pytest.raises(ValueError, match="it lacks optimizer; use model.load_from"):
        find_checkpoint(str(tmp_path / "epoch_1_step_2.pth"), tmp_path)
    torch.save({"state_dict": {}, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match="the step is neither in it nor in its name"):
        find_checkpoint(str(tmp_path / "mine.pth"), tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="none of its 1 checkpoints"):
        find_checkpoint("latest", tmp_path)
    assert "skipped: " in caplog.text


def test_the_record_names_every_file(tmp_path):
    path = write(tmp_path, 1)
    about = json.loads((path / "checkpoint.json").read_text())
    assert about["step"] == 1 and set(about["files"]) == {file.name for file in path.iterdir()} - {
        "checkpoint.json"
    }
