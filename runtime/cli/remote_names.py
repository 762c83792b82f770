"""Names of models that lie on a server: URLs, and `hf:` names of repositories, resolved through `huggingface_hub`.

Knows nothing about reading files. Resolving a URL asks nobody; resolving a repository asks the hub for its list of
files. The environment is the hub's own: `HF_TOKEN` and `HF_ENDPOINT`.
"""

import os
import re
import shlex
from dataclasses import dataclass, replace
from json import JSONDecodeError
from typing import Self

from offload.errors import FlashError, RequestError, StrataError
from offload.gguf_shards import SHARD_NAME
from offload.remote_file import HUB_PREFIX, RemoteFile, origin_of

DEFAULT_ENDPOINT = "https://huggingface.co"
FORMS = "hf:org/repo:Q4_K_M or hf:org/repo/file.gguf"
INSTALL = "pip install 'strata[hub]'"
PROJECTOR = "mmproj"  # images for a model beside it, not a model
SHOWN_CHOICES = 40
TIMEOUT_S = 20.0
CHECK_ENDPOINT = f"unset HF_ENDPOINT, or set it to a hub's address, like {DEFAULT_ENDPOINT}"
_PART = r"[\w.-]+"
_PAGE = re.compile(r"^(https?://[^/]+/[^/]+/[^/]+)/blob/")
_HUB_NAME = re.compile(rf"hf:(?P<repo>{_PART}/{_PART})(?:/(?P<path>.+)|:(?P<quant>[\w.-]+))?")


def is_remote(name: str) -> bool:
    """Whether `name` is that of a file on a server."""
    return name.startswith(HUB_PREFIX) or name.lower().startswith(("https://", "http://"))


def remote_file(name: str) -> RemoteFile:
    """The file that `name` means; RequestError where it means none or several, FlashError if the hub fails."""
    if name.startswith(HUB_PREFIX):
        return _HubName.parse(name).resolve()
    file = RemoteFile.from_url(name)
    if file.origin != origin_of(hub_endpoint()):
        return file
    url = _PAGE.sub(r"\1/resolve/", file.url)  # what the browser shows is a page about the file
    return replace(RemoteFile.from_url(url), token=os.environ.get("HF_TOKEN", "").strip() or None)


def download_command(name: str) -> str:
    """What to type to have here what `name` means; asks nobody."""
    if not name.startswith(HUB_PREFIX):
        return RemoteFile.from_url(name).download_command
    hub = _HubName.parse(name)
    if hub.path:
        return RemoteFile(name, "").download_command
    return shlex.join(("hf", "download", hub.repo, "--include", f"*{hub.quant or '.gguf'}*", "--local-dir", "."))


def hub_endpoint() -> str:
    """Where the hub is: `HF_ENDPOINT`, or huggingface.co; RequestError where that is no URL."""
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    try:
        RemoteFile.from_url(f"{endpoint}/file")
    except RequestError as error:
        raise RequestError(f"HF_ENDPOINT: {error}", hint=CHECK_ENDPOINT) from error
    return endpoint


@dataclass(frozen=True, slots=True)
class _HubName:
    """A repository, and which file of it: by its path, by a quant type, or the only one."""

    repo: str
    path: str | None
    quant: str | None

    @classmethod
    def parse(cls, name: str) -> Self:
        found = _HUB_NAME.fullmatch(name)
        if found is None:
            raise RequestError(f"{name} is not the name of a model on the hub", hint=f"write it as {FORMS}")
        return cls(found["repo"], found["path"], found["quant"])

    def resolve(self) -> RemoteFile:
        """Where the file is."""
        try:
            from huggingface_hub import get_token, hf_hub_url  # noqa: PLC0415 - an extra
            from huggingface_hub.errors import HFValidationError  # noqa: PLC0415
        except ImportError as error:
            raise RequestError(
                f"{HUB_PREFIX}{self.repo}: names of the hub need the package huggingface_hub", hint=INSTALL
            ) from error
        token, endpoint = get_token(), hub_endpoint()
        try:
            path = self.path or self.choose(_gguf_files(self.repo, endpoint, token))
            return RemoteFile(f"{HUB_PREFIX}{self.repo}/{path}", hf_hub_url(self.repo, path, endpoint=endpoint), token)
        except HFValidationError as error:
            raise RequestError(f"{HUB_PREFIX}{self.repo}: {error}", hint=f"write it as {FORMS}") from error

    def choose(self, paths: list[str]) -> str:
        """The one of `paths` that is meant, the first shard of several; RequestError naming the choices."""
        models = [path for path in paths if PROJECTOR not in path.lower() and _is_first(path)]
        fitting = models if self.quant is None else [path for path in models if _has_quant(path, self.quant)]
        if len(fitting) == 1:
            return fitting[0]
        where = f"{HUB_PREFIX}{self.repo}"
        if not models:
            raise RequestError(f"{where} holds no GGUF file", hint="name a repository of GGUF conversions")
        if not fitting:
            raise RequestError(f"{where} has no file of {self.quant}", hint=f"it has {_listed(models)}")
        several = f"{len(fitting)} files of {self.quant}" if self.quant else f"{len(fitting)} GGUF files"
        raise RequestError(f"{where} has {several}", hint=f"name one: {_listed(fitting, where)}")


def _gguf_files(repo: str, endpoint: str, token: str | None) -> list[str]:
    """Paths of the GGUF files in a repository, sorted."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - an extra
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    # With the error of the HTTP library that this version of the hub's is built on.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        hub = HfApi(endpoint=endpoint, token=token or False, library_name="strata")
        files = hub.model_info(repo, timeout=TIMEOUT_S).siblings or []  # asked once: lists of trees retry for 23 s
    except failures as error:
        raise _hub_error(repo, endpoint, error) from error
    except (JSONDecodeError, KeyError) as error:
        raise FlashError(
            f"{HUB_PREFIX}{repo}: {endpoint} does not answer as a hub does", hint=CHECK_ENDPOINT
        ) from error
    return sorted(file.rfilename for file in files if file.rfilename.lower().endswith(".gguf"))


def _hub_error(repo: str, endpoint: str, error: Exception) -> StrataError:
    """What the hub's refusal, or the failure to reach it, means."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    where = f"{HUB_PREFIX}{repo}"
    if status in (401, 403, 404):
        return RequestError(
            f"{where}: {endpoint} shows no such repository (status {status})",
            hint="check the name; for a gated or private one accept its terms on its page, and set HF_TOKEN",
        )
    if status is not None:
        return FlashError(f"{where}: {endpoint} answers {status}", hint="try again later")
    return FlashError(f"{where}: {endpoint} cannot be asked: {error}", hint="check the connection, then start again")


def _is_first(path: str) -> bool:
    """Whether this is a whole model, or the first of its shards."""
    shard = SHARD_NAME.fullmatch(path)
    return shard is None or int(shard["number"]) == 1


def _has_quant(path: str, quant: str) -> bool:
    """Whether a part of the path is `quant`: `Q4_K` is no part of `IQ4_K` nor of `Q4_K_M`."""
    return re.search(rf"(?<![^\W_]){re.escape(quant)}(?!\w)", path, re.IGNORECASE) is not None


def _listed(paths: list[str], where: str = "") -> str:
    more = f" and {len(paths) - SHOWN_CHOICES} more" if len(paths) > SHOWN_CHOICES else ""
    return ", ".join(f"{where}/{path}" if where else path for path in paths[:SHOWN_CHOICES]) + more
