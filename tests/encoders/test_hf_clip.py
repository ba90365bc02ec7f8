"""CLIP by transformers: images, frames and texts, compared with the model and its own preparation."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from diffgap.data.media import Source
from tests.encoders.checkpoints import assert_same, no_network, picture, write_clip_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network"]


def save_clip(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = write_clip_tokenizer(folder)
    text = tower | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    vision = tower | {"image_size": 32, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    pil(transformers).from_dict(
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    ).save_pretrained(folder)
    return folder


def pil(package: object) -> type:
    """CLIP's image processor that works by Pillow, as the checkpoints were trained."""
    clip = transformers.models.clip
    return getattr(clip, "CLIPImageProcessorPil", None) or clip.CLIPImageProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


def original_images(folder: Path, images: list[object]) -> np.ndarray:
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    pixels = pil(transformers).from_pretrained(folder)(images, return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(**pixels)
    return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=1).numpy()


def test_images_equal_the_package(folder: Path, tmp_path: Path) -> None:
    from diffgap.encoders.hf_clip import ClipImage

    images = [picture(seed, size) for seed, size in enumerate([(40, 60), (32, 32), (90, 33)])]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    encoder = ClipImage(folder)
    rows = encoder.encode([encoder.reader(Source(path=tmp_path / f"{index}.png")) for index in range(3)])
    assert_same(rows, original_images(folder, images))
    assert np.linalg.norm(rows[0] - rows[1]) > 0.01


def test_transparency_is_laid_on_white(folder: Path) -> None:
    from PIL import Image

    from diffgap.encoders.hf_clip import ClipImage

    encoder = ClipImage(folder)
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))  # its colour is black, but nobody sees it
    white = Image.new("RGB", (40, 40), "white")
    assert_same(encoder.encode([encoder.reader.prepare(clear)]), original_images(folder, [white]))


def test_video_is_the_unit_mean_of_its_frames_or_their_sequence(folder: Path) -> None:
    from diffgap.encoders.hf_clip import ClipVideo

    videos = [[picture(seed) for seed in range(3)], [picture(9)], [picture(seed) for seed in range(40, 80)]]
    frames = [original_images(folder, video) for video in videos]
    pooled, sequence = ClipVideo(folder), ClipVideo(folder, frames="sequence", fps=2.0)
    items = [pooled.reader.prepare(video) for video in videos]
    means = np.stack([video.mean(axis=0) for video in frames])
    assert_same(pooled.encode(items), means / np.linalg.norm(means, axis=1, keepdims=True))
    rows, lengths = sequence.encode(items)
    assert rows.shape == (3, 40, 16) and lengths.tolist() == [3, 1, 40] and lengths.dtype == np.int64
    for row, video in zip(rows, frames, strict=True):
        assert_same(row[: len(video)], video)
        assert not row[len(video) :].any()
    assert sequence.sequence and not pooled.sequence
    assert sequence.fingerprint != pooled.fingerprint and sequence.space == pooled.space
    assert sequence.reader.read.fps == 2.0
    assert ClipVideo(folder, fps=2.0).fingerprint != pooled.fingerprint
    assert [part.shape for part in sequence.encode([])] == [(0, 0, 16), (0,)]


def test_texts_equal_the_package_and_do_not_depend_on_their_batch(folder: Path) -> None:
    from diffgap.encoders.hf_clip import ClipText

    texts = ["a dog", "rain", "dog " * 60, "wind in the trees"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in texts:
        with torch.no_grad():
            output = model.get_text_features(**tokenizer(text, truncation=True, max_length=77, return_tensors="pt"))
        expected.append(torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=1)[0].numpy())
    encoder = ClipText(folder)
    assert_same(encoder.encode(texts * 12), np.tile(np.stack(expected), (12, 1)))
    assert np.linalg.norm(expected[0] - expected[1]) > 0.01


def test_towers_share_a_space_and_readers_cross_processes(folder: Path) -> None:
    from diffgap.encoders.hf_clip import ClipImage, ClipText, ClipVideo

    towers = [ClipImage(folder), ClipVideo(folder), ClipText(folder)]
    assert len({tower.space for tower in towers}) == 1 and len({tower.fingerprint for tower in towers}) == 3
    reader = pickle.loads(pickle.dumps(towers[0].reader))
    np.testing.assert_array_equal(reader.prepare(picture(0)), towers[0].reader.prepare(picture(0)))


def test_a_folder_of_another_model_is_refused(folder: Path) -> None:
    from diffgap.encoders.hf_clap import ClapAudio

    with pytest.raises(ValueError, match="holds a 'clip' model, not 'clap'"):
        ClapAudio(folder)
