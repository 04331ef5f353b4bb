"""URLs of endpoints, whose passwords are neither written nor shown."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from holdfast.errors import ConfigError

_LOGIN = re.compile(r"(?<=://)[^\s/]*@")


def hide_logins(text: str) -> str:
    """A text in which user names and passwords of URLs are left out."""
    return _LOGIN.sub("USER:PASSWORD@", text)


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """The base of an endpoint without a login, and the login: a user name and a password.

    Raises:
        ConfigError: it is no URL that can be asked. The message does not show what may be a password.
    """
    scheme, sep, rest = url.strip().partition("://")
    place, slash, path = rest.partition("/")
    login, at, host = place.rpartition("@")
    if "@" in path or (not sep and "@" in url):
        raise ConfigError(
            "endpoint: the URL has an @ behind its host, or no http:// before it; in a user name or a password, "
            "/ is written %2F, @ %40 and % %25"
        )
    clean = f"{scheme}{sep}{host}{slash}{path}".rstrip("/")
    if "?" in clean or "#" in clean:
        raise ConfigError(
            f"endpoint {re.split('[?#]', clean)[0]!r}: has more behind ? or #; give the base alone, such as "
            "http://localhost:8000/v1"
        )
    try:
        parts = urlsplit(clean)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not clean.isprintable() or " " in clean:
        raise ConfigError(f"endpoint {clean!r}: is no URL that can be asked; http://localhost:8000/v1 is one")
    if not at:
        return clean, None
    user, _, password = login.partition(":")
    return clean, (unquote(user), unquote(password))
