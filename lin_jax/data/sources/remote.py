"""Names of what lies on the Hugging Face Hub or at a web address, and the local copies that are fetched of it.

`hub:OWNER/NAME` is a repository of the Hub, `hub:OWNER/NAME/PATH` a file in it, `https://HOST/PATH` a file elsewhere.
Files and repositories of the Hub are kept where its own client keeps them (HF_HOME); files of other places, and
beginnings of files that are too large to be fetched whole, in the folder `lin_jax` beside that.
"""

import shutil
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from lin_jax.errors import UserError
from lin_jax.files import replacement

HUB_PREFIX, WEB_PREFIX = "hub:", "https://"
# Kinds of the Hub's repositories.
MODEL, DATA_SET = "model", "dataset"
# Seconds after which a server is out of reach, and for which that is not asked again.
_PATIENCE, _REMEMBERED = 5.0, 60.0
_SAME_FILE = "a copy of that file"
_reached: dict[tuple[str, int], tuple[float, bool]] = {}


class NoNetworkError(UserError):
    """Something remote that is wanted without a network, and of which no copy is kept from before.

    Args:
        name: of what is wanted.
        copy: a local copy that would do, in words.
        option: the option of the command line that takes its path; None if that is not known.
    """

    def __init__(self, name: str, copy: str, option: str | None = None) -> None:
        place = "its path in place of that name" if option is None else f"its path with {option}"
        super().__init__(f"{name} cannot be fetched, there is no network; get {copy} and give {place}")
        self.name, self.copy, self.option = name, copy, option


@contextmanager
def given_by(option: str) -> Iterator[None]:
    """Lets a `NoNetworkError` say which option takes a local copy, if it does not say so yet."""
    try:
        yield
    except NoNetworkError as error:
        if error.option is not None:
            raise
        raise NoNetworkError(error.name, error.copy, option) from error


@dataclass(frozen=True)
class RemoteName:
    """A repository of the Hub, a file in one, or a file of the web.

    Attributes:
        text: as it is written.
        repository: `OWNER/NAME` on the Hub; None for a file of the web.
        file: path in the repository, or the path of the address; None for a whole repository.
    """

    text: str
    repository: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> "RemoteName":
        """Reads a name with its prefix.

        Raises:
            UserError: it names nothing.
        """
        if text.startswith(WEB_PREFIX):
            address = urlsplit(text)
            name = cls(text, None, address.path.strip("/"))
            whole = bool(address.hostname and name.file)
        else:
            owner, _, rest = text.removeprefix(HUB_PREFIX).partition("/")
            repository, _, file = rest.partition("/")
            name = cls(text, f"{owner}/{repository}" if rest else owner, file or None)
            whole = bool(owner) and ("/" not in text or bool(repository)) and not text.endswith("/")
        if not whole or not {"", ".", ".."}.isdisjoint((name.file or "x").split("/")):
            raise UserError(f"{text!r} names nothing; give hub:OWNER/NAME, hub:OWNER/NAME/FILE, or https://HOST/FILE")
        return name

    @property
    def is_file(self) -> bool:
        """True if it names one file, False for a whole repository."""
        return self.file is not None


def is_remote(name: str | Path) -> bool:
    """True for a name with the prefix of the Hub or of the web."""
    return str(name).startswith((HUB_PREFIX, WEB_PREFIX))


def is_remote_file(name: str | Path) -> bool:
    """True for a name of one file on the Hub or on the web."""
    return is_remote(name) and RemoteName.parse(str(name)).is_file


def fetch_repository(
    name: str, copy: str, allow_patterns: Sequence[str], ignore_patterns: Sequence[str] = ("*/*",)
) -> Path:
    """The folder of a model's repository on the Hub, of which the files that fit the patterns are fetched.

    Args:
        name: of the repository, `hub:` left away or not.
        copy: a local copy that would do without a network, in words.
        allow_patterns: files that are fetched.
        ignore_patterns: of those, files that are not.

    Raises:
        NoNetworkError: there is no network, and no copy from before.
        Exception: dozens of kinds, where the Hub has no such repository.
    """
    # Imported only now, when the network is wanted.
    from huggingface_hub import snapshot_download

    with asking_the_hub(f"{HUB_PREFIX}{name.removeprefix(HUB_PREFIX)}", copy):
        return Path(
            snapshot_download(
                name.removeprefix(HUB_PREFIX),
                allow_patterns=list(allow_patterns),
                ignore_patterns=list(ignore_patterns),
            )
        )


def fetch_file(name: str, kind: str, max_bytes: int | None = None) -> Path:
    """The local copy of one file, which is fetched if there is none yet.

    Args:
        name: of the file.
        kind: of the Hub's repository: `MODEL` or `DATA_SET`.
        max_bytes: bytes from the beginning that are enough; the copy ends with the last whole line of them. None
            fetches the whole file.

    Raises:
        UserError: there is no such file, or no network to fetch it by.
    """
    remote = RemoteName.parse(name)
    if max_bytes is not None:
        return _fetch_head(remote, kind, max_bytes)
    with _failures(remote):
        if remote.repository is None:
            return _fetch_web_file(remote)
        from huggingface_hub import hf_hub_download

        assert remote.file is not None, "a name of a file"
        with asking_the_hub(remote.text, _SAME_FILE):
            return Path(hf_hub_download(remote.repository, remote.file, repo_type=kind))


@contextmanager
def asking_the_hub(name: str, copy: str) -> Iterator[None]:
    """Runs something that asks the Hub; without a network that only looks at what is kept, and does not try for long.

    Args:
        name: of what is wanted.
        copy: a local copy that would do without a network, in words.

    Raises:
        NoNetworkError: there is no network, and what is wanted is not kept.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = _hub_is_offline()
    with _offline_mode() if offline else nullcontext():
        try:
            yield
        except (LocalEntryNotFoundError, ConnectionError) as error:
            # With a network, the former is also said of a server that is out of order.
            if offline or isinstance(error, ConnectionError):
                raise NoNetworkError(name, copy) from error
            raise


def _hub_is_offline() -> bool:
    from huggingface_hub import constants

    return constants.is_offline_mode() or not _in_reach(constants.ENDPOINT)


@contextmanager
def _offline_mode() -> Iterator[None]:
    """Tells the Hub's clients, where they are imported, to use what they keep: else they try for half a minute."""
    names = ("huggingface_hub.constants", "datasets.config")
    modules: list[Any] = [sys.modules[name] for name in names if name in sys.modules]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _in_reach(address: str) -> bool:
    """True if the server of an address, or the proxy on the way to it, takes a connection."""
    parts = urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    place = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    when, answered = _reached.get(place, (-_REMEMBERED, False))
    if not answered and time.monotonic() - when >= _REMEMBERED:
        # In a thread of its own: looking up a name cannot be interrupted, and can take a minute.
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(_connects(place)), daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        answered = bool(found and found[0])
        _reached[place] = (time.monotonic(), answered)
    return answered


def _connects(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


@contextmanager
def _failures(name: RemoteName) -> Iterator[None]:
    """Turns what the network and the Hub raise, dozens of kinds, into a line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200].rstrip(". ")
        raise UserError(f"{name.text} cannot be fetched: {reason}; check the name") from error


def _kept(name: RemoteName, kind: str, *inner: str) -> Path:
    """The place of a file of the web, or of the beginning of one, beside what the Hub's client keeps."""
    from huggingface_hub import constants

    *folders, last = str(name.file).split("/")
    owner = [str(urlsplit(name.text).hostname)] if name.repository is None else [f"{kind}s", name.repository]
    return Path(constants.HF_HOME, "lin_jax", *owner, *folders, *inner, last)


def _fetch_web_file(name: RemoteName) -> Path:
    place = _kept(name, MODEL)
    if not place.is_file():
        with _open_web_file(name) as response:
            _keep(place, response)
    return place


def _open_web_file(name: RemoteName, max_bytes: int | None = None) -> Any:
    if not _in_reach(name.text):
        raise NoNetworkError(name.text, _SAME_FILE)
    headers = {} if max_bytes is None else {"Range": f"bytes=0-{max_bytes - 1}"}
    return urllib.request.urlopen(urllib.request.Request(name.text, headers=headers), timeout=60)


def _fetch_head(name: RemoteName, kind: str, max_bytes: int) -> Path:
    """The beginning of a file, the same whether it comes from the network or from a larger part that is kept."""
    place = _kept(name, kind, f"first-{max_bytes}")
    if place.is_file():
        return place
    larger = _larger_copy(name, kind, max_bytes)
    with _failures(name):
        if larger is not None:
            with larger.open("rb") as file:
                data = file.read(max_bytes)
        elif name.repository is None:
            with _open_web_file(name, max_bytes) as response:
                data = response.read(max_bytes)
        else:
            data = _hub_head(name, kind, max_bytes)
        # A file that is shorter than that is whole.
        lines = data if len(data) < max_bytes else data[: data.rfind(b"\n") + 1]
        _keep(place, BytesIO(lines or data.decode(errors="ignore").encode()))
    return place


def _hub_head(name: RemoteName, kind: str, max_bytes: int) -> bytes:
    from huggingface_hub import HfFileSystem

    if _hub_is_offline():
        raise NoNetworkError(name.text, _SAME_FILE)
    prefix = "" if kind == MODEL else f"{kind}s/"
    with HfFileSystem().open(f"{prefix}{name.repository}/{name.file}", "rb", cache_type="none") as file:
        return bytes(file.read(max_bytes))


def _larger_copy(name: RemoteName, kind: str, max_bytes: int) -> Path | None:
    """The whole file, if it is kept, or a longer beginning of it."""
    from huggingface_hub import try_to_load_from_cache

    if name.repository is None:
        whole: Any = _kept(name, kind)
    else:
        whole = try_to_load_from_cache(name.repository, str(name.file), repo_type=kind)
    if isinstance(whole, str | Path) and Path(whole).is_file():
        return Path(whole)
    # They end with a whole line, some bytes earlier than their folder says.
    longer = _kept(name, kind).parent.glob(f"first-*/{Path(str(name.file)).name}")
    return min((place for place in longer if place.stat().st_size >= max_bytes), default=None)


def _keep(place: Path, content: IO[bytes]) -> None:
    """Writes a file that appears when it is whole."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacement(place) as partial, partial.open("wb") as file:
            shutil.copyfileobj(content, file)
    except PermissionError as error:
        raise UserError(f"cannot write {place} ({error.strerror}); give another folder with HF_HOME") from error
