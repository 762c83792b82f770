"""The name of a model file on a server: what messages call it, where it is read, and the command that downloads it.

Knows nothing about reading. Stands where a local file has a path, with the few members that both have; it cannot be
opened by mistake, being no path itself.
"""

import shlex
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from offload.errors import RequestError
from offload.gguf_shards import SHARD_NAME

HUB_PREFIX = "hf:"
SCHEMES = ("https", "http")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file: `label` is the user's name for it, `hf:org/repo/file.gguf` or the URL without its query.

    `token` is sent to the origin (scheme, host, port) of `url` alone.
    """

    label: str
    url: str = field(repr=False)  # may hold a signature
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str) -> Self:
        """A file named by its URL; RequestError where that is none, or holds a password."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port  # `port` raises for what is no number
        except ValueError as error:
            raise RequestError(f"{url} is not a URL: {error}", hint="write it as https://host/file.gguf") from error
        if parts.scheme not in SCHEMES or not host or parts.path in ("", "/"):
            raise RequestError(f"{url} names no file on a server", hint="write it as https://host/file.gguf")
        if parts.username is not None or parts.password is not None:
            raise RequestError(f"the URL of {host} holds a user name", hint="download the file first, and name it")
        path = quote(parts.path, safe="/%:@!$&'()*+,;=~")
        return cls(
            urlunsplit((parts.scheme, parts.netloc, path, "", "")),
            urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")),
        )

    def __str__(self) -> str:
        return self.label

    @property
    def name(self) -> str:
        """The last part of the name, as a local copy would be called."""
        return unquote(self.label.rpartition("/")[2])

    @property
    def stem(self) -> str:
        """`name` without what follows its last dot."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return origin_of(self.url)

    @property
    def on_hub(self) -> bool:
        """Whether it is named as a file of a repository."""
        return self.label.startswith(HUB_PREFIX)

    @property
    def download_command(self) -> str:
        """What to type to have the file here, in the current folder, with the other shards if it is one."""
        if not self.on_hub:
            counted = _all_shards(self.label, "[00001-{count}]")  # curl fetches each of them
            return shlex.join(("curl", "-L", "-O", counted))
        owner, repo, path = self.label.removeprefix(HUB_PREFIX).split("/", 2)
        shards = _all_shards(path, "*")
        files = (path,) if shards == path else ("--include", shards)
        return shlex.join(("hf", "download", f"{owner}/{repo}", *files, "--local-dir", "."))

    def with_name(self, name: str) -> Self:
        """The file called `name` beside this one."""
        parts = urlsplit(self.url)
        shown = name if self.on_hub else quote(name)
        return replace(
            self,
            label=f"{self.label.rpartition('/')[0]}/{shown}",
            url=urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{quote(name)}")),
        )


def _all_shards(name: str, numbers: str) -> str:
    """`name`, of a shard with `numbers` in place of its own, which may speak of their `{count}`."""
    shard = SHARD_NAME.fullmatch(name)
    if shard is None:
        return name
    return f"{shard['stem']}-{numbers.format(count=shard['count'])}-of-{shard['count']}.gguf"


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, in one spelling."""
    parts = urlsplit(url)
    port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.scheme}://{parts.hostname}:{port}"
