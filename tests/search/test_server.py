"""The loopback server: what it answers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffgap.data.store import EmbeddingStore, write_store
from diffgap.search import server as server_module
from diffgap.search.index import SearchIndex, build_index
from diffgap.search.media import MediaFiles
from diffgap.search.server import SearchServer
from tests.search.conftest import Workshop, serving, write_png, write_tone


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: SearchServer, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())
    finally:
        connection.close()


def text(words: str) -> bytes:
    return json.dumps({"text": words}).encode()


@pytest.fixture(scope="module")
def server(workshop: Workshop) -> Iterator[SearchServer]:
    with serving(workshop) as found:
        yield found


def test_listens_on_the_loopback_alone(server: SearchServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"


def test_the_page_is_one_file_under_a_policy(server: SearchServer) -> None:
    page = ask(server, "GET", "/")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy
    assert b"http:" not in page.body and b"https:" not in page.body  # nothing comes from elsewhere
    assert b"src=" not in page.body.partition(b"<script>")[0]


def test_about(server: SearchServer) -> None:
    about = ask(server, "GET", "/about").json
    expected = {"modality": "audio", "count": 72, "kind": "exact", "alpha": 0.5, "bridged": True, "missing": []}
    assert about == {**expected, "queries": ["audio", "image", "text"], "upload_limit": 32 << 20}


def test_a_text_is_searched_before_and_after_bridging(server: SearchServer) -> None:
    found = ask(server, "POST", "/search/text?k=7", text("a dog barks")).json
    index = server.index
    vectors, lengths = server.encoders.encode("text", [server_module.Source(text="a dog barks")])
    queries = index.queries("text", vectors, lengths)
    for name, given in (("before", queries.plain), ("after", queries.fused)):
        assert given is not None
        expected = index.search(given, 7)
        assert [item["row"] for item in found[name]] == expected.rows[0].tolist()
        assert [item["score"] for item in found[name]] == pytest.approx(expected.scores[0].tolist())
    first = found["before"][0]
    row = first["row"]
    assert first["id"] == f"clip{row:02}" and first["caption"] == f"sound <b>number</b> {row} & more"
    expected_media = {"audio": row < 40, "image": row % 5 != 0}
    assert first["media"] == {name: f"/media/{row}/{name}" for name, here in expected_media.items() if here}


def test_files_are_searched(server: SearchServer, workshop: Workshop) -> None:
    sound = (workshop.media / "sounds/03.wav").read_bytes()
    found = ask(server, "POST", "/search/audio?k=3&name=a%20sound.wav", sound).json
    assert found.keys() == {"before"} and len(found["before"]) == 3
    picture = (workshop.media / "03.png").read_bytes()
    found = ask(server, "POST", "/search/image?k=3&name=p.png", picture).json
    assert found.keys() == {"before", "after"}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/search/audio?name=x.wav", b"RIFFjunk", "is no sound that can be read"),
        ("/search/audio?name=x.wav", b"", "is empty"),
        ("/search/image?name=x.png", b"GIF89a", "is no picture that can be read"),
        ("/search/text", b"{", "Type a few words"),
        ("/search/text", b"[1]", "Type a few words"),
        ("/search/text", b'{"text": 3}', "Type a few words"),
        ("/search/text", b'{"text": "  "}', "Type a few words"),
        ("/search/text", b"\xff\xfe", "Type a few words"),
        ("/search/video", b"x", "takes no video"),
        ("/search/text?k=0", b'{"text": "x"}', "must be 1 to 100"),
        ("/search/text?k=101", b'{"text": "x"}', "must be 1 to 100"),
        ("/search/text?k=many", b'{"text": "x"}', "must be 1 to 100"),
    ],
)
def test_bad_queries_are_answered_by_a_sentence(server: SearchServer, path: str, body: bytes, said: str) -> None:
    answer = ask(server, "POST", path, body)
    assert answer.status == 400 and said in answer.json["error"]
    assert ask(server, "POST", "/search/text", text("still there")).status == 200


def test_an_encoder_that_fails_is_no_end_of_the_server(
    server: SearchServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret path /home/me")

    monkeypatch.setattr(server.encoders, "encode", fail)
    answer = ask(server, "POST", "/search/text", text("x"))
    assert answer.status == 500 and "secret" not in answer.body.decode()
    assert "secret path" in capsys.readouterr().err
    monkeypatch.undo()
    assert ask(server, "POST", "/search/text", text("x")).status == 200


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", ""])
def test_other_names_of_the_host_are_refused(server: SearchServer, method: str, host: str) -> None:
    for path in ("/", "/about", "/media/1/audio", "/search/text"):
        body = text("x") if method == "POST" else None
        answer = ask(server, method, path, body, Host=host.format(port=server.server_port))
        assert answer.status == 421 and b"clip" not in answer.body
    own = ask(server, "GET", "/about", Host=f"localhost:{server.server_port}")
    assert own.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_pages_of_other_sites_are_refused(server: SearchServer, headers: dict[str, str]) -> None:
    named = {name: value.format(port=server.server_port) for name, value in headers.items()}
    for method, path in (("POST", "/search/text"), ("GET", "/about"), ("GET", "/media/1/audio")):
        answer = ask(server, method, path, text("x") if method == "POST" else None, **named)
        assert answer.status == 403 and "Other sites" in answer.json["error"]
        assert "Access-Control-Allow-Origin" not in answer.headers
    own = {"Origin": f"http://127.0.0.1:{server.server_port}", "Sec_Fetch_Site": "same-origin"}
    assert ask(server, "POST", "/search/text", text("x"), **own).status == 200


def test_a_link_from_another_site_opens_the_page(server: SearchServer) -> None:
    assert ask(server, "GET", "/", Sec_Fetch_Site="cross-site").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/media/../../etc/passwd", "/media/1/../../meta.json", "/media/%2e%2e/audio", "/media/1/..%2f..%2fetc%2fpasswd",
        "/media/-1/audio", "/media/1e3/audio", "/media/99999999999999999999/audio", "/media/72/audio",
        "/media/999999999999999999/audio", "/media/1/caption", "/media/1/text", "/media/50/audio", "/media/5/image",
        "/media/1", "/media/", "/etc/passwd", "//etc/passwd", "/page.html", "/../page.html", "/media/\u0661/audio",
    ],
)  # fmt: skip
def test_no_path_of_a_request_reaches_the_file_system(server: SearchServer, path: str) -> None:
    answer = ask(server, "GET", urllib.parse.quote(path, safe="/%."))
    assert answer.status == 404 and "error" in answer.json


def test_media_outside_of_the_root_are_not_served(workshop: Workshop, tmp_path: Path) -> None:
    """An index column is data from elsewhere too."""
    root = tmp_path / "media"
    for path in (root / "in.wav", tmp_path / "out.wav"):
        write_tone(path, 300)
    write_png(tmp_path / "out.png", (1, 2, 3))
    (root / "notes.txt").write_text("secret")
    (root / "link.wav").symlink_to(tmp_path / "out.wav")
    (root / "folder.wav").mkdir()
    paths = ["in.wav", "../out.wav", str(tmp_path / "out.wav"), "link.wav", "notes.txt", "folder.wav", "", "a\0.wav"]
    store = EmbeddingStore.open(workshop.store).select(range(len(paths)))
    columns = {"id": list(store.column("id")), "path_audio": paths, "path_image": ["../out.png"] * len(paths)}
    outside = EmbeddingStore.from_arrays({"audio": store.embeddings("audio")}, columns)
    write_store(tmp_path / "store", outside)
    build_index(tmp_path / "store", tmp_path / "index", modality="audio", media=root)
    with serving(workshop, SearchIndex.open(tmp_path / "index")) as server:
        statuses = [ask(server, "GET", f"/media/{row}/audio").status for row in range(len(paths))]
        assert statuses == [200] + [404] * 7
        assert ask(server, "GET", "/media/0/image").status == 404


def test_recordings_of_the_stamps_are_named_by_id(workshop: Workshop, tmp_path: Path) -> None:
    write_tone(tmp_path / "birds/owl_desc_fr.ogg", 300)
    store = EmbeddingStore.from_arrays(
        {"audio": EmbeddingStore.open(workshop.store).embeddings("audio", [0])}, {"id": ["birds/owl_desc_fr"]}
    )
    path = tmp_path.resolve() / "birds/owl_desc_fr.ogg"
    assert MediaFiles(store, tmp_path, recordings=True).of(0) == {"audio": path}
    assert MediaFiles(store, tmp_path).of(0) == MediaFiles(store, None, recordings=True).of(0) == {}


def test_media_whole_and_in_parts(server: SearchServer, workshop: Workshop) -> None:
    content = (workshop.media / "sounds/03.wav").read_bytes()
    size = len(content)
    whole = ask(server, "GET", "/media/3/audio")
    assert (whole.status, whole.body, whole.headers["Content-Type"]) == (200, content, "audio/wav")
    assert whole.headers["Accept-Ranges"] == "bytes" and whole.headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, "GET", "/media/3/image").headers["Content-Type"] == "image/png"
    parts = {"0-99": (0, 100), "100-": (100, size), "-7": (size - 7, size), f"10-{size * 2}": (10, size), "5-5": (5, 6)}
    for asked, (start, stop) in parts.items():
        part = ask(server, "GET", "/media/3/audio", Range=f"bytes={asked}")
        assert (part.status, part.body) == (206, content[start:stop])
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
    for asked in (f"{size}-", f"{size * 2}-{size * 3}", "7-3", "-0"):
        beyond = ask(server, "GET", "/media/3/audio", Range=f"bytes={asked}")
        assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{size}")
    for asked in ("bytes=-", "bytes=0-1,3-4", "lines=0-3", "bytes=a-b"):
        assert ask(server, "GET", "/media/3/audio", Range=asked).body == content
    head = ask(server, "HEAD", "/media/3/audio", Range="bytes=0-99")
    assert (head.status, head.headers["Content-Length"], head.body) == (206, "100", b"")


def test_a_drawing_is_served_in_a_sandbox(workshop: Workshop, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media/a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    arrays = {"audio": EmbeddingStore.open(workshop.store).embeddings("audio", [0, 1])}
    write_store(tmp_path / "store", EmbeddingStore.from_arrays(arrays, {"image_file": ["a.svg", None]}))
    build_index(tmp_path / "store", tmp_path / "index", modality="audio", media=tmp_path / "media")
    with serving(workshop, SearchIndex.open(tmp_path / "index")) as server:
        drawing = ask(server, "GET", "/media/0/image")
    assert drawing.headers["Content-Type"] == "image/svg+xml"
    policy = drawing.headers["Content-Security-Policy"]
    assert policy.startswith("sandbox;") and "default-src 'none'" in policy and "allow-scripts" not in policy


def test_uploads_over_the_limit_are_refused(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "UPLOAD_LIMIT", 100_000)
    answer = ask(server, "POST", "/search/audio?name=x.wav", b"x" * 100_001)
    assert answer.status == 413 and answer.json["error"].startswith("That is too large")
    assert ask(server, "POST", "/search/audio?name=x.wav", b"x" * 100_000).status == 400
    assert ask(server, "POST", "/search/text", text("x" * 70_000)).status == 413


def raw(server: SearchServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer


@pytest.mark.parametrize(
    "length", ["", "Content-Length: many\r\n", "Content-Length: -5\r\n", "Transfer-Encoding: chunked\r\n"]
)
def test_a_body_of_unknown_length_is_refused(server: SearchServer, length: str) -> None:
    host = f"Host: 127.0.0.1:{server.server_port}\r\n"
    answer = raw(server, f"POST /search/text HTTP/1.1\r\n{host}{length}\r\n5\r\nhello\r\n0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 411 ") and answer.count(b"HTTP/1.1") == 1


def test_a_body_that_breaks_off_is_not_searched(server: SearchServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.encoders, "encode", lambda *_: pytest.fail("it was searched"))
    host = f"Host: 127.0.0.1:{server.server_port}\r\nContent-Length: 500\r\n\r\n"
    assert raw(server, f"POST /search/text HTTP/1.1\r\n{host}".encode() + text("x")) == b""


def test_one_connection_serves_many_requests(server: SearchServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    for _ in range(3):
        for path, status in (("/about", 200), ("/nothing", 404), ("/media/2/audio", 200)):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status
        connection.request("POST", "/search/text?k=2", text("a"))
        assert len(json.loads(connection.getresponse().read())["after"]) == 2
    connection.close()


def test_concurrent_requests(server: SearchServer, workshop: Workshop) -> None:
    words = [f"query {i}" for i in range(24)]
    alone = [ask(server, "POST", "/search/text", text(one)).body for one in words]
    sound = (workshop.media / "sounds/03.wav").read_bytes()
    with ThreadPoolExecutor(12) as pool:
        answers = pool.map(lambda one: ask(server, "POST", "/search/text", text(one)).body, words)
        media = pool.map(lambda _: ask(server, "GET", "/media/3/audio").body, words)
        assert list(answers) == alone
        assert all(body == sound for body in media)


def test_an_index_without_encoders_says_what_is_missing(workshop: Workshop, tmp_path: Path) -> None:
    build_index(workshop.store, tmp_path / "index", modality="audio")
    with serving(workshop, SearchIndex.open(tmp_path / "index")) as server:
        about = ask(server, "GET", "/about").json
        assert (about["bridged"], about["queries"], about["missing"]) == (False, [], ["audio"])
        assert ask(server, "POST", "/search/text", text("x")).json == {"error": "This page takes no text queries."}
