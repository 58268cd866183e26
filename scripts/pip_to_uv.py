"""pip's settings in uv's terms: mirror, wheel directories, certificates, proxy. Stdlib only."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path


def say(text: str) -> None:
    """One line of the set-up for people."""
    print(f"set-up: {text}", flush=True)


def hide_passwords(text: str) -> str:
    """`text` with the user part of every URL blanked."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def pip_settings(listing: str) -> dict[str, list[str]]:
    """Option name -> its words, from the output of `pip config list`.

    As in pip itself, the environment beats [install], which beats [global].
    """
    ranks = {"global": 0, "install": 1, ":env:": 2}
    best: dict[str, tuple[int, list[str]]] = {}
    for line in listing.splitlines():
        name, separator, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if not separator or section not in ranks:
            continue
        words = str(ast.literal_eval(value)).split()
        option = {"default-timeout": "timeout"}.get(option, option)
        if ranks[section] >= best.get(option, (-1, []))[0]:
            best[option] = (ranks[section], words)
    return {option: words for option, (_, words) in best.items() if words}


def usable(locations: list[str], option: str) -> list[str]:
    """The locations that may exist: URLs as they are, local directories only when present."""
    kept = []
    for location in locations:
        local = location.removeprefix("file://") if "://" not in location or location.startswith("file://") else None
        if local is None or Path(local).expanduser().exists():
            kept.append(location if local is None else location.replace("~", str(Path.home()), 1))
        else:
            say(f"pip's {option} names {local}, which does not exist: left out")
    return kept


def uv_environment(settings: Mapping[str, list[str]], environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that give uv the user's pip settings; one that is set already wins."""
    wanted = {
        "UV_FIND_LINKS": ",".join(usable(settings.get("find-links", []), "find-links")),
        "UV_DEFAULT_INDEX": " ".join(settings.get("index-url", [])[:1]),
        "UV_EXTRA_INDEX_URL": " ".join(usable(settings.get("extra-index-url", []), "extra-index-url")),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", [])),
        "UV_HTTP_TIMEOUT": " ".join(settings.get("timeout", [])[:1]),
        "SSL_CERT_FILE": " ".join(settings.get("cert", [])),
        "SSL_CLIENT_CERT": " ".join(settings.get("client-cert", [])),
        "ALL_PROXY": " ".join(settings.get("proxy", [])),
        # pip takes the best version over all indexes and trusts the system's certificates
        "UV_INDEX_STRATEGY": "unsafe-best-match" if settings.get("extra-index-url") else "",
        "UV_SYSTEM_CERTS": "" if settings.get("cert") or "SSL_CERT_FILE" in environment else "true",
        "UV_NO_PROGRESS": "" if sys.stderr.isatty() else "1",
    }
    return {name: value for name, value in wanted.items() if value and name not in environment}
