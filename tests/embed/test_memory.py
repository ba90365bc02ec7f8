"""Memory does not grow with the embeddings: only with what is known of an item, some hundred bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RUN = """
import resource, sys
from pathlib import Path
from diffgap.data.items import Item
from diffgap.data.media import Source
from diffgap.embed import embed_items
from tests.embed.fakes import HashEncoder

class Many:
    description, notes = "many", []

    def __len__(self):
        return COUNT

    def __iter__(self):
        for n in range(COUNT):
            media = {"text": Source(text=f"caption {n}"), "audio": Source(text=f"sound {n}")}
            yield Item(f"i{n}", f"g{n}", "train", media)

COUNT, output = int(sys.argv[1]), Path(sys.argv[2])
encoders = {name: HashEncoder(name, dim=DIM) for name in ("audio", "text")}
embed_items(Many(), encoders, output, workers=0, batch_size=64, chunk=500)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
DIM = 768


def peak(count: int, output: Path) -> int:
    """Bytes of memory at most."""
    program = RUN.replace("DIM)", f"{DIM})")
    done = subprocess.run(
        [sys.executable, "-c", program, str(count), str(output)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return int(done.stdout)


def test_memory_is_flat(tmp_path: Path) -> None:
    few, many = peak(2_000, tmp_path / "few"), peak(20_000, tmp_path / "many")
    embeddings = 18_000 * 2 * DIM * 4
    assert (tmp_path / "many" / "audio.safetensors").stat().st_size > 20_000 * DIM * 4
    # Reading a part maps its file, and mapped pages count until the map is gone: two parts of one modality.
    assert many - few < embeddings / 4
