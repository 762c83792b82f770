"""One run of bytes of a file on a server, asked for by HTTP `Range` (RFC 9110, section 14), with retries.

Knows nothing about what the bytes mean, and keeps nothing. Follows redirects; a token goes to the origin it is for and
nowhere else. Proxies are those of the environment, as for every `urllib` program.
"""

import logging
import re
import time
from dataclasses import dataclass
from email.message import Message
from http.client import HTTPException, HTTPMessage, HTTPResponse
from typing import IO
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from offload.errors import FlashError, RequestError, StrataError
from offload.remote_file import SCHEMES, RemoteFile, origin_of

TIMEOUT_S = 20.0  # without a byte
RETRIES = 3
PAUSE_S = 0.25  # doubled after every failure
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")
_log = logging.getLogger("strata.remote")


@dataclass(frozen=True, slots=True)
class RangeReply:
    """Bytes of a file, and what tells one version of it from another."""

    data: bytes
    size: int  # of the whole file
    version: str  # ETag, else the time of the last change, else empty


class _TransientError(Exception):
    """Something that may be otherwise the next time."""


class _Redirects(HTTPRedirectHandler):
    """Follows to http and https alone, and leaves the token behind when the origin changes."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if urlsplit(newurl).scheme not in SCHEMES:
            raise HTTPError(req.full_url, code, f"{msg} to {newurl}", headers, fp)
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and origin_of(following.full_url) != origin_of(req.full_url):
            following.remove_header("Authorization")
        return following


_opener: OpenerDirector = build_opener(_Redirects())


def read_range(file: RemoteFile, start: int, count: int) -> RangeReply:
    """`count` bytes from `start`, fewer where the file ends; none beyond its end.

    RequestError where the file cannot be had by asking again (no such file, no access, no ranges), FlashError where
    the server or the way to it fails.
    """
    for failures in range(RETRIES + 1):
        if failures:
            time.sleep(PAUSE_S * 2 ** (failures - 1))
        try:
            return _read_once(file, start, count)
        except _TransientError as error:
            reason, cause = str(error), error.__cause__
            _log.info("%s: bytes from %d: %s", file, start, reason)
    raise FlashError(
        f"{file}: reading at byte {start} failed {RETRIES + 1} times: {reason}",
        hint="check the connection and the name, then start again",
    ) from cause


def _read_once(file: RemoteFile, start: int, count: int) -> RangeReply:
    headers = {
        "Range": f"bytes={start}-{start + count - 1}",
        "Accept-Encoding": "identity",
        "User-Agent": "strata",
    }
    if file.token:
        headers["Authorization"] = f"Bearer {file.token}"
    try:
        with _opener.open(Request(file.url, headers=headers), timeout=TIMEOUT_S) as response:
            return _reply(file, response, start, count)
    except HTTPError as error:
        with error:
            if error.code == 416:
                return _beyond(file, error.headers)
            if error.code in BUSY:
                raise _TransientError(f"the server answers {error.code} {error.reason}") from error
            raise _refused(file, error) from error
    except (HTTPException, OSError) as error:
        raise _TransientError(_words(error)) from error
    except ValueError as error:  # a host or a token that no request can hold
        raise RequestError(f"{file}: cannot be asked for: {error}", hint="check the name, and HF_TOKEN") from error


def _reply(file: RemoteFile, response: HTTPResponse, start: int, count: int) -> RangeReply:
    if response.headers.get_content_type() == "text/html":
        raise RequestError(f"{file}: is a web page, not a model", hint="give the address of the file itself")
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    encoding = response.headers.get("Content-Encoding", "identity")
    if response.status != 206 or found is None or found[1] is None or encoding != "identity":
        raise _rangeless(file)
    first, last, size = int(found[1]), int(found[2]), int(found[3])
    if (first, last) != (start, min(start + count, size) - 1):
        raise _rangeless(file)
    data = response.read(last + 1 - first)
    if len(data) != last + 1 - first:
        raise _TransientError(f"the answer was cut after {len(data)} of {last + 1 - first} bytes")
    return RangeReply(data, size, _version(response.headers))


def _beyond(file: RemoteFile, headers: Message) -> RangeReply:
    found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
    if found is None:
        raise _rangeless(file)
    return RangeReply(b"", int(found[3]), _version(headers))


def _version(headers: Message) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


def _rangeless(file: RemoteFile) -> RequestError:
    return RequestError(
        f"{file}: its server does not hand out parts of a file", hint=f"download it first: {file.download_command}"
    )


def _refused(file: RemoteFile, error: HTTPError) -> StrataError:
    answer = f"the server answers {error.code} {error.reason}"
    if error.code in (401, 403):
        hint = "download the file with a program that has your credentials"
        if file.on_hub:
            hint = "a gated or private model: accept its terms on its page, and set HF_TOKEN to a token with access"
        return RequestError(f"{file}: no access: {answer}", hint=hint)
    if error.code in (404, 410):
        return RequestError(f"{file}: there is no such file: {answer}", hint="check the name")
    return FlashError(f"{file}: {answer}", hint="open the address in a browser to see what the server says")


def _words(error: Exception) -> str:
    """What failed, for a message: the reason inside urllib's own error, and text for errors that have none."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"no byte arrived within {TIMEOUT_S:g} s"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
