"""The search page on this machine's loopback: one HTML file, searches as JSON, and the media of the index's items.

    GET  /                          the page
    GET  /about                     what is searched, with which queries
    POST /search/text?k=10          {"text": ...}
    POST /search/<modality>?k=10    the bytes of a sound or a picture; ?name= has its file's name
    GET  /media/<row>/<modality>    the file behind an item, whole or a range of it

Listens on 127.0.0.1 alone. A browser carries requests of other sites to it all the same, so requests are refused that
another name than the server's own led to (DNS rebinding), and those that another site's page makes. Paths of files come
from the store's index and never from a request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import traceback
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from diffgap.data.media import Source
from diffgap.search.encode import QueryEncoders
from diffgap.search.index import SearchIndex
from diffgap.search.media import CONTENT_TYPES, MediaFiles
from diffgap.search.results import result_lists

#: Bytes of an uploaded file. It is held in memory.
UPLOAD_LIMIT = 32 << 20
_TEXT_LIMIT = 64 << 10
_MAX_RESULTS = 100
_BLOCK = 1 << 16


class SearchServer(ThreadingHTTPServer):
    """Serves one index; ``serve_forever()`` until interrupted. ``port`` 0 takes a free one.

    Raises:
        OSError: The port is in use, or may not be used.
    """

    daemon_threads = True

    def __init__(self, index: SearchIndex, encoders: QueryEncoders, media: MediaFiles, port: int = 0) -> None:
        self.index, self.encoders, self.media = index, encoders, media
        # Tokenizers, decoders and kernels use all cores each, and not all of them are fit for several threads.
        self._one_at_a_time = threading.Lock()
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OSError(f"port {port} cannot be served: {reason}; use another, or 0 for a free one") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"

    def about(self) -> dict[str, Any]:
        """What the page says of the index."""
        meta = self.index.meta
        usable = set(self.index.query_modalities)
        return {
            "modality": meta.modality, "count": meta.count, "kind": meta.kind, "alpha": meta.alpha,
            "bridged": self.index.bridge is not None, "upload_limit": UPLOAD_LIMIT,
            "queries": sorted(usable & set(self.encoders.specs)),
            "missing": sorted(usable & {"text", "audio", "image", "video"} - set(self.encoders.specs)),
        }  # fmt: skip

    def search(self, modality: str, source: Source, count: int) -> dict[str, Any]:
        """Result lists of a query (see :func:`result_lists`), with addresses instead of paths of the media."""
        with self._one_at_a_time:
            queries = self.index.queries(modality, *self.encoders.encode(modality, [source]))
            (lists,) = result_lists(self.index, self.media, queries, count)
        for found in lists.values():
            for item in found:
                item["media"] = {name: f"/media/{item['row']}/{name}" for name in item["media"]}
        return lists

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """A request that is answered by a status and a sentence."""

    def __init__(self, status: HTTPStatus, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


class _Handler(BaseHTTPRequestHandler):
    server: SearchServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "diffgap", ""
    timeout = 60

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they hold what was searched for."""

    def _answer(self, respond: Any) -> None:
        try:
            self._check_caller()
            respond()
        except _Refused as refused:
            self._send_json({"error": str(refused)}, refused.status, refused.headers)
        except ValueError as error:  # MediaError among them
            self._send_json({"error": " ".join(str(error).split())}, HTTPStatus.BAD_REQUEST)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            sentence = "The search failed; the terminal that serves this page says why."
            self._send_json({"error": sentence}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _check_caller(self) -> None:
        port = self.server.server_port
        names = {f"127.0.0.1:{port}", f"localhost:{port}"}
        if self.headers.get("Host", "") not in names:
            raise self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"This page is at {self.server.url} only.")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        foreign = origin is not None and origin not in {f"http://{name}" for name in names}
        if foreign or (site not in ("same-origin", "none") and urlsplit(self.path).path != "/"):
            raise self._refuse(HTTPStatus.FORBIDDEN, "Other sites' pages may not search here.")

    def _refuse(self, status: HTTPStatus, sentence: str) -> _Refused:
        """A refusal before the body was read, after which the connection is of no more use."""
        self.close_connection = True
        return _Refused(status, sentence, {"Connection": "close"})

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/":
            page, policy = _page()
            self._send(page, "text/html; charset=utf-8", headers={"Content-Security-Policy": policy})
        elif path == "/about":
            self._send_json(self.server.about())
        elif named := re.fullmatch(r"/media/([0-9]{1,18})/([a-z]{1,32})", path):
            self._send_media(int(named[1]), named[2])
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is nothing at this address.")

    def _post(self) -> None:
        address = urlsplit(self.path)
        named = re.fullmatch(r"/search/([a-z][a-z0-9_]{0,31})", address.path)
        if named is None:
            raise self._refuse(HTTPStatus.NOT_FOUND, "There is nothing at this address.")
        modality, options = named[1], parse_qs(address.query)
        body = self._body(_TEXT_LIMIT if modality == "text" else UPLOAD_LIMIT)
        if modality not in self.server.about()["queries"]:
            raise ValueError(f"This page takes no {modality} queries.")
        count = options.get("k", ["10"])[0]
        if not re.fullmatch(r"[0-9]{1,3}", count) or not 1 <= int(count) <= _MAX_RESULTS:
            raise ValueError(f"The number of results must be 1 to {_MAX_RESULTS}.")
        if modality == "text":
            source = Source(text=_text(body))
        else:
            source = Source(data=body, suffix=Path(options.get("name", [""])[0]).suffix.lower())
        self._send_json(self.server.search(modality, source, int(count)))

    def _body(self, limit: int) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise self._refuse(HTTPStatus.LENGTH_REQUIRED, "The request does not say how long it is.")
        if int(length) > limit:
            # Read on for a while, or the sender breaks off without having seen the answer.
            left = min(int(length), 4 * limit)
            while left > 0 and (block := self.rfile.read(min(left, _BLOCK))):
                left -= len(block)
            sentence = f"That is too large: {int(length) / 1e6:.0f} MB, and {limit / 1e6:.1f} MB may be sent."
            raise self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, sentence)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionResetError
        return body

    def _send_media(self, row: int, modality: str) -> None:
        path = self.server.media.find(row, modality) if row < len(self.server.index.store) else None
        if path is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "There is no such file.")
        with path.open("rb") as file:
            size = path.stat().st_size
            start, stop = self._range(size)
            headers = {
                "Accept-Ranges": "bytes",
                "Cache-Control": "private, max-age=600",  # an item stands in both columns
                # An svg can hold a script; in a sandbox it has no origin and runs nothing.
                "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:",
            }
            status = HTTPStatus.OK
            if (start, stop) != (0, size):
                status, headers["Content-Range"] = HTTPStatus.PARTIAL_CONTENT, f"bytes {start}-{stop - 1}/{size}"
            self._send_head(status, CONTENT_TYPES[path.suffix.lower()], stop - start, headers)
            file.seek(start)
            while self.command != "HEAD" and start < stop and (block := file.read(min(_BLOCK, stop - start))):
                self.wfile.write(block)
                start += len(block)

    def _range(self, size: int) -> tuple[int, int]:
        """First byte and the one after the last that are asked for; several ranges, or what is no range, ask for all.

        Raises:
            _Refused: The range lies beyond the file.
        """
        asked = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", self.headers.get("Range", ""))
        if asked is None or not (asked[1] or asked[2]):
            return 0, size
        if not asked[1]:
            start, stop = max(0, size - int(asked[2])), size
        else:
            start, stop = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
        if start >= stop:
            beyond = {"Content-Range": f"bytes */{size}"}
            raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "The file has no such part.", beyond)
        return start, stop

    def _send_json(
        self, content: Any, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
    ) -> None:
        self._send(json.dumps(content).encode(), "application/json", status, headers)

    def _send(
        self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
    ) -> None:
        self._send_head(status, kind, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, status: HTTPStatus, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        standing = {
            "Content-Type": kind, "Content-Length": str(length), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin", "X-Frame-Options": "DENY",
        }  # fmt: skip
        for name, value in {**standing, **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _text(body: bytes) -> str:
    try:
        text = json.loads(body)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("Type a few words to search for.")
    return text


@cache
def _page() -> tuple[bytes, str]:
    """The page, and the policy under which nothing runs or loads but its own parts and this server's media."""
    page = (Path(__file__).parent / "page.html").read_bytes()

    def digest(tag: bytes) -> str:
        part = re.search(b"<" + tag + b">(.*?)</" + tag + b">", page, re.DOTALL)
        assert part is not None
        return f"'sha256-{base64.b64encode(hashlib.sha256(part[1]).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {digest(b'script')}; style-src {digest(b'style')}; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy
