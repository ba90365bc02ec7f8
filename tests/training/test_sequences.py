"""Bridges of sequences, end to end on recordings as frames: to text and back, and from frames to frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffgap import cli
from diffgap.data.stamps_frames import load_stamps_frames
from diffgap.data.store import EmbeddingStore, write_store
from diffgap.models.bridge import DiffGAP
from diffgap.models.inputs import frame_mask
from diffgap.models.linear_gaussian import LinearGaussian
from diffgap.models.settings import BridgeSettings
from diffgap.retrieval.tasks import Items, encode_pair
from diffgap.training.batches import collate, fit_data
from diffgap.training.config import RunConfig
from diffgap.training.runs import load_run
from tests.helpers import relative_l2
from tests.synthetic import make_config, with_bridge

LANGUAGES = ("audio_es", "audio_fr")


def small(path: str) -> RunConfig:
    """A run whose heads have room for what the CCA finds, and whose denoiser is tiny."""
    return with_bridge(make_config(path, steps=2, batch_size=64, eval_every=2), width=64)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: recordings and text."""
    folder = tmp_path_factory.mktemp("spoken")
    small("stamps-frames").save(folder / "run.yaml")
    cli.main(["train", str(folder / "run"), "--config", str(folder / "run.yaml")])
    return folder / "run"


@pytest.fixture(scope="module")
def languages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: the recordings of two languages, and the ``store`` they come from."""
    folder = tmp_path_factory.mktemp("languages")
    write_store(folder / "store", load_stamps_frames(by_language=True))
    small(str(folder / "store")).save(folder / "run.yaml")
    options = ["--config", str(folder / "run.yaml"), "--data.modalities", *LANGUAGES]
    cli.main(["train", str(folder / "run"), *options])
    return folder / "run"


def awake(bridge: DiffGAP) -> DiffGAP:
    """The bridge with random weights in its denoiser; a new one has closed gates, and attends to nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in bridge.diffusion.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return bridge


def recordings(run: Path, modality: str) -> tuple[DiffGAP, Tensor, Tensor]:
    """The model, and 12 recordings of the validation split with their lengths, which differ."""
    model, config = load_run(run)
    path = config.data.path
    store = (load_stamps_frames() if path == "stamps-frames" else EmbeddingStore.open(path)).split("val")
    rows = store.unique_rows(modality)[:12]
    lengths = store.lengths(modality, rows)
    assert lengths is not None and lengths.min() < lengths.max()
    return awake(model), store.embeddings(modality, rows), lengths


def poisoned(x: Tensor, lengths: Tensor, extra: int = 0) -> Tensor:
    """``x`` with ``extra`` frames of padding more, and NaN in all padding."""
    grown = torch.cat((x, x.new_zeros(len(x), extra, x.shape[2])), 1)
    return grown.masked_fill((torch.arange(grown.shape[1]) >= lengths[:, None])[..., None], torch.nan)


def test_speech_as_frames_finds_unseen_captions(spoken: Path, tmp_path: Path) -> None:
    """Two steps of training only: this is what the heads know from the CCA of the pooled frames."""
    cli.main(
        [
            "eval",
            str(spoken),
            "--split",
            "val",
            "--no-baselines",
            "--bootstrap",
            "5",
            "--output",
            str(tmp_path / "eval"),
        ]
    )
    metrics = json.loads((tmp_path / "eval" / "report.json").read_text())["metrics"]
    for scores in metrics["heads (cosine)"].values():
        # Chance is 0.08 of the captions and, with two recordings for most, 0.08 of the recordings.
        assert scores["R@5"][0] > 0.3


def test_sampling_from_recordings_to_text_and_back(spoken: Path, tmp_path: Path) -> None:
    options = ["--split", "val", "--num-samples", "2"]
    cli.main(["sample", str(spoken), "audio", "text", str(tmp_path / "text"), *options])
    cli.main(["sample", str(spoken), "text", "audio", str(tmp_path / "audio"), "--frames", "5", *options])
    val = load_stamps_frames().split("val")
    text, audio = (EmbeddingStore.open(tmp_path / name) for name in ("text", "audio"))
    assert text.embeddings("text").shape == (2 * len(val.unique_rows("audio")), 64)
    assert audio.embeddings("audio").shape == (2 * len(val.unique_rows("text")), 5, 64)
    for x in (text.embeddings("text"), audio.embeddings("audio")):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:-1]))
    assert text.column("caption")[:2].tolist() == val.column("caption")[val.unique_rows("audio")][[0, 0]].tolist()


def test_sampling_from_frames_to_frames_keeps_each_length(languages: Path, tmp_path: Path) -> None:
    cli.main(["sample", str(languages), *LANGUAGES, str(tmp_path / "fr"), "--split", "val", "--num-samples", "2"])
    cli.main(["sample", str(languages), *LANGUAGES, str(tmp_path / "short"), "--split", "val", "--frames", "3"])
    samples, short = EmbeddingStore.open(tmp_path / "fr"), EmbeddingStore.open(tmp_path / "short")
    source = load_stamps_frames(by_language=True).split("val")
    expected = source.lengths("audio_es", source.unique_rows("audio_es"))
    lengths = samples.lengths("audio_fr")
    assert lengths is not None and expected is not None
    assert lengths.tolist() == [n for n in expected.tolist() for _ in range(2)]
    here = torch.arange(16) < lengths[:, None]
    torch.testing.assert_close(samples.embeddings("audio_fr").norm(dim=-1), here.float())
    assert short.embeddings("audio_fr").shape == (len(expected), 3, 64)


def test_evaluation_bridges_to_the_typical_length_of_the_gallery(spoken: Path) -> None:
    model, x, lengths = recordings(spoken, "audio")
    texts, groups = torch.randn(3, 384), np.arange(len(x)).astype(str)
    sides = {"audio": Items(x, groups, lengths), "text": Items(texts, groups[:3])}
    found = encode_pair(model, sides, num_samples=1).encoded["text"].bridged
    typical = model.encode("text", texts, "audio", frames=int(lengths.median()), num_samples=1).bridged
    padded = model.encode("text", texts, "audio", frames=16, num_samples=1).bridged
    assert relative_l2(found, typical) < 1e-5 < relative_l2(found, padded)


@pytest.mark.parametrize("target", ["text", "audio"])
def test_a_sample_does_not_depend_on_padding_or_neighbours(spoken: Path, languages: Path, target: str) -> None:
    source, target = ("audio", "text") if target == "text" else LANGUAGES
    model, x, lengths = recordings(spoken if target == "text" else languages, source)
    whole = model.translate(target, num_samples=2, lengths=lengths, **{source: poisoned(x, lengths, 4)})
    encoded = model.encode(source, x, target, num_samples=2, lengths=lengths)
    longest = int(lengths[:5].max())
    trimmed = model.translate(target, num_samples=2, lengths=lengths[:5], **{source: x[:5, :longest]})
    own = model.encode(source, poisoned(x, lengths)[:5, :longest], target, num_samples=2, lengths=lengths[:5])
    if target == "text":
        assert relative_l2(trimmed, whole[:5]) < 1e-5
    else:
        assert relative_l2(trimmed, whole[:5, :longest]) < 1e-5
        assert not whole[:5, longest:].any()
    assert relative_l2(own.own, encoded.own[:5]) < 1e-5
    assert relative_l2(own.bridged, encoded.bridged[:5]) < 1e-5


def test_padding_reaches_neither_fit_nor_loss_nor_gradients(languages: Path) -> None:
    store = EmbeddingStore.open(languages.parent / "store").split("train").select(range(48))
    config = small("").bridge
    found = []
    for poison in (False, True):
        torch.manual_seed(0)
        bridge = DiffGAP({name: 192 for name in LANGUAGES}, config, LANGUAGES)
        fitted, batch = fit_data(store, bridge), collate(store, bridge, torch.arange(48))
        if poison:
            for arguments in (fitted, batch):
                arguments["embeddings"] = {
                    name: poisoned(x, arguments["lengths"][name] * arguments["present"][name], 3)
                    for name, x in arguments["embeddings"].items()
                }
        bridge.fit(**fitted)
        loss = awake(bridge).train()(**batch, seeds=torch.arange(48))["loss"]
        loss.backward()
        found.append([loss, *(p.grad for p in bridge.parameters() if p.grad is not None), *bridge.buffers()])
    for clean, dirty in zip(*found, strict=True):
        assert relative_l2(dirty, clean) < 1e-5


def test_the_linear_denoiser_knows_how_far_frames_spread(languages: Path) -> None:
    """Its variance of a sequence is that of a frame about the mean it expects, not that of the mean frame."""
    store = EmbeddingStore.open(languages.parent / "store").split("train")
    batch = collate(store, load_run(languages)[0], torch.from_numpy(store.present(*LANGUAGES)))
    (es, fr), (spanish, french) = ([batch[what][name] for name in LANGUAGES] for what in ("embeddings", "lengths"))
    es, fr = es[..., :8], fr[..., :8]
    masks = {index: frame_mask(lengths, 16) for index, lengths in enumerate((spanish, french))}
    fitted = LinearGaussian(2, 8)
    fitted.fit({0: es, 1: fr}, masks)
    expected = fitted.means([(es, 0, masks[0])], torch.eye(2)[:1].expand(len(es), 2))[:, 1]
    for mean, found in ((fitted.centres[1], fitted.variance[1, 0]), (expected, fitted.variance[1, 1])):
        error = [(row[:n] - m).square().mean() for row, m, n in zip(fr, mean.expand(len(fr), 8), french, strict=True)]
        assert relative_l2(found, torch.stack(error).mean()) < 1e-5


def test_rows_of_other_lengths_do_not_change_a_loss(languages: Path) -> None:
    """With the contrastive loss off, the loss of a batch is the mean over its rows, however they are put together."""
    store = EmbeddingStore.open(languages.parent / "store").split("train")
    store = store.select(store.present(*LANGUAGES)[:24])
    settings = with_bridge(small(""), contrastive="none").bridge
    torch.manual_seed(0)
    bridge = DiffGAP({name: 192 for name in LANGUAGES}, settings, LANGUAGES)
    bridge.fit(**fit_data(store, bridge))
    awake(bridge)
    seeds = torch.arange(24)

    def loss(rows: Tensor) -> Tensor:
        batch = collate(store, bridge, rows)
        longest = {name: int(lengths.max()) for name, lengths in batch["lengths"].items()}
        batch["embeddings"] = {name: x[:, : longest[name]] for name, x in batch["embeddings"].items()}
        return bridge(**batch, seeds=seeds[rows])["loss"]

    parts = torch.stack([loss(rows) for rows in torch.arange(24).split(3)])
    assert relative_l2(parts.mean(), loss(torch.arange(24))) < 1e-5


def test_a_bridge_learns_which_frame_answers_which() -> None:
    """Frame t of the target is frame t of the source, rotated: pooled or in another order, they would not tell."""
    width, generator = 8, torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    x = torch.nn.functional.normalize(torch.randn(512, 4, width, generator=generator), dim=-1)
    data, lengths = {"video": x, "audio": x @ rotation}, torch.randint(2, 5, (512,), generator=generator)
    settings = BridgeSettings(
        width=width, head="identity", head_dropout=0.0, contrastive="none", denoiser_width=32, depth=1, heads=2,
        dropout=0.0, condition_dropout=0.0, sampling_steps=4, tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    bridge = DiffGAP(dict.fromkeys(data, width), settings, tuple(data))
    bridge.fit(data, lengths=dict.fromkeys(data, lengths))
    optimizer = torch.optim.AdamW(bridge.parameter_groups(0.0), lr=1e-2)
    for step in range(250):
        rows = (torch.arange(64) + 64 * step) % 448
        batch = {name: of[rows] for name, of in data.items()}
        losses = bridge(batch, lengths=dict.fromkeys(data, lengths[rows]), seeds=torch.arange(64) + 64 * step)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    held = slice(448, None)
    here = torch.arange(4) < lengths[held, None]
    found = bridge.eval().translate("audio", video=x[held], lengths=lengths[held], num_samples=4)
    agreement = torch.einsum("bsd,btd->bst", found, data["audio"][held])
    own, next_frame = (cosine.diagonal(dim1=1, dim2=2)[here].mean() for cosine in (agreement, agreement.roll(1, 2)))
    assert own > 0.95 and next_frame < 0.3
