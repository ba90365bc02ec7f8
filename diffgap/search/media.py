"""The files behind the items of an index: what a person hears and sees of a result."""

from __future__ import annotations

from pathlib import Path

from diffgap.data.store import EmbeddingStore

#: Content type by the ending of a file's name: all that is ever served, and read as a query.
CONTENT_TYPES = {
    ".flac": "audio/flac",
    ".m4a": "audio/mp4",
    ".mp3": "audio/mpeg",
    ".oga": "audio/ogg",
    ".ogg": "audio/ogg",
    ".opus": "audio/ogg",
    ".wav": "audio/wav",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
    ".mkv": "video/x-matroska",
    ".mp4": "video/mp4",
    ".webm": "video/webm",
}
#: Modality by the same.
SUFFIXES = {suffix: kind.partition("/")[0] for suffix, kind in CONTENT_TYPES.items()}


class MediaFiles:
    """The media of a store's rows, by the columns ``path_<modality>`` or ``<modality>_file`` of its index.

    The bundled stamps name their pictures in ``image_file``, and their recordings by ``id``, less the ending.

    Args:
        store: The rows.
        root: Folder that the paths start from; no file outside of it is ever found. None for no media.
        recordings: Whether ``id`` and ".ogg" name a recording.
    """

    def __init__(self, store: EmbeddingStore, root: Path | None, *, recordings: bool = False) -> None:
        self._store, self._root = store, None if root is None else root.resolve()
        self._columns: dict[str, tuple[str, str]] = {"audio": ("id", ".ogg")} if recordings else {}
        for column in store.index.column_names:
            for name in (column.removesuffix("_file"), column.removeprefix("path_")):
                if name != column and name in SUFFIXES.values():
                    self._columns[name] = (column, "")

    def find(self, row: int, modality: str) -> Path | None:
        """The file of a row, or None if there is none that is of the modality and inside of the root."""
        if self._root is None or modality not in self._columns:
            return None
        column, ending = self._columns[modality]
        value = self._store.column(column)[row]
        if not isinstance(value, str) or not value or "\0" in value:
            return None
        path = (self._root / (value + ending)).resolve()
        inside = path.is_relative_to(self._root) and SUFFIXES.get(path.suffix.lower()) == modality
        return path if inside and path.is_file() else None

    def of(self, row: int) -> dict[str, Path]:
        """All files of a row, by modality."""
        found = {modality: self.find(row, modality) for modality in sorted(self._columns)}
        return {modality: path for modality, path in found.items() if path is not None}
