"""Search over the gallery of an embedding store: :func:`build_index`, :class:`SearchIndex`, and a page to use them."""

from __future__ import annotations

from diffgap.search.index import Found, Queries, SearchIndex, build_index

__all__ = ["Found", "Queries", "SearchIndex", "build_index"]
