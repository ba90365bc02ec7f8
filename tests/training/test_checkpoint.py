from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffgap.training import checkpoint


def make(width: int = 4) -> tuple[nn.Module, AveragedModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return model, AveragedModel(model), optimizer


def test_round_trip_restores_every_tensor(tmp_path: Path) -> None:
    model, ema, optimizer = make()
    path = checkpoint.save(tmp_path, 7, model=model, ema=ema, optimizer=optimizer, state={"best_score": 0.5})
    other = nn.Linear(3, 4)
    other_ema, other_optimizer = AveragedModel(other), torch.optim.AdamW(other.parameters(), lr=0.1)
    state = checkpoint.load(path, model=other, ema=other_ema, optimizer=other_optimizer)
    assert state == {"step": 7, "best_score": 0.5}
    for saved, loaded in ((model, other), (ema, other_ema)):
        for name, tensor in saved.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
    for index, entry in optimizer.state_dict()["state"].items():
        for name, tensor in entry.items():
            assert torch.equal(other_optimizer.state_dict()["state"][index][name], tensor)


def test_keeps_the_newest(tmp_path: Path) -> None:
    model, ema, optimizer = make()
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, model=model, ema=ema, optimizer=optimizer, state={}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000010"]
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.name == "step-00000010"
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_truncated_file_is_one_clear_error(tmp_path: Path) -> None:
    model, ema, optimizer = make()
    path = checkpoint.save(tmp_path, 1, model=model, ema=ema, optimizer=optimizer, state={})
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cannot be restored .* delete that folder"):
        checkpoint.load(path, model=model, ema=ema, optimizer=optimizer)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    model, ema, optimizer = make()
    path = checkpoint.save(tmp_path, 1, model=model, ema=ema, optimizer=optimizer, state={})
    model, ema, optimizer = make(width=5)
    with pytest.raises(ValueError, match="size mismatch"):
        checkpoint.load(path, model=model, ema=ema, optimizer=optimizer)


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model, ema, optimizer = make()
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, model=model, ema=ema, optimizer=optimizer, state={"bad": object()})
    assert list(tmp_path.iterdir()) == []
