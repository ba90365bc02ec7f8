"""Evaluating folders of sound: pairs, broken clips, caches, conditions, and figures equal to those of the functions."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffgap.generation.metrics import (
    Conditions,
    EncoderBackbone,
    evaluate_audio,
    frechet_distance,
    inception_score,
    kernel_distance,
    kl_divergences,
    load_backbone,
)
from tests.generation.toy_backbone import RATE, Spectral, WavReader, bands, tones, write

ALL = ("inception_score", "kl_softmax", "kl_sigmoid", "frechet_distance", "kernel_distance")


def evaluate(generated, reference=None, **options):
    options = {"backbones": Spectral(), "splits": 2, "resamples": 20, "sample_rate": RATE, **options}
    return evaluate_audio(generated, reference, **options)


def conditions(names, *, space: str = "toy", seed: int = 0, width: int = 8) -> Conditions:
    rng = np.random.default_rng(seed)
    return Conditions({name: rng.uniform(size=width) for name in names}, space, "captions:v1")


class TestFigures:
    def test_are_those_of_the_functions(self, tmp_path: Path) -> None:
        made, real = tones(12, seed=0), tones(12, seed=1, low=1500)
        report = evaluate(write(tmp_path / "made", made), write(tmp_path / "real", real))
        features = [np.stack([bands(wave, 8) for wave in clips.values()]) for clips in (made, real)]
        logits = [np.stack([10 * bands(wave, 3) for wave in clips.values()]) for clips in (made, real)]
        expected = {
            "inception_score": inception_score(logits[0], splits=2).mean,
            "kl_softmax": kl_divergences(*logits).mean(),
            "kl_sigmoid": kl_divergences(*logits, form="sigmoid").mean(),
            "frechet_distance": frechet_distance(*features),
            "kernel_distance": kernel_distance(*features),
        }
        units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in features]
        cosines = units[0] @ units[1].T
        ranks = (cosines >= cosines.diagonal()[:, None]).sum(1)
        expected |= {f"recording_R@{k}": (ranks <= k).mean() for k in (1, 5, 10)}
        expected |= {"recording_MRR": (1 / ranks).mean(), "recording_cosine": cosines.diagonal().mean()}
        assert {figure.metric: figure.estimate for figure in report.figures} == pytest.approx(expected, rel=1e-6)
        for figure in report.figures:
            assert figure.low is not None and figure.high is not None
            assert figure.low < figure.high or expected[figure.metric] in (0, 1)
            assert (figure.backbone, figure.sample_rate, figure.generated, figure.resamples) == ("toy", RATE, 12, 20)
            assert figure.against == (0 if figure.metric == "inception_score" else 12)
        biased = {figure.metric for figure in report.figures if figure.bias is not None}
        assert biased == {"inception_score", "frechet_distance"}
        assert report.notes == (
            "clap_score was not computed: there are no conditions.",
            "recall was not computed: there are no conditions.",
            "label_agreement was not computed: there are no labels.",
            "mel_distance was not computed: backbone toy gives no mel.",
        )

    def test_files_waveforms_and_folders_are_one(self, tmp_path: Path) -> None:
        made, real = tones(8, seed=0), tones(8, seed=1)
        folders = write(tmp_path / "made", made), write(tmp_path / "real", real)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways = [
                evaluate(*folders),
                evaluate(made, real),
                evaluate(*([*folder.iterdir()] for folder in folders)),
                evaluate(str(folders[0]), list(folders[1].iterdir())),
            ]
        assert all(way.figures[:-1] == ways[0].figures[:-1] for way in ways[2:])
        assert [figure.estimate for figure in ways[1].figures] == [figure.estimate for figure in ways[0].figures]

    def test_without_pairs_there_are_distances_and_a_note(self) -> None:
        real = {f"real-{name}": wave for name, wave in tones(9, seed=1).items()}
        report = evaluate(tones(12, seed=0), real)
        assert [f.metric for f in report.figures] == ["inception_score", "frechet_distance", "kernel_distance"]
        assert "kl_softmax was not computed: generated and reference are not paired by name: 12 of" in report.notes[0]
        assert report.figure("frechet_distance").against == 9

    def test_frames_are_resampled_by_clip(self) -> None:
        made, real = tones(12, seed=0), tones(12, seed=1)
        report = evaluate(made, real, backbones=Spectral(frames=4), metrics=["frechet_distance", "kernel_distance"])
        frames = [
            np.stack([bands(part, 8) for wave in clips.values() for part in np.array_split(wave, 4)])
            for clips in (made, real)
        ]
        assert report.figure("frechet_distance").estimate == pytest.approx(frechet_distance(*frames), rel=1e-6)
        assert report.figure("kernel_distance").estimate == pytest.approx(kernel_distance(*frames), rel=1e-6)
        assert report.figure("frechet_distance").details["frames"] == "48 and 48"
        assert report.figure("frechet_distance").generated == 12

    def test_few_clips_have_no_interval_and_say_so(self) -> None:
        report = evaluate(tones(3, seed=0), tones(3, seed=1), splits=1)
        assert all(figure.low is None and figure.high is None for figure in report.figures)
        assert "no interval: under 4 clips" in report.markdown()
        assert "singular, 3 rows of width 8" in report.markdown()

    def test_fewer_clips_than_splits_is_noted(self) -> None:
        report = evaluate(tones(8, seed=0), tones(8, seed=1), splits=9)
        assert "inception_score was not computed: 8 clips are fewer than the 9 splits." in report.notes

    def test_two_backbones(self) -> None:
        second = Spectral("other", outputs=["features"])
        report = evaluate(tones(8, seed=0), tones(8, seed=1), backbones=[Spectral(), second])
        by_logits = {"inception_score", "kl_softmax", "kl_sigmoid"}
        first, other = ({f.metric for f in report.figures if f.backbone == name} for name in ("toy", "other"))
        assert first - other == by_logits and other < first
        assert "kl_softmax was not computed: backbone other gives no logits." in report.notes
        with pytest.raises(KeyError, match="2 figures of frechet_distance"):
            report.figure("frechet_distance")


class TestPairs:
    def test_unpaired_names_are_an_error(self) -> None:
        made, real = tones(5, seed=0), tones(5, seed=1)
        made["extra"] = real.pop("clip002")
        real["other"] = real.pop("clip004")
        with pytest.raises(
            ValueError, match=r"3 of generated are not in reference: clip002, clip004, extra; 1 of reference .*: other"
        ):
            evaluate(made, real, splits=1)
        assert evaluate(made, real, metrics=["frechet_distance"]).figures[0].against == 4
        assert len(evaluate(made, real, backbones=Spectral(outputs=["features"])).figures) == 2

    def test_wanted_without_any_pair(self) -> None:
        real = {f"real-{name}": wave for name, wave in tones(5, seed=1).items()}
        with pytest.raises(ValueError, match=r"kl_softmax cannot be computed: .*not paired by name"):
            evaluate(tones(5, seed=0), real, metrics=["kl_softmax"])

    def test_two_clips_of_one_name(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "made", tones(2, seed=0))
        (folder / "clip001.flac").write_bytes(b"another")
        with pytest.raises(ValueError, match="several clips of one name, clip001"):
            evaluate(folder)

    def test_pairs_are_by_the_path_inside_the_folder(self, tmp_path: Path) -> None:
        clips = tones(4, seed=0)
        made = {f"{kind}/{name}": wave for kind in "ab" for name, wave in clips.items()}
        write(tmp_path / "made" / "a", clips)
        write(tmp_path / "made" / "b", clips)
        report = evaluate(tmp_path / "made", made, metrics=["kl_softmax"])
        assert report.names == tuple(sorted(made))

    def test_pairs_move_together_in_the_halves(self) -> None:
        made = tones(20, seed=0)
        renamed = {f"other-{name}": wave for name, wave in made.items()}
        alike = evaluate(made, made, metrics=["frechet_distance"]).figures[0]
        apart = evaluate(made, renamed, metrics=["frechet_distance"]).figures[0]
        assert alike.estimate == apart.estimate == pytest.approx(0.0, abs=1e-9)
        assert alike.high == pytest.approx(0.0, abs=1e-9)
        assert apart.high > 1e-4


class TestBrokenClips:
    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        made, real = write(tmp_path / "made", tones(8, seed=0)), write(tmp_path / "real", tones(8, seed=1))
        write(made, {"clip001": np.zeros(800, dtype=np.float32)})
        write(made, {"clip002": np.full(800, np.nan, dtype=np.float32)})
        (made / "clip003.wav").write_bytes(b"no sound")
        (real / "clip004.wav").write_bytes(b"")
        return made, real

    def test_are_refused_and_all_named_before_much_work(self, folders: tuple[Path, Path]) -> None:
        backbone = Spectral()
        with pytest.raises(ValueError, match="4 clips cannot be evaluated") as error:
            evaluate(*folders, backbones=backbone)
        for text in (
            "generated/clip001 (silent)",
            "generated/clip002 (not finite)",
            "generated/clip003 (undecodable)",
            "reference/clip004 (empty)",
        ):
            assert text in str(error.value)
        assert backbone.heard == 0

    def test_are_listed_when_skipped_and_pairs_go_as_a_whole(self, folders: tuple[Path, Path]) -> None:
        report = evaluate(*folders, skip_broken=True)
        assert [(one.set, one.name, one.reason) for one in report.broken] == [
            ("generated", "clip001", "silent"),
            ("generated", "clip002", "not finite"),
            ("generated", "clip003", "undecodable"),
            ("reference", "clip004", "empty"),
        ]
        assert report.left_out == (
            "generated/clip004",
            "reference/clip001",
            "reference/clip002",
            "reference/clip003",
        )
        assert report.names == ("clip000", "clip005", "clip006", "clip007")
        assert all(figure.generated == 4 for figure in report.figures)
        page = report.markdown()
        assert "3 broken clips of the generated set not evaluated: clip001 (silent), clip002 (not finite)" in page
        assert "1 broken clips of the reference set not evaluated: clip004 (empty)" in page
        assert "generated/clip004, reference/clip001" in page

    def test_nothing_left(self) -> None:
        with pytest.raises(ValueError, match=r"no clip of the generated set can be evaluated: .*silent"):
            evaluate({"a": np.zeros(9, dtype=np.float32)}, skip_broken=True, splits=1)


class TestCache:
    def test_is_by_content_fingerprint_and_preparation(self, tmp_path: Path) -> None:
        made, real = tones(6, seed=0), tones(6, seed=1)
        folders = write(tmp_path / "made", made), write(tmp_path / "real", real)

        def run(**options) -> tuple[int, int, int]:
            backbone = Spectral(**options)
            report = evaluate(*folders, backbones=backbone, cache=tmp_path / "cache")
            return report.reused, report.computed, backbone.heard

        first = evaluate(*folders)
        assert (first.reused, first.computed) == (0, 12)
        assert run() == (0, 12, 12)
        assert run() == (12, 0, 0)
        assert run(version="v2") == (0, 12, 12)
        assert run(description="toy wav, louder") == (0, 12, 12)
        again = evaluate(*folders, cache=tmp_path / "cache")
        assert again.figures == first.figures
        assert "12 from the cache, 0 computed" in again.markdown()
        # The same name with another content is another clip; another name with the same content is the same.
        write(folders[0], {"clip000": tones(1, seed=7)["clip000"]})
        (folders[0] / "clip001.wav").rename(folders[0] / "renamed.wav")
        (folders[1] / "clip001.wav").rename(folders[1] / "renamed.wav")
        assert run() == (11, 1, 1)

    def test_damaged_and_foreign_files_are_refused(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "made", tones(4, seed=0))
        evaluate(folder, cache=tmp_path / "cache")
        files = sorted((tmp_path / "cache").rglob("*.safetensors"))
        assert len(files) == 4
        content = files[0].read_bytes()
        save_file(load_file(files[0]), files[0], metadata={"fingerprint": "other", "preparation": "toy wav"})
        with pytest.raises(ValueError, match="are not of toy:v1; delete the file"):
            evaluate(folder, cache=tmp_path / "cache")
        files[0].write_bytes(content[:50])
        with pytest.raises(ValueError, match="are damaged; delete the file"):
            evaluate(folder, cache=tmp_path / "cache")


class TestConditions:
    def test_clap_score_and_recall(self) -> None:
        made = tones(12, seed=0)
        features = {name: bands(wave, 8) for name, wave in made.items()}
        own = Conditions(features, "toy", "captions:v1")
        report = evaluate(made, backbones=Spectral(space="toy"), conditions=own)
        assert report.figure("clap_score").estimate == pytest.approx(1.0)
        assert report.figure("R@1").estimate == 1.0
        assert report.figure("R@1").against == 12
        names = sorted(made)
        swapped = dict(features)
        swapped[names[0]], swapped[names[1]] = features[names[1]], features[names[0]]
        report = evaluate(made, backbones=Spectral(space="toy"), conditions=Conditions(swapped, "toy", "captions:v1"))
        assert report.figure("R@1").estimate == pytest.approx(10 / 12)
        assert report.figure("R@1").values[:3] == (0.0, 0.0, 1.0)
        assert report.figure("R@10").estimate == 1.0

    def test_a_broken_clips_condition_stays_in_the_gallery(self) -> None:
        made = tones(6, seed=0)
        given = conditions(made)
        made["clip000"] = np.zeros(800, dtype=np.float32)
        report = evaluate(made, backbones=Spectral(space="toy"), conditions=given, skip_broken=True, splits=1)
        assert (report.figure("R@1").generated, report.figure("R@1").against) == (5, 6)
        pairs = [(bands(made[name], 8), given.vectors[name]) for name in sorted(made)[1:]]
        cosines = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in pairs]
        assert report.figure("clap_score").values == pytest.approx(cosines, rel=1e-6)

    def test_another_space_is_refused(self) -> None:
        made = tones(4, seed=0)
        with pytest.raises(ValueError, match=r"clap_score cannot be computed: conditions are in space clap:b.*clap:a"):
            evaluate(
                made,
                backbones=Spectral(space="clap:a"),
                conditions=conditions(made, space="clap:b"),
                metrics=["clap_score"],
            )

    def test_every_clip_needs_one(self) -> None:
        made = tones(4, seed=0)
        with pytest.raises(ValueError, match=r"each clip needs its condition: 1 of generated .*clip003"):
            evaluate(made, backbones=Spectral(space="toy"), conditions=conditions(list(made)[:3]), splits=1)

    def test_frames_have_no_cosine(self) -> None:
        made = tones(4, seed=0)
        with pytest.raises(ValueError, match="need a backbone with one vector a clip"):
            evaluate(
                made, backbones=Spectral(space="toy", frames=2), conditions=conditions(made), metrics=["clap_score"]
            )

    def test_encoded_by_a_tower(self) -> None:
        class Tower:
            modality, dim, sequence, normalized, fingerprint, space = "text", 2, False, True, "tower:1", "clap:a"

            def encode(self, batch):
                return np.array([[len(text), 1.0] for text in batch], dtype=np.float32)

        given = Conditions.encode({"a": "dog", "b": "a lion"}, Tower())  # type: ignore[arg-type]
        assert given.vectors["b"].tolist() == [6.0, 1.0]
        assert (given.space, given.source) == ("clap:a", "tower:1")
        Tower.space = ""
        with pytest.raises(ValueError, match="shares its space with no audio tower"):
            Conditions.encode({"a": "dog"}, Tower())  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("vectors", "space", "message"),
        [
            ({}, "s", "conditions are empty"),
            ({"a": np.ones(2)}, "", "need a space"),
            ({"a": np.ones(2), "b": np.ones(3)}, "s", "of one shape"),
            ({"a": np.array([1.0, np.nan])}, "s", "1 of 1 rows hold NaN"),
        ],
    )
    def test_bad_conditions(self, vectors: dict, space: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Conditions(vectors, space, "source")


class TestBackbones:
    def test_an_encoder_gives_features(self) -> None:
        class Encoder:
            modality, dim, sequence, normalized, space = "audio", 8, False, False, ""
            fingerprint, reader = "bands:v1", WavReader()

            def encode(self, batch):
                return np.stack([bands(wave, 8) for wave in batch])

        backbone = EncoderBackbone(Encoder())  # type: ignore[arg-type]
        assert (backbone.name, backbone.sample_rate, backbone.space) == ("bands", RATE, "bands:v1")
        made, real = tones(6, seed=0), tones(6, seed=1)
        ours, plain = (evaluate(made, real, backbones=one, metrics=ALL[3:]) for one in (backbone, Spectral()))
        assert [f.estimate for f in ours.figures] == [f.estimate for f in plain.figures]
        Encoder.modality = "text"
        with pytest.raises(ValueError, match="encoder embeds text"):
            EncoderBackbone(Encoder())  # type: ignore[arg-type]

    def test_an_encoder_of_sequences_gives_frames(self) -> None:
        class Encoder:
            modality, dim, sequence, normalized, space = "audio", 8, True, False, ""
            fingerprint, reader = "frames:v1", WavReader()

            def encode(self, batch):
                rows = np.zeros((len(batch), 5, 8), dtype=np.float32)
                lengths = np.arange(len(batch)) % 3 + 1
                for number, wave in enumerate(batch):
                    for frame in range(lengths[number]):
                        rows[number, frame] = bands(np.array_split(wave, lengths[number])[frame], 8)
                return rows, lengths

        report = evaluate(tones(8, seed=0), tones(8, seed=1), backbones=EncoderBackbone(Encoder()))  # type: ignore[arg-type]
        assert report.figure("frechet_distance").details["frames"] == "15 and 15"

    def test_one_of_your_own_by_name(self) -> None:
        backbone = load_backbone("tests.generation.toy_backbone:Spectral", name="mine", frames=2)
        assert (backbone.name, backbone.fingerprint) == ("mine", "mine:v1")
        for spec, message in (
            ("nothing", "or your own as package.module:Name"),
            ("tests.generation.toy_backbone:Absent", "has no class or function Absent"),
            ("tests.generation.toy_backbone:WavReader", "is no backbone: it lacks name, fingerprint"),
        ):
            with pytest.raises(ValueError, match=message):
                load_backbone(spec)
        with pytest.raises(ModuleNotFoundError):
            load_backbone("no_such_module_anywhere:Name")

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"features": np.ones(8)}, "backbone toy gave no logits of clip000"),
            ({"features": np.full(8, np.nan), "logits": np.ones(3)}, "features of clip000 that are not finite"),
            ({"features": np.ones((1, 2, 3)), "logits": np.ones(3)}, r"features of shape \(1, 2, 3\)"),
            ({"features": np.ones(8), "logits": np.ones((1, 3))}, r"logits of shape \(1, 3\)"),
        ],
    )
    def test_that_say_something_odd(self, said: dict, message: str) -> None:
        class Odd(Spectral):
            def __call__(self, waveforms):
                return [said for _ in waveforms]

        with pytest.raises(ValueError, match=message):
            evaluate(tones(4, seed=0), backbones=Odd())

    def test_widths_that_change_are_refused(self) -> None:
        class Growing(Spectral):
            def __call__(self, waveforms):
                return [{"features": np.ones(4 + i), "logits": np.ones(3)} for i, _ in enumerate(waveforms)]

        with pytest.raises(ValueError, match="toy gave features of widths 4, 5"):
            evaluate(tones(2, seed=0), tones(2, seed=1), backbones=Growing(), splits=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["fad"]}, "unknown metrics fad; there are inception_score"),
        ({"metrics": ["frechet_distance"]}, "frechet_distance cannot be computed: there is no reference"),
        ({"metrics": ["recall"]}, "recall cannot be computed: there are no conditions"),
        ({"backbones": []}, "backbones must be at least one"),
        ({"backbones": [Spectral(), Spectral()]}, "each of its own name; got toy, toy"),
        ({"backbones": Spectral(outputs=["features"])}, "nothing can be computed"),
        ({"sample_rate": None}, "generated holds waveforms; give their sample_rate"),
        ({"splits": 5, "metrics": ["inception_score"]}, "4 clips are fewer than the 5 splits"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"resamples": 1}, "resamples must be at least 2"),
        ({"confidence": 0.0}, "confidence must lie between 0 and 1"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(tones(4, seed=0), **options)


def test_bad_sets(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"generated: folder .*absent does not exist"):
        evaluate(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("no sound")
    with pytest.raises(ValueError, match="generated holds no clips"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=r"waveform a must be \(samples,\) of floats; got int16"):
        evaluate({"a": np.ones(9, dtype=np.int16)})
    with pytest.raises(TypeError, match="metrics must be a sequence of names"):
        evaluate(tones(4, seed=0), metrics="recall")
