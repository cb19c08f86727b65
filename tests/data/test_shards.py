"""Shards: patterns, names relative to the data, URLs read by ranges, and commands that are run once."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest

from stipple_core.data.sources.scan import scan
from stipple_core.data.sources.shard_patterns import expand_braces
from stipple_core.data.sources.shards import find_shards
from tests.helpers.data.data_sources import captioned_image, make_tar, png_image, reasons, shard_config


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder with range requests, which the standard library's handler ignores."""

    ranges = True
    refused = 0  # how many further requests are answered with 503
    broken: dict[str, int] = {}  # status code by path
    requested: list[str] = []

    def do_GET(self):
        type(self).requested.append(self.headers.get("Range") or "all")
        if status := self.broken.get(self.path):
            return self.send_error(status)
        if type(self).refused:
            type(self).refused -= 1
            return self.send_error(503)
        requested_range = self.headers.get("Range")
        if not requested_range or not self.ranges:
            return super().do_GET()
        data = Path(self.translate_path(self.path)).read_bytes()
        first, _, last = requested_range.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def do_HEAD(self):
        if status := self.broken.get(self.path):
            return self.send_error(status)
        super().do_HEAD()

    def end_headers(self):
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder, its address, and the handler's settings."""
    pytest.importorskip("aiohttp")

    class Settings(Handler):
        requested: list[str] = []

    (tmp_path / "www").mkdir()
    served = functools.partial(Settings, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), served) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield tmp_path / "www", f"http://127.0.0.1:{listening.server_port}", Settings
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("pattern", "texts"),
    [
        ("a", ["a"]),
        ("{0..2}", ["0", "1", "2"]),
        ("x{08..11}.tar", ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]),
        ("{000..002}", ["000", "001", "002"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{a,}{}", ["a{}", "{}"]),
        ("{x", ["{x"]),
    ],
)
def test_braces_are_expanded_as_in_a_shell(pattern, texts):
    assert expand_braces(pattern) == texts


def test_a_range_of_a_billion_shards_is_an_error():
    for pattern in ("{0..999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(ValueError, match="more than 1000000 shards"):
            expand_braces(pattern)


def test_names_are_relative_to_the_folder_before_the_pattern(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(*patterns: str) -> list[str]:
        return [shard.name for shard in find_shards([f"{tmp_path}/{pattern}" for pattern in patterns], "unused")]

    assert names("a/{0..1}.tar") == names("a/*.tar") == names("a/1.tar", "a/0.tar") == ["0.tar", "1.tar"]
    assert names("{a,b}/0.tar") == ["a/0.tar", "b/0.tar"] and names("**/*.tar") == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert names("a/0.tar", "a/*.tar") == ["0.tar", "1.tar"]
    with pytest.raises(ValueError, match=r"two shards called 0.tar: .*; name them in one pattern"):
        names("a/0.tar", "b/0.tar")
    with pytest.raises(ValueError, match="matches no file"):
        names("c/*.tar")


def test_a_missing_shard_of_a_range_is_skipped_by_name(tmp_path):
    (tmp_path / "00.tar").write_bytes(make_tar(captioned_image("a")))
    records = scan(shard_config(tmp_path, shards=str(tmp_path / "{00..02}.tar")))
    assert len(records.train) == 1 and reasons(records) == {"01.tar": "no such file", "02.tar": "no such file"}


def test_urls_are_read_by_ranges_like_local_files(server, tmp_path):
    folder, address, handler = server
    for number in range(2):
        big = [("big.bin", bytes(9 << 20))]
        members = (
            [member for key in "abc" for member in captioned_image(f"{number}{key}", number)]
            + big
            + captioned_image("z")
        )
        (folder / f"{number}.tar").write_bytes(make_tar(members))
    remote = scan(shard_config(tmp_path, shards=f"{address}/{{0..2}}.tar"))
    local = scan(shard_config(tmp_path, shards=f"{folder}/{{0..2}}.tar"))
    assert remote.skipped == local.skipped and len(remote.skipped) == 1
    assert [(r.name, r.captions, r.bytes) for r in remote.train] == [(r.name, r.captions, r.bytes) for r in local.train]
    for one, other in zip(remote.train, local.train, strict=True):
        assert one.open().read() == other.open().read()
    handler.requested.clear()
    record = scan(shard_config(tmp_path, shards=f"{address}/{{0..1}}.tar")).train[0]
    record.open()
    first = record.place
    assert [each for each in handler.requested if each != "all"][-1] == f"bytes={first}-{first + record.bytes - 1}"


def test_short_network_failures_are_retried_and_long_ones_are_errors(server, tmp_path, monkeypatch):
    folder, address, handler = server
    monkeypatch.setattr("stipple_core.data.sources.remote_files.time.sleep", lambda _: None)
    (folder / "0.tar").write_bytes(make_tar(captioned_image("a")))
    record = scan(shard_config(tmp_path, shards=f"{address}/0.tar")).train[0]
    handler.refused = 2
    assert record.open().read() == png_image()
    handler.refused = 99
    with pytest.raises(OSError, match="can't be read after 5 tries"):
        record.open()


@pytest.mark.parametrize("status", [503, 403, 404, 410])
def test_a_shard_is_missing_only_if_the_server_reports_it_as_missing(status, server, tmp_path, monkeypatch):
    folder, address, handler = server
    waits = []
    monkeypatch.setattr("stipple_core.data.sources.remote_files.time.sleep", waits.append)
    (folder / "0.tar").write_bytes(make_tar(captioned_image("a")))
    handler.broken = {"/1.tar": status}
    options = shard_config(tmp_path, shards=f"{address}/{{0..1}}.tar")
    if status in (404, 410):
        assert reasons(scan(options)) == {"1.tar": "no such file"} and not waits
    else:
        with pytest.raises(OSError, match=rf"1.tar can't be read after 5 tries: .*{status}"):
            scan(options)
        assert len(waits) == 4


def test_an_unreachable_server_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("stipple_core.data.sources.remote_files.time.sleep", lambda _: None)
    for host in ("127.0.0.1:9", "no-such-host.invalid"):
        with pytest.raises(OSError, match="a.tar can't be read after 5 tries"):
            scan(shard_config(tmp_path, shards=f"http://{host}/a.tar"))


def test_a_folder_as_a_shard_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.shards .* is a folder; use a pattern of its files, such as '.*/\*.tar'"
    ):
        scan(shard_config(tmp_path, shards=f"{tmp_path}/"))


def test_a_server_without_ranges_is_an_error_and_can_be_read_by_a_pipe(server, tmp_path):
    folder, address, handler = server
    handler.ranges = False
    members = [member for n in range(100) for member in captioned_image(f"{n:03d}", n)]
    for filling in (0, 20 << 20):
        (folder / "0.tar").write_bytes(make_tar([*members, ("z.bin", bytes(filling)), *captioned_image("z")]))
        with pytest.raises(ValueError, match="use pipe:curl"):
            for record in scan(shard_config(tmp_path, shards=f"{address}/0.tar")).train:
                record.open()
    read = "python3 -c 'import sys, urllib.request as u; sys.stdout.buffer.write(u.urlopen(sys.argv[1]).read())'"
    records = scan(shard_config(tmp_path, shards=f"pipe:{read} {address}/0.tar"))
    assert len(records.train) == 101 and records.train[3].name == "0.tar/003.png"
    assert records.train[3].open().read() == png_image(3)


def test_fsspec_file_systems_are_read_and_support_patterns(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for number in range(3):
        with system.open(f"/shards/{number}.tar", "wb") as file:
            file.write(make_tar(captioned_image("a", number)))
    for pattern in ("memory://shards/{0..2}.tar", "memory://shards/*.tar"):
        records = scan(shard_config(tmp_path, shards=pattern))
        assert [record.name for record in records.train] == ["0.tar/a.png", "1.tar/a.png", "2.tar/a.png"]
        assert records.train[2].open().read() == png_image(2)


def test_a_command_is_run_once_and_its_failure_is_an_error(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(make_tar(captioned_image("a", number)))
    command = f"pipe:echo x >> {tmp_path}/runs; cat {tmp_path}/{{0..1}}.tar"
    for _ in range(2):
        records = scan(shard_config(tmp_path, shards=command))
        assert [record.name for record in records.train] == ["0.tar/a.png", "1.tar/a.png"]
        assert records.train[1].open().read() == png_image(1)
    assert (tmp_path / "runs").read_text() == "x\nx\n"
    for command, message in (("cat nowhere.tar", "exit code 1: .*No such file"), ("cat 0.tar; exit 7", "exit code 7")):
        with pytest.raises(ValueError, match=message):
            scan(shard_config(tmp_path, shards=f"pipe:cd {tmp_path}; {command}"))
    assert not list((tmp_path / "index").glob("*.tmp"))


def test_an_unknown_protocol_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing://x/0.tar can't be opened"):
        scan(shard_config(tmp_path, shards="nothing://x/0.tar"))


def test_an_indexed_url_is_not_read_again(server, tmp_path):
    folder, address, handler = server
    (folder / "0.tar").write_bytes(make_tar(captioned_image("a")))
    options = shard_config(tmp_path, shards=f"{address}/0.tar")
    first = scan(options)
    handler.requested.clear()
    assert list(scan(options).train) == list(first.train)
    assert not [each for each in handler.requested if each.startswith("bytes=") and each != "bytes=0-0"]
    lines = next((tmp_path / "index").glob("*.jsonl")).read_text().splitlines()
    assert json.loads(lines[0])["shard"] == f"{address}/0.tar" and json.loads(lines[-1]) == {"end": 1}


def test_output_that_is_not_a_complete_tar_is_not_stored(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar(captioned_image("a")))
    (tmp_path / "404").write_text("<!DOCTYPE html><title>404 Not Found</title>" * 20)
    (tmp_path / "half").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    (tmp_path / "members").write_bytes((tmp_path / "0.tar").read_bytes()[:1024])
    for wrong in ("cat 404", "cat half", "cat members", "true", "gzip -c 0.tar"):
        (tmp_path / "now").write_text(wrong)
        for _ in range(2):
            with pytest.raises(
                ValueError, match="did not write a complete tar, so its output is not stored: "
            ) as raised:
                scan(shard_config(tmp_path, shards=f"pipe:cd {tmp_path}; sh now"))
            assert "\n" not in str(raised.value)
    (tmp_path / "now").write_text("cat 0.tar")
    assert len(scan(shard_config(tmp_path, shards=f"pipe:cd {tmp_path}; sh now")).train) == 1
    assert not list((tmp_path / "index").glob("*.tmp*"))


@pytest.mark.skipif(shutil.which("bash") is None, reason="only bash has pipefail")
def test_a_command_fails_if_any_part_of_its_pipeline_fails(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar(captioned_image("a")))
    with pytest.raises(ValueError, match="exit code 3"):
        scan(shard_config(tmp_path, shards=f"pipe:(cat {tmp_path}/0.tar; exit 3) | cat"))
    records = scan(shard_config(tmp_path, shards=f"pipe:cd {tmp_path}; touch '{{x,y}}'; ls {{x,y}} >&2 && cat 0.tar"))
    assert len(records.train) == 1  # braces are not expanded


def test_errors_in_stored_output_name_the_file(tmp_path):
    (tmp_path / "0.tar").write_bytes(make_tar(captioned_image("a")))
    command = f"pipe:cat {tmp_path}/0.tar"
    scan(shard_config(tmp_path, shards=command))
    (stored,) = (tmp_path / "index").glob("*.tar")
    stored.write_bytes(stored.read_bytes()[:1600])  # truncated
    (skip,) = [
        skip for skip in scan(shard_config(tmp_path, shards=command), captioned=False).skipped if "/" not in skip.path
    ]
    assert skip.path == "0.tar" and f"stored in {stored}: delete that file" in skip.reason
