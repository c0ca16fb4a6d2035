"""Get the source archive: from the cache, or by name from the index that pip is set to use."""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from d2ctx.errors import UserError
from d2ctx.files import user_cache
from d2ctx.install.isolated import last_line
from d2ctx.install.source import PROJECT, SDIST_NAME, SDIST_SHA256, sha256_of, verify

if TYPE_CHECKING:
    from pypi_simple import PyPISimple

_OFFLINE = f"or download {SDIST_NAME} elsewhere and pass it with --sdist"


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What of pip's configuration decides where and how a file is downloaded.

    Args:
        index_url: The configured index, or None for pip's default.
        extra_index_urls: Further indexes, tried in order after the first.
        no_index: Whether pip is told to use no index at all.
        cert: A bundle of certificate authorities, or None for the default one.
        proxy: A proxy URL; proxies from the environment are honoured without it.
        timeout: Seconds to wait for an answer.
    """

    index_url: str | None = None
    extra_index_urls: tuple[str, ...] = ()
    no_index: bool = False
    cert: str | None = None
    proxy: str | None = None
    timeout: float = 60.0


def parse_pip_config(listing: str) -> dict[str, str]:
    """Read the output of `pip config list` into option -> value.

    The section of the `install` command overrides `global`, and the environment overrides both,
    as in pip itself.

    Args:
        listing: Lines such as `global.index-url='...'`.

    Returns:
        Option names without their section, for example `index-url`.
    """
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        section, dot, option = key.strip().partition(".")
        if equals and dot and section in sections:
            sections[section][option] = _unquote(value.strip())
    return sections["global"] | sections["install"] | sections[":env:"]


def _unquote(value: str) -> str:
    try:
        return str(ast.literal_eval(value))
    except (SyntaxError, ValueError):
        return value


def index_settings(options: dict[str, str]) -> IndexSettings:
    """Pick from pip's options what a download needs; a value that cannot be read is ignored."""
    timeout = options.get("timeout") or options.get("default-timeout") or ""
    return IndexSettings(
        index_url=options.get("index-url"),
        extra_index_urls=tuple(options.get("extra-index-url", "").split()),
        no_index=options.get("no-index", "").lower() in {"1", "true", "yes", "on"},
        cert=options.get("cert"),
        proxy=options.get("proxy"),
        timeout=float(timeout) if timeout.replace(".", "", 1).isdigit() else 60.0,
    )


def pip_settings() -> IndexSettings:
    """Ask this interpreter's pip for its merged configuration.

    Raises:
        UserError: This interpreter has no usable pip.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError(
            f"expected pip in the environment of {sys.executable}, got: "
            f"{last_line(done.stderr)}; run: python -m ensurepip --upgrade"
        )
    return index_settings(parse_pip_config(done.stdout))


def without_password(url: str) -> str:
    """Return a URL that can be shown: credentials are replaced by three stars."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def index_urls(settings: IndexSettings, *, default: str) -> list[str]:
    """Return the indexes to try, in order.

    Args:
        settings: What pip is configured for. Indexes that are folders (file://) are left out: they
            cannot be asked by name.
        default: What stands for pip's own default index.
    """
    if settings.no_index:
        return []
    first = [default] if settings.index_url is None else [settings.index_url]
    urls = [*first, *settings.extra_index_urls]
    return [url for url in urls if url == default or urlsplit(url).scheme in {"http", "https"}]


def cache_folder() -> Path:
    """Return this project's cache folder, or a temporary one where no home can be written."""
    folder = user_cache() / "ctxseg"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a home that cannot be written costs the cache, not the installation
    return Path(tempfile.mkdtemp(prefix="ctxseg-"))


def fetch_sdist(*, cache: Path | None = None, settings: IndexSettings | None = None) -> Path:
    """Return a verified copy of the source archive, downloading it when the cache has none.

    Args:
        cache: Folder that keeps the archive; the project's cache folder by default.
        settings: Where to download from; pip's configuration by default.

    Returns:
        The path of the archive.

    Raises:
        UserError: No index had the archive, or what it had is not the expected one.
    """
    folder = cache_folder() if cache is None else cache
    target = folder / SDIST_NAME
    if target.is_file() and sha256_of(target) == SDIST_SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / SDIST_NAME
        download(fresh, settings=pip_settings() if settings is None else settings)
        verify(fresh)
        fresh.replace(target)
    return target


def download(target: Path, *, settings: IndexSettings) -> None:
    """Download the archive from the first index that has it.

    Args:
        target: Where to write it.
        settings: The indexes and how to reach them.

    Raises:
        UserError: No index could deliver it; the message says why for each.
    """
    try:
        from pypi_simple import PYPI_SIMPLE_ENDPOINT
    except ImportError as error:
        raise UserError(
            f"expected the library pypi-simple, which downloads by name, got: {error}; "
            f"run: python -m pip install pypi-simple, {_OFFLINE}"
        ) from error
    failures = []
    for url in index_urls(settings, default=PYPI_SIMPLE_ENDPOINT):
        try:
            _download_from(url, target=target, settings=settings)
            return
        # An index can fail in many ways (network, certificate, format, missing project); each is
        # reported, and the next index is tried.
        except Exception as error:
            failures.append(f"{without_password(url)}: {type(error).__name__}: {error}")
    reasons = " | ".join(failures) or "pip is configured to use no http(s) index"
    raise UserError(
        f"expected {SDIST_NAME} on the package index, got: {reasons}; "
        f"check pip's index settings (python -m pip config list) and the network, {_OFFLINE}"
    )


def _download_from(url: str, *, target: Path, settings: IndexSettings) -> None:
    with _client(url, settings=settings) as client:
        page = client.get_project_page(PROJECT, timeout=settings.timeout)
        found = [package for package in page.packages if package.filename == SDIST_NAME]
        if not found:
            raise LookupError(f"{PROJECT} has no file {SDIST_NAME} there")
        # The checksum is verified by the caller, whatever digests this index publishes.
        client.download_package(found[0], target, verify=False, timeout=settings.timeout)


@contextmanager
def _client(url: str, *, settings: IndexSettings) -> Iterator["PyPISimple"]:
    import requests
    from pypi_simple import PyPISimple

    with requests.Session() as session:
        if settings.cert:
            session.verify = settings.cert
        if settings.proxy:
            session.proxies = {"http": settings.proxy, "https": settings.proxy}
        yield PyPISimple(endpoint=url, session=session)
