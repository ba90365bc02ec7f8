"""Throughput of the encoders: items a second by encoder and modality, reading and embedding apart.

``python -m benchmarks.encoders [encoder ...] [--threads N] [--batch B]`` prints a table. There is no peer and no oracle
here, so this is no family of ``python -m benchmarks``. Speed does not depend on what the weights are: CLAP and CLIP
have random ones, in the sizes of the published models, and their rows say so. An item is a recording of 10 s at 48 kHz
(wav), a picture of 640 x 480 (jpeg), a video of 10 s at 320 x 240 (mp4) read at one frame a second, or a caption of 12
words.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from diffgap.data.media import Source
from diffgap.encoders import Encoder
from diffgap.encoders.registry import build_encoder

_CAPTION = "a small dog barks twice while heavy rain falls on the roofs"


def waveform(seconds: float, rate: int) -> np.ndarray:
    """(samples,) float32: a tone under noise."""
    time_ = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(time_))
    return (0.3 * np.sin(2 * np.pi * 440 * time_) + 0.05 * noise).astype(np.float32)


def media(folder: Path) -> dict[str, Source]:
    """One source of each modality, written into ``folder``."""
    import av
    import soundfile
    from PIL import Image

    soundfile.write(folder / "sound.wav", waveform(10.0, 48_000), 48_000)
    patches = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    picture = Image.fromarray(patches).resize((640, 480))
    picture.save(folder / "picture.jpg")
    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        small = picture.resize((320, 240))
        for shift in range(250):
            frame = av.VideoFrame.from_ndarray(np.roll(np.asarray(small), shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "audio": Source(path=folder / "sound.wav"),
        "image": Source(path=folder / "picture.jpg"),
        "video": Source(path=folder / "video.mp4"),
        "text": Source(text=_CAPTION),
    }


def random_clap(folder: Path) -> Path:
    """A transformers ``ClapModel`` of the default (HTSAT-tiny, RoBERTa-base) size; a word of the caption is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    ClapModel(ClapConfig()).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50).save_pretrained(folder)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *_CAPTION.split()]
    words += [f"unused{index}" for index in range(50_265 - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


def random_clip(file: Path) -> Path:
    """The weights of an open_clip ViT-B-32."""
    import open_clip

    torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), file)
    return file


def rate(call: Callable[[], object], items: int, seconds: float) -> float:
    """Items a second: ``items`` over the median time of ``call``, after one to warm up; 3 to 100 are timed."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return items / median(times)


def row(label: str, encoder: Encoder, source: Source, batch: int, seconds: float) -> str:
    """One line of the table: reading, with the encoder's preparation, and embedding ``batch`` items at a time.

    A caption that is at hand is not read.
    """
    item = encoder.reader(source)
    read = "-" if source.text is not None else f"{rate(lambda: encoder.reader(source), 1, seconds):,.1f}"
    embed = rate(lambda: encoder.encode([item] * batch), batch, seconds)
    return f"| {encoder.modality} | {label} | {encoder.dim} | {read} | {embed:,.2f} |"


def specs(folder: Path, wanted: Sequence[str]) -> list[tuple[str, str, str]]:
    """(label, modality, spec) of every encoder in ``wanted``; checkpoints are written only for those."""
    rows: list[tuple[str, str, str]] = []
    if "offline" in wanted:
        rows += [
            ("MiniLM", "text", "offline"),
            ("EfficientNet-lite0", "image", "offline"),
            ("Whisper-base", "audio", "offline"),
            ("aiSFX", "audio", "offline:aisfx"),
        ]
    if "clap" in wanted:
        spec = f"transformers:{random_clap(folder / 'clap')}"
        label = "CLAP HTSAT-tiny, random weights (transformers)"
        rows += [(label, modality, spec) for modality in ("audio", "text")]
    if "clip" in wanted:
        spec = f"open-clip:ViT-B-32:{random_clip(folder / 'clip.pt')}"
        label = "CLIP ViT-B-32, random weights (open_clip)"
        rows += [(label, modality, spec) for modality in ("image", "video", "text")]
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command line ``argv``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoders", description="Items a second by encoder.")
    kinds = ("offline", "clap", "clip")
    parser.add_argument("encoder", nargs="*", help=f"of {', '.join(kinds)}; none given: all")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="items that are embedded at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per figure (default: %(default)s)")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.encoder) - set(kinds)):
        parser.error(f"encoder: {', '.join(unknown)} does not exist; use {', '.join(kinds)}")
    if args.threads < 1 or args.batch < 1 or not args.seconds > 0:
        parser.error("--threads, --batch and --seconds must be positive")
    torch.set_num_threads(args.threads)
    print("| modality | encoder | width | read, items/s | embed, items/s |\n|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as name:
        sources = media(Path(name))
        for label, modality, spec in specs(Path(name), args.encoder or kinds):
            print(row(label, build_encoder(modality, spec), sources[modality], args.batch, args.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
