"""LAION's CLAP: HTSAT-tiny with random weights in the published layouts, compared with the package itself."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from diffgap.data.media import Source
from diffgap.encoders import laionclap
from diffgap.encoders.laionclap import TOKENIZER_VARIABLE, LaionClapAudio, LaionClapText
from tests.encoders.checkpoints import assert_same, no_network, waveform, write_roberta_tokenizer, write_wav

for needed in ("laion_clap", "torchlibrosa", "librosa", "h5py", "pandas", "webdataset", "wget", "ftfy", "torchvision"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network"]

TOKENS = 50_265
ROWS = 1_000  # of the text tower's table; the tests' captions use the first few hundred tokens
needs_torchaudio = pytest.mark.skipif(
    importlib.util.find_spec("torchaudio") is None, reason="torchaudio is not installed; the package's fusion needs it"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("roberta-base")
    write_roberta_tokenizer(folder, TOKENS)
    return folder


@pytest.fixture(scope="session")
def original(tokenizer: Path) -> Callable[[bool], Any]:
    """The package's own module, fused or not, with random weights and a text tower of one layer."""
    modules: dict[bool, Any] = {}

    def build(fused: bool) -> Any:
        if fused not in modules:
            package = laionclap._import_package()
            from clap_module import model
            from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

            torch.manual_seed(0)
            roberta = RobertaModel(
                RobertaConfig(
                    vocab_size=ROWS,
                    num_hidden_layers=1,
                    max_position_embeddings=514,
                    type_vocab_size=1,
                    layer_norm_eps=1e-5,
                )
            )
            words = RobertaTokenizer.from_pretrained(str(tokenizer))
            with (
                mock.patch.object(model.RobertaModel, "from_pretrained", return_value=roberta),
                mock.patch.object(package.hook.RobertaTokenizer, "from_pretrained", return_value=words),
            ):
                modules[fused] = package.CLAP_Module(enable_fusion=fused, device="cpu").eval()
            with torch.no_grad():  # the default initialisation makes every recording nearly the same vector
                for parameter in modules[fused].model.audio_branch.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        return modules[fused]

    return build


@pytest.fixture(scope="session")
def checkpoint(original: Callable[[bool], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As published: "module." before every name, position_ids, and numpy scalars of the training beside the weights."""
    state = {f"module.{key}": value for key, value in original(False).model.state_dict().items()}
    state["module.text_branch.embeddings.position_ids"] = torch.arange(514)[None]
    file = tmp_path_factory.mktemp("laion") / "630k-audioset-best.pt"
    torch.save({"epoch": 15, "name": "run", "best": np.float64(0.9), "seen": np.int64(7), "state_dict": state}, file)
    return file


def test_audio_equals_the_package(original: Callable[[bool], Any], checkpoint: Path, tmp_path: Path) -> None:
    files = [write_wav(tmp_path / f"{s}.wav", 1.5 * waveform(s, seed=round(s))) for s in (0.7, 4.0, 10.0)]
    encoder = LaionClapAudio(checkpoint)
    items = [encoder.reader(Source(path=file)) for file in files]
    rows = encoder.encode(items)
    assert_same(rows, original(False).get_audio_embedding_from_filelist([str(file) for file in files]))
    assert np.linalg.norm(rows[0] - rows[1]) > 0.01, "the recordings must not all look the same to the model"
    assert_same(rows, np.concatenate([encoder.encode([item]) for item in items]))
    assert encoder.encode([]).shape == (0, 512)


def test_long_recordings_are_the_unit_mean_of_their_windows(
    original: Callable[[bool], Any], checkpoint: Path, tmp_path: Path
) -> None:
    wave = waveform(13.0)
    encoder = LaionClapAudio(checkpoint)
    row = encoder.encode([encoder.reader(Source(path=write_wav(tmp_path / "long.wav", wave)))])
    windows = original(False).get_audio_embedding_from_data([wave[:480_000], wave[-480_000:]])
    mean = windows.mean(axis=0)
    assert_same(row, (mean / np.linalg.norm(mean))[None])


@needs_torchaudio
def test_fused_audio_equals_the_package_with_middle_crops(
    original: Callable[[bool], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.random, "choice", lambda third: third[len(third) // 2])
    state = {f"module.{key}": value for key, value in original(True).model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "630k-audioset-fusion-best.pt")
    encoder = LaionClapAudio(tmp_path / "630k-audioset-fusion-best.pt")
    # 10.005 s has more samples than the model takes, but not more frames.
    seconds = (2.0, 10.0, 10.005, 10.02, 21.0)
    files = [write_wav(tmp_path / f"{s}.wav", waveform(s, seed=round(s))) for s in seconds]
    rows = encoder.encode([encoder.reader(Source(path=file)) for file in files])
    assert_same(rows, original(True).get_audio_embedding_from_filelist([str(file) for file in files]))


def test_texts_equal_the_package(original: Callable[[bool], Any], checkpoint: Path, tokenizer: Path) -> None:
    texts = ["a dog barks", "rain", "dog " * 100, "wind in the trees"]
    encoder = LaionClapText(checkpoint, tokenizer=tokenizer)
    assert_same(encoder.encode(texts * 10), np.tile(original(False).get_text_embedding(texts), (10, 1)))
    rows = encoder.encode(texts)
    assert np.linalg.norm(rows[0] - rows[1]) > 0.01
    audio = LaionClapAudio(checkpoint)
    assert audio.space == encoder.space and audio.space.startswith("clap:") and audio.fingerprint != encoder.fingerprint


def test_every_layout_of_a_checkpoint_loads(original: Callable[[bool], Any], checkpoint: Path, tmp_path: Path) -> None:
    expected = original(False).model.state_dict()
    torch.save(expected, tmp_path / "plain.pt")
    torch.save({"state_dict": expected}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for file in (checkpoint, tmp_path / "plain.pt", tmp_path / "old.pt"):
        found = laionclap.read_checkpoint(file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize("name", ["HTSAT-tiny-win-1536", "HTSAT-base"])
def test_architecture_and_fusion_are_read_off_the_weights(name: str) -> None:
    laionclap._import_package()
    from clap_module import factory, htsat
    from clap_module.model import CLAPAudioCfp

    config = CLAPAudioCfp(**factory._MODEL_CONFIGS[name]["audio_cfg"])
    text = {
        f"text_branch.embeddings.{key}.weight": torch.empty(1) for key in ("word_embeddings", "position_embeddings")
    }
    for fused in (False, True):
        with mock.patch.object(htsat, "trunc_normal_", lambda tensor, std: tensor):
            branch = htsat.create_htsat_model(config, fused, "aff_2d" if fused else "None")
        weights = text | {f"audio_branch.{key}": value for key, value in branch.state_dict().items()}
        assert laionclap.architecture(weights, Path("checkpoint.pt")) == (name, fused)


def test_what_is_not_such_a_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pt does not exist"):
        LaionClapAudio(tmp_path / "absent.pt")
    torch.save({"state_dict": {"module.conv.weight": torch.ones(3)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is not a CLAP checkpoint of HTSAT and RoBERTa"):
        LaionClapAudio(tmp_path / "other.pt")
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds no state_dict"):
        LaionClapAudio(tmp_path / "list.pt")
    state = laionclap.read_checkpoint(checkpoint)
    del state["audio_projection.0.bias"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(
        ValueError, match=r"part\.pt does not hold the weights of HTSAT-tiny.*audio_projection\.0\.bias"
    ):
        LaionClapAudio(tmp_path / "part.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "args": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="not run as code"):
        LaionClapAudio(tmp_path / "code.pt")
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_of_five_tokens_is_refused_with_the_fix(
    checkpoint: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKENIZER_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"tokenizer.*roberta-base.*\?tokenizer=/path/to/roberta-base"):
        LaionClapText(checkpoint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=TOKENIZER_VARIABLE):
        LaionClapText(checkpoint, tokenizer=tmp_path / "empty")
    with pytest.raises(ValueError, match="absent does not exist"):
        LaionClapText(checkpoint, tokenizer=tmp_path / "absent")
    write_roberta_tokenizer(tmp_path / "small", 300)
    with pytest.raises(ValueError, match="has 300 tokens, its text tower has 50,265"):
        LaionClapText(checkpoint, tokenizer=tmp_path / "small")
    monkeypatch.setenv(TOKENIZER_VARIABLE, str(tokenizer))
    assert LaionClapText(checkpoint).encode(["rain"]).shape == (1, 512)


SCRIPT = """
import os, socket, sys
def refuse(*arguments):
    os._exit(3)
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import huggingface_hub
from diffgap.encoders.laionclap import _import_package
path = list(sys.path)
sys.modules["h5py"] = None
try:
    _import_package()
except ModuleNotFoundError as error:
    assert "laion-clap needs h5py; run: pip install --no-deps laion-clap" in str(error), error
else:
    raise AssertionError("h5py was not asked for")
del sys.modules["h5py"]
_import_package()
assert sys.path == path and "training" not in sys.modules
assert "HF_HUB_OFFLINE" not in os.environ and not huggingface_hub.constants.HF_HUB_OFFLINE
"""


def test_the_import_asks_for_nothing_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what is imported once is never imported again."""
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode} (3: the network was tried): {done.stderr[-2000:]}"
