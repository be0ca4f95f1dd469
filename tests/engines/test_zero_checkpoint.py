"""DeepSpeed's checkpoint files: what it writes is read back, and nothing else is."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from hybrid_opt.errors import UserError

pytest.importorskip("deepspeed")

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from hybrid_opt.engines.zero_checkpoint import TensorsOnly, load
from tests.test_foreign_code import Evil

SCALER = DynamicLossScaler(8.0, 7, 1.0, 1, False, dtype=torch.float16)
STATE = {
    "module": {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer_state_dict": {"loss_scaler": SCALER, "zero_stage": ZeroStageEnum(2), "slices": [fragment_address(3, 4)]},
    "shapes": [{"weight": torch.Size([2, 3])}],
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TorchCheckpointEngine().save(STATE, str(tmp_path / "optim_states.pt"))
    return tmp_path / "optim_states.pt"


def test_what_deepspeed_writes_is_read(file):
    found = TensorsOnly().load(str(file), map_location="cpu")
    assert torch.equal(found["module"]["weight"], STATE["module"]["weight"])
    assert torch.equal(found["module"]["half"], STATE["module"]["half"])
    optimizer = found["optimizer_state_dict"]
    assert vars(optimizer["loss_scaler"]) == vars(SCALER)
    assert (optimizer["zero_stage"], optimizer["slices"]) == (ZeroStageEnum(2), [fragment_address(3, 4)])
    assert found["shapes"] == STATE["shapes"]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("whole", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(file, whole):
    if whole == "pickle":
        file.write_bytes(pickle.dumps({**STATE, "module": Evil()}))
    else:
        torch.save({**STATE, "module": Evil()}, file, _use_new_zipfile_serialization=whole == "zip")
    with pytest.raises(UserError, match=r"optim_states\.pt: the checkpoint cannot be read: "):
        TensorsOnly().load(str(file))
    assert not file.with_name("ran").exists()
    if whole == "zip":
        TorchCheckpointEngine().load(str(file))  # what would happen otherwise
        assert file.with_name("ran").exists()


def test_damaged_files_are_named(file):
    content = file.read_bytes()
    for cut in range(0, len(content), len(content) // 20):
        file.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"optim_states\.pt: the checkpoint cannot be read: "):
            TensorsOnly().load(str(file))


class DeepSpeedEngine(SimpleNamespace):
    """As far as loading goes: it reads a file, by whatever engine it has for that."""

    checkpoint_engine = TorchCheckpointEngine()
    _config = SimpleNamespace(checkpoint_config={"checkpoint_serialization": True})

    def load_checkpoint(self, folder, tag):
        return self.answer(self.checkpoint_engine.load(f"{folder}/optim_states.pt"))


def test_deepspeeds_own_reader_is_replaced(file):
    torch.save(Evil(), file)
    with pytest.raises(UserError, match=r"optim_states\.pt: the checkpoint cannot be read: "):
        load(DeepSpeedEngine(answer=lambda found: ("path", {})), file.parent)
    assert not file.with_name("ran").exists()


def test_what_deepspeed_finds_wrong_is_named(file):
    def fails(found):
        raise AssertionError("the checkpoint is of 4 ranks")

    with pytest.raises(UserError, match=r"deepspeed: the checkpoint cannot be read: the checkpoint is of 4 ranks"):
        load(DeepSpeedEngine(answer=fails), file.parent)
    with pytest.raises(UserError, match=r"deepspeed: the checkpoint cannot be read: its files are missing"):
        load(DeepSpeedEngine(answer=lambda found: (None, None)), file.parent)
    load(DeepSpeedEngine(answer=lambda found: ("path", {})), file.parent)
