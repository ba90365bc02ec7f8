"""``diffgap import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from diffgap.commands.arguments import Output, Seed
from diffgap.commands.console import open_console

__all__ = ["import_embeddings"]


def import_embeddings(
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    output: Output,
    layout: Literal["npy", "clip-retrieval"] = "npy",
    csv: Path | None = None,
    id: str | None = None,
    group: str | None = None,
    split: str | None = None,
    fractions: tuple[float, float, float] | None = None,
    split_seed: Seed = 0,
    dtype: Literal["float32", "float16", "int8"] | None = None,
    overwrite: bool = False,
) -> None:
    """Turn embeddings you already have into an embedding store.

    Args:
        source: Folder to read: `npy` is one <modality>.npy each and a .csv, `clip-retrieval` its output folder.
        output: Folder of the new store.
        layout: How the source is laid out.
        csv: The .csv of the `npy` layout, one line a row; the one beside the .npy files by default.
        id: Column of unique names; "id" if there is one, else the row number.
        group: Column whose equal values mark rows that match one another (several captions of one clip); "group" if
            there is one, else every row by itself.
        split: Column of train, val and test; "split" if there is one.
        fractions: Shares of train, val and test, by a hash of the group, instead of a column; 0.8 0.1 0.1 if there is
            neither.
        split_seed: Seed of that hash.
        dtype: Number format of the store; float16 stays float16 and all else becomes float32 by default.
        overwrite: Replace an existing output.
    """
    from diffgap.data.importers import import_clip_retrieval, import_npy

    if split is not None and fractions is not None:
        raise ValueError("split and fractions were both given; name a column or give shares")
    options: dict[str, Any] = {
        "id": id, "group": group, "split": split if fractions is None else fractions,
        "split_seed": split_seed, "dtype": dtype, "overwrite": overwrite,
    }  # fmt: skip
    if layout == "npy":
        store = import_npy(source, output, csv=csv, **options)
    elif csv is not None:
        raise ValueError("csv belongs to layout 'npy'; the clip-retrieval layout has its own metadata")
    else:
        store = import_clip_retrieval(source, output, **options)
    open_console().print(f"{store} in {output}", markup=False)
