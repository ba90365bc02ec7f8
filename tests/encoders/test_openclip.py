"""open_clip: a small architecture of its own kind, loaded from files and by tag, and compared with the package."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffgap.data.media import Source
from diffgap.encoders.openclip import OpenClipImage, OpenClipText, OpenClipVideo
from tests.encoders.checkpoints import assert_same, no_network, picture

open_clip = pytest.importorskip("open_clip")

pytestmark = pytest.mark.usefixtures("no_network")
__all__ = ["no_network"]

NAME = "tiny-for-tests"
TOWER = {"width": 32, "layers": 2}
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": TOWER | {"image_size": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": TOWER | {"context_length": 77, "vocab_size": 49408, "heads": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in the published layouts: safetensors, a plain state dict, and a training checkpoint."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("openclip")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    state = open_clip.create_model(NAME, pretrained=None).state_dict()
    files = {kind: folder / f"{kind}.pt" for kind in ("plain", "training")} | {"safe": folder / "weights.safetensors"}
    torch.save(state, files["plain"])
    torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, files["training"])
    save_file({key: value.contiguous() for key, value in state.items()}, files["safe"])
    return files


@pytest.fixture
def tags(files: dict[str, Path]) -> Iterator[dict[str, dict[str, Any]]]:
    """Published tags of the architecture; whoever adds one gives it a local file."""
    from open_clip import pretrained

    published: dict[str, dict[str, Any]] = {}
    pretrained._PRETRAINED[NAME] = published
    yield published
    del pretrained._PRETRAINED[NAME]


def original(file: Path, **options: Any) -> tuple[Any, Any]:
    model, _, prepare = open_clip.create_model_and_transforms(NAME, pretrained=str(file), **options)
    return model.eval(), prepare


@torch.no_grad()
def original_images(file: Path, images: list[Any], **options: Any) -> np.ndarray:
    model, prepare = original(file, **options)
    return model.encode_image(torch.stack([prepare(image) for image in images]), normalize=True).numpy()


@pytest.mark.parametrize("layout", ["plain", "training", "safe"])
def test_every_layout_gives_the_packages_images_and_texts(files: dict[str, Path], layout: str, tmp_path: Path) -> None:
    images = [picture(seed, size) for seed, size in enumerate([(40, 60), (32, 32), (90, 33)])]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    encoder = OpenClipImage(NAME, files[layout])
    rows = encoder.encode([encoder.reader(Source(path=tmp_path / f"{index}.png")) for index in range(3)])
    assert_same(rows, original_images(files["plain"], images))
    assert np.linalg.norm(rows[0] - rows[1]) > 0.01

    texts = ["a dog barks", "rain", "dog " * 100] * 15
    model, _ = original(files["plain"])
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(NAME)(texts[:3]), normalize=True).numpy()
    assert_same(OpenClipText(NAME, files[layout]).encode(texts), np.tile(expected, (15, 1)))
    assert np.linalg.norm(expected[0] - expected[1]) > 0.01


def test_video_is_the_unit_mean_of_its_frames_or_their_sequence(files: dict[str, Path]) -> None:
    videos = [[picture(seed) for seed in range(3)], [picture(9)]]
    frames = [original_images(files["safe"], video) for video in videos]
    pooled = OpenClipVideo(NAME, files["safe"])
    sequence = OpenClipVideo(NAME, files["safe"], frames="sequence", max_frames=5)
    items = [pooled.reader.prepare(video) for video in videos]
    means = np.stack([video.mean(axis=0) for video in frames])
    assert_same(pooled.encode(items), means / np.linalg.norm(means, axis=1, keepdims=True))
    rows, lengths = sequence.encode(items)
    assert lengths.tolist() == [3, 1] and not rows[1, 1:].any()
    assert_same(rows[0], frames[0])
    assert sequence.reader.read.max_frames == 5 and sequence.fingerprint != pooled.fingerprint


def test_one_file_is_one_space_wherever_it_lies(files: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "renamed.pt"
    copy.write_bytes(files["plain"].read_bytes())
    image, text, moved = (
        OpenClipImage(NAME, files["plain"]),
        OpenClipText(NAME, files["plain"]),
        OpenClipImage(NAME, copy),
    )
    assert image.space == text.space == moved.space and image.space.startswith("clip:")
    assert image.fingerprint == moved.fingerprint != text.fingerprint
    reader = pickle.loads(pickle.dumps(image.reader))
    np.testing.assert_array_equal(reader.prepare(picture(0)), image.reader.prepare(picture(0)))


def test_a_tag_brings_its_own_preparation_and_activation(
    files: dict[str, Path], tags: dict[str, dict[str, Any]]
) -> None:
    squash = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tags["siglike"] = squash | {"file": str(files["safe"]), "quick_gelu": True}
    images = [picture(0, (60, 33))]
    forced = {f"image_{key}": value for key, value in squash.items()} | {"force_quick_gelu": True}
    expected = original_images(files["safe"], images, **forced)
    assert np.linalg.norm(expected - original_images(files["safe"], images)) > 0.01
    tagged = OpenClipImage(NAME, "siglike")
    assert_same(tagged.encode([tagged.reader.prepare(images[0])]), expected)
    alike = OpenClipImage(NAME, files["plain"], like="siglike")
    assert_same(alike.encode([alike.reader.prepare(images[0])]), expected)


def test_a_file_is_prepared_as_the_tags_agree_or_must_say_which_it_is(
    files: dict[str, Path], tags: dict[str, dict[str, Any]]
) -> None:
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    tags["one"] = tags["two"] = half
    image = picture(0)
    agreed = OpenClipImage(NAME, files["safe"])
    expected = original_images(files["safe"], [image], image_mean=half["mean"], image_std=half["std"])
    assert_same(agreed.encode([agreed.reader.prepare(image)]), expected)
    tags["three"] = half | {"mean": (0.4,) * 3}
    with pytest.raises(ValueError, match=r"\?like=TAG, one of one, two, three"):
        OpenClipImage(NAME, files["safe"])
    assert OpenClipImage(NAME, files["safe"], like="two").fingerprint == agreed.fingerprint
    with pytest.raises(ValueError, match="tag 'four' of tiny-for-tests is unknown"):
        OpenClipImage(NAME, files["safe"], like="four")


def test_without_weights_there_is_no_encoder(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No pretrained weights"):
        OpenClipImage(NAME, "")
    with pytest.raises(ValueError, match=r"pretrained .*absent.pt' \(no such file\).* is unknown"):
        OpenClipText(NAME, tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="no architecture 'ViT-nonsense'"):
        OpenClipImage("ViT-nonsense", files["plain"])
    state = torch.load(files["plain"], weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "visual.proj"}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part\.pt does not hold the weights of tiny-for-tests"):
        OpenClipImage(NAME, tmp_path / "part.pt")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, files: dict[str, Path]) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt does not hold the weights"):
        OpenClipImage(NAME, tmp_path / "code.pt")
    assert not (tmp_path / "ran").exists()
