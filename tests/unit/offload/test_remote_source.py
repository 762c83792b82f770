"""Headers of files on a server: what is fetched, and what is said where that fails."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import http_range
from offload.errors import FlashError, ModelFormatError, RequestError
from offload.gguf import GGUFFile
from offload.gguf_cursor import MAX_HEADER_BYTES
from offload.remote_file import RemoteFile
from offload.remote_source import FIRST_BLOCK_BYTES, RemoteSource
from tests.support.file_server import FileServer, file_server, unused_url
from tests.support.gguf_bytes import small_model
from tests.support.large_gguf import write_sparse
from tests.support.planning import header
from tests.unit.offload.test_gguf_shards import three

DATA = bytes(range(251)) * 12_000  # 3 MB, no block like another


@pytest.fixture
def server():
    with file_server() as told:
        yield told


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(http_range, "PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def remote(server: FileServer, data=DATA, path="/m/model.gguf", token=None) -> RemoteFile:
    return RemoteFile(f"hf:org/repo{path}", server.serve(path, data), token)


def read(source: RemoteSource, start: int, count: int) -> bytes:
    data = bytearray(count)
    source.read_into(memoryview(data), start)
    return bytes(data)


def test_reads_what_the_file_holds_and_each_byte_once(server):
    source = RemoteSource(remote(server))
    assert source.size == len(DATA)
    assert read(source, 5, 100) == DATA[5:105]
    assert len(server.seen) == 1
    assert read(source, 1_000_000, 700_000) == DATA[1_000_000:1_700_000]
    assert read(source, 0, len(DATA)) == DATA
    assert read(source, 10, 0) == b""
    assert server.sent_bytes == len(DATA)
    source.check_identity()
    source.close()
    source.close()
    assert source.closed
    with pytest.raises(FlashError, match="read after the file was closed"):
        read(source, 0, 1)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 1 << 20)), max_size=6))
def test_reads_in_any_order(reads):
    with file_server() as server:
        source = RemoteSource(remote(server))
        for start, count in reads:
            expected = DATA[start : start + count]
            assert read(source, start, len(expected)) == expected
        assert server.sent_bytes <= len(DATA)


def test_reads_from_several_threads(server):
    source = RemoteSource(remote(server))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda start: read(source, start, 100_000), range(0, 2_800_000, 100_000)))
    assert b"".join(found) == DATA[:2_800_000]
    assert server.sent_bytes <= len(DATA)


def test_blocks_grow(server):
    source = RemoteSource(remote(server))
    for start in range(0, len(DATA) - 1000, 1000):
        read(source, start, 1000)
    starts = [int(seen.range.removeprefix("bytes=").partition("-")[0]) for seen in server.seen]
    assert starts == [0, *(FIRST_BLOCK_BYTES * n for n in (1, 5))]


@pytest.mark.parametrize("count", [0, 1, FIRST_BLOCK_BYTES, FIRST_BLOCK_BYTES + 1])
def test_the_end_of_a_file(count, server):
    source = RemoteSource(remote(server, DATA[:count]))
    assert source.size == count
    assert read(source, 0, count) == DATA[:count]
    with pytest.raises(FlashError, match=f"the file ends at byte {count}, 1 more were expected"):
        read(source, count, 1)


def test_nothing_beyond_a_header_is_fetched(server):
    source = RemoteSource(remote(server))
    with pytest.raises(RequestError, match="only the header") as caught:
        read(source, MAX_HEADER_BYTES, 1)
    assert caught.value.hint == "download it first: hf download org/repo m/model.gguf --local-dir ."
    assert len(server.seen) == 1


def test_a_redirect_is_followed_and_takes_no_token_elsewhere(server):
    with file_server() as other:
        other.serve("/blob", DATA)
        server.redirects["/m/model.gguf"] = "/moved"
        server.redirects["/moved"] = other.url + "/blob"
        source = RemoteSource(remote(server, token="secret"))
        assert read(source, 0, len(DATA)) == DATA
        assert {seen.authorization for seen in server.seen} == {"Bearer secret"}
        assert {seen.path for seen in server.seen} == {"/m/model.gguf", "/moved"}
        assert {seen.authorization for seen in other.seen} == {None}


@pytest.mark.parametrize("target", ["/m/model.gguf", "ftp://127.0.0.1/model.gguf", "file:///etc/hostname"])
def test_a_redirect_that_leads_nowhere(target, server):
    server.redirects["/m/model.gguf"] = target
    with pytest.raises(FlashError, match="answers 302"):
        RemoteSource(remote(server))


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (401, RequestError, "no access: the server answers 401"),
        (403, RequestError, "no access: the server answers 403"),
        (404, RequestError, "there is no such file"),
        (400, FlashError, "the server answers 400"),
    ],
)
def test_refusals_are_not_asked_again(status, kind, text, server):
    server.statuses = [status]
    with pytest.raises(kind, match=text) as caught:
        RemoteSource(remote(server))
    assert str(caught.value).startswith("hf:org/repo/m/model.gguf: ")
    assert caught.value.hint
    assert len(server.seen) == 1
    if status in (401, 403):
        assert "HF_TOKEN" in caught.value.hint


def test_a_token_opens(server):
    server.token = "secret"
    assert RemoteSource(remote(server, token="secret")).size == len(DATA)
    with pytest.raises(RequestError, match="no access"):
        RemoteSource(RemoteFile.from_url(f"{server.url}/m/model.gguf"))
    with pytest.raises(RequestError, match="cannot be asked for"):
        RemoteSource(remote(server, token="a\nb"))


def test_what_passes_is_tried_again(server):
    server.statuses = [503, 429, 200]
    server.cuts = 1
    assert read(RemoteSource(remote(server)), 0, 1000) == DATA[:1000]
    assert len(server.seen) == 4


@pytest.mark.parametrize(("statuses", "cuts", "text"), [([502] * 9, 0, "answers 502"), ([], 9, "cut|IncompleteRead")])
def test_what_does_not_pass(statuses, cuts, text, server):
    server.statuses, server.cuts = statuses, cuts
    with pytest.raises(FlashError, match=f"at byte 0 failed 4 times: .*({text})") as caught:
        RemoteSource(remote(server))
    assert "start again" in caught.value.hint


def test_nobody_listens():
    with pytest.raises(FlashError, match="failed 4 times: Connection refused"):
        RemoteSource(RemoteFile.from_url(unused_url() + "/model.gguf"))


def test_a_server_that_does_not_answer(server, monkeypatch):
    monkeypatch.setattr(http_range, "TIMEOUT_S", 0.02)
    server.delay_s = 0.1
    with pytest.raises(FlashError, match=r"no byte arrived within 0\.02 s"):
        RemoteSource(remote(server))


def test_a_server_without_ranges(server):
    server.ranges = False
    with pytest.raises(RequestError, match="does not hand out parts") as caught:
        RemoteSource(RemoteFile.from_url(server.serve("/a b.gguf", DATA)))
    assert caught.value.hint == f"download it first: curl -L -O {server.url}/a%20b.gguf"
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "header_lines",
    [{"Content-Range": "bytes 1-5/9"}, {"Content-Range": "bytes 0-5/*"}, {"Content-Encoding": "gzip"}],
)
def test_a_server_that_answers_with_other_bytes(header_lines, server):
    server.headers = header_lines
    with pytest.raises(RequestError, match="does not hand out parts"):
        RemoteSource(remote(server))


def test_a_page_about_a_file(server):
    server.ranges, server.headers = False, {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(RequestError, match="is a web page, not a model"):
        RemoteSource(remote(server))


@pytest.mark.parametrize("change", ["etag", "size", "time"])
def test_a_file_that_changes(change, server):
    file = remote(server)
    if change == "time":
        server.headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    source = RemoteSource(file)
    source.check_identity()
    if change == "size":
        server.serve("/m/model.gguf", DATA + b"more")
    elif change == "etag":
        server.headers = {"ETag": '"two"'}
    else:
        server.headers = {"Last-Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}
    with pytest.raises(FlashError, match="the file changed on the server"):
        source.check_identity()
    with pytest.raises(FlashError, match="the file changed on the server"):
        read(source, 0, len(DATA))
    assert read(source, 0, 10) == DATA[:10]  # what was fetched before


def test_a_model_is_opened_from_its_header(server, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_model().build())
    with GGUFFile.open(remote(server, path)) as gguf, GGUFFile.open(path) as local:
        assert gguf.tensors == local.tensors
        assert gguf.metadata.keys() == local.metadata.keys()
        assert gguf.byte_size == local.byte_size
        assert str(gguf.path) == "hf:org/repo/m/model.gguf"
        with pytest.raises(RequestError, match="weights are read from local files"):
            assert gguf.sources


def test_a_header_is_a_small_part_of_its_file(server, tmp_path):
    """130 GB with a vocabulary of 128k: some megabytes, in few requests."""
    path = tmp_path / "large.gguf"
    model = header(
        layers=94, width=4096, heads=64, kv_heads=4, ffn=1536, experts=128, used=8, vocab=128_000, tied=False
    )
    size = write_sparse(path, model, vocabulary=128_000)
    with GGUFFile.open(path) as local:
        header_bytes = min(tensor.offset for tensor in local.tensors.values())
        with GGUFFile.open(remote(server, path)) as gguf:
            assert gguf.tensors == local.tensors
            assert len(gguf.get_strings("tokenizer.ggml.tokens")) == 128_000
    assert header_bytes <= server.sent_bytes < 16e6 < 2e-4 * size
    assert len(server.seen) <= 8


def test_a_file_cut_short_on_the_server(server):
    data = small_model().build()
    with pytest.raises(ModelFormatError, match=r"hf:org/repo/m/model\.gguf.*but the file ends at byte"):
        GGUFFile.open(remote(server, data[:-8]))
    with pytest.raises(ModelFormatError, match="remain in the file"):
        GGUFFile.open(remote(server, data[:100]))
    with pytest.raises(ModelFormatError, match="a web page, not a model"):
        GGUFFile.open(remote(server, b"<!DOCTYPE html>" * 10))


@pytest.mark.parametrize("opened", [1, 3])
def test_shards(opened, server):
    for number, file in enumerate(three(), start=1):
        server.serve(f"/m/x y-{number:05}-of-00003.gguf", file.build())
    file = RemoteFile.from_url(f"{server.url}/m/x y-{opened:05}-of-00003.gguf?download=true")
    with GGUFFile.open(file) as gguf:
        assert list(gguf.tensors) == ["a", "b", "c"]
        assert [path.name for path in gguf.paths] == [f"x y-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert len(server.seen) == 3
    del server.files["/m/x y-00002-of-00003.gguf"]
    with pytest.raises(RequestError, match=r"x%20y-00002-of-00003\.gguf: there is no such file"):
        GGUFFile.open(file)


def test_all_shards_are_downloaded():
    name = "x/m-00002-of-00004.gguf"
    assert RemoteFile.from_url(f"https://host/{name}").download_command == (
        "curl -L -O 'https://host/x/m-[00001-00004]-of-00004.gguf'"
    )
    assert RemoteFile(f"hf:org/repo/{name}", "").download_command == (
        "hf download org/repo --include 'x/m-*-of-00004.gguf' --local-dir ."
    )


def test_names_of_urls():
    file = RemoteFile.from_url("https://host:8443/a%20b/c.gguf?X-Signature=secret#part")
    assert str(file) == "https://host:8443/a%20b/c.gguf"
    assert file.url == "https://host:8443/a%20b/c.gguf?X-Signature=secret"
    assert "secret" not in repr(file)
    assert (file.name, file.stem, file.origin) == ("c.gguf", "c", "https://host:8443")
    beside = file.with_name("d.gguf")
    assert (str(beside), beside.name) == ("https://host:8443/a%20b/d.gguf", "d.gguf")
    assert beside.url == "https://host:8443/a%20b/d.gguf?X-Signature=secret"
    assert RemoteFile.from_url("https://HOST/x").origin == "https://host:443"


@pytest.mark.parametrize(
    "url", ["https://", "https://host", "https://host/", "https://host:port/x", "ftp://host/x", "https://me:pw@host/x"]
)
def test_what_is_no_url(url):
    with pytest.raises(RequestError) as caught:
        RemoteFile.from_url(url)
    assert caught.value.hint
    assert "pw" not in str(caught.value)
