import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffx.config import RunError, UserError
from diffx.config.train import TrainConfig
from diffx.train import checkpoint
from diffx.train.checkpoint import (
    DamagedCheckpointError,
    best,
    checkpoints,
    find_checkpoint,
    load_training_state,
    newest_intact,
    prune,
    read_state,
    save_checkpoint,
)
from diffx.train.optimizer import build_optimizer


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = build_optimizer(model, TrainConfig())
    for _ in range(3):
        model(torch.randn(4, 8)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run_dir, step, loss=None, seed=0):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").touch()
    return save_checkpoint(run_dir, step, *trained(seed), {"val_loss": loss})


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_round_trip_restores_weights_moments_and_random_state(tmp_path):
    model, optimizer = trained(0)
    folder = save_checkpoint(tmp_path, 3, model, optimizer, {"data": {"step": 3}})
    drawn = torch.rand(4)
    other, other_optimizer = trained(1)
    assert read_state(folder)["data"] == {"step": 3}
    load_training_state(folder, other, other_optimizer)
    assert torch.equal(torch.rand(4), drawn)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == other_optimizer.state[b].keys()
        assert all(
            torch.equal(optimizer.state[a][key], other_optimizer.state[b][key])
            for key in optimizer.state[a]
        )
    assert [p.suffix for p in sorted(folder.iterdir())] == [".safetensors", ".safetensors", ".json"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, name):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    (damaged / name).write_bytes(b"{") if name == "state.json" else flip_a_byte(damaged / name)
    with pytest.raises(DamagedCheckpointError, match=f"step_00000002 is damaged: {name}"):
        read_state(damaged)
    said = []
    folder, _ = newest_intact(tmp_path, said.append)
    assert folder.name == "step_00000001"
    assert "step_00000002" in said[0]


def test_a_missing_file_is_damage(tmp_path):
    folder = save(tmp_path, 1)
    (folder / "optimizer.safetensors").unlink()
    assert newest_intact(tmp_path, lambda line: None) is None


@pytest.mark.parametrize(
    "change",
    [{"step": 3}, {"data": {"step": 9}}, {"sha256": {}}, {"val_loss": 0.0}, {"checksum": "0" * 64}],
)
def test_an_altered_state_is_damage(tmp_path, change):
    folder = save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    assert read_state(folder)["step"] == 2
    (folder / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(DamagedCheckpointError, match=r"step_00000002 is damaged: state\.json"):
        read_state(folder)


def test_a_state_of_an_older_version_has_no_checksum_and_is_read(tmp_path):
    folder = save(tmp_path, 2)
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"]
    (folder / "state.json").write_text(json.dumps(state))
    assert read_state(folder) == state


@pytest.mark.parametrize(
    "file, key", [("model.safetensors", "0.weight"), ("optimizer.safetensors", "0.weight.exp_avg")]
)
@pytest.mark.parametrize("change", ["missing", "extra", "misshapen"])
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, file, key, change):
    folder = save(tmp_path, 2)
    tensors = load_file(folder / file)
    if change == "extra":
        tensors["another"] = tensors[key].clone()
    else:
        tensor = tensors.pop(key)
        if change == "misshapen":
            tensors[key] = tensor[:4].clone()
    save_file(tensors, folder / file)
    with pytest.raises(
        UserError, match=rf"{file} cannot be used: .*{'another' if change == 'extra' else key}"
    ):
        load_training_state(folder, *trained(1))


def test_a_folder_that_was_deleted_is_not_made_again(tmp_path):
    with pytest.raises(RunError, match=r"checkpoint of step 1 .*cannot be written: No such file"):
        save_checkpoint(tmp_path / "gone", 1, *trained(0), {})
    assert not (tmp_path / "gone").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError, match=r"checkpoint of step 2 .*cannot be written: No space left"):
        save(tmp_path, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert newest_intact(tmp_path, pytest.fail) is not None


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        save(tmp_path, step, loss)
    prune(tmp_path, keep_last=2, step=5)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4, 5]
    assert best(tmp_path).name == "step_00000002"


def test_prune_does_not_count_damaged_checkpoints_of_later_steps(tmp_path):
    for step in (4, 8, 12):
        save(tmp_path, step, float(step))
    for step in (8, 12):
        flip_a_byte(tmp_path / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    assert newest_intact(tmp_path, lambda line: None)[0].name == "step_00000004"
    save(tmp_path, 6, 3.0)  # the resumed run's first
    prune(tmp_path, keep_last=2, step=6)
    assert newest_intact(tmp_path, lambda line: None)[0].name == "step_00000006"
    assert [step for step, _ in checkpoints(tmp_path)] == [4, 6, 8, 12]


def test_specs_find_their_checkpoints(tmp_path):
    run = tmp_path / "x"
    for step, loss in ((10, 1.0), (20, 2.0)):
        save(run, step, loss)
    assert find_checkpoint(str(run))[1].name == "step_00000020"
    assert find_checkpoint(f"{run}@best")[1].name == "step_00000010"
    assert find_checkpoint(f"{run}@10") == (run, run / "checkpoints" / "step_00000010")
    with pytest.raises(UserError, match="accepted: best, 10, 20"):
        find_checkpoint(f"{run}@15")
    with pytest.raises(UserError, match="there is no folder"):
        find_checkpoint(str(tmp_path / "y"))
    flip_a_byte(run / "checkpoints" / "step_00000020" / "model.safetensors")
    with pytest.raises(DamagedCheckpointError):
        find_checkpoint(str(run))


def test_state_is_readable_json_without_pickles(tmp_path):
    folder = save(tmp_path, 7, 1.5)
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 7
    assert set(state["sha256"]) == {"model.safetensors", "optimizer.safetensors"}
