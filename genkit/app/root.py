"""Where visitors find the page: its scheme, host and path, which a proxy may change."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

LOCAL = ("localhost", "127.0.0.1", "::1")  # names by which a browser finds its own machine


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class Root:
    """Where visitors find the page if a proxy passes their requests on.

    Args:
        origin: such as https://example.org; "" for the one where the page listens.
        path: such as /genkit; "" for the top.
    """

    origin: str = ""
    path: str = ""

    def __str__(self) -> str:
        return self.origin + self.path

    @property
    def host(self) -> str | None:
        """The name in its origin; None without one."""
        return urlsplit(self.origin).hostname

    def is_local(self) -> bool:
        """Whether its name is one of this machine alone; True without one."""
        return self.host is None or is_loopback(self.host)

    def below(self, path: str) -> str:
        """Return the path of a request without the root's, whether the proxy removed it or not."""
        inside = self.path and path.startswith(f"{self.path}/")
        return path[len(self.path) :] if inside else path


TOP = Root()  # no proxy
HUB = "https://huggingface.co"  # whose pages show Spaces in a frame


def parse_root(text: str) -> Root:
    """Read a root from a path or a whole address.

    Raises:
        ValueError: it is neither.
    """
    found = re.fullmatch(
        r"(https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]{1,5})?)?((?:/(?!\.\.?(?:/|$))[\w.~-]+)*)/?",
        text,
        re.ASCII,
    )
    if found is None:
        raise ValueError(
            f"root_path must be a path such as /genkit or an address such as "
            f"https://example.org/genkit, got {text!r}"
        )
    origin = (found[1] or "").lower()
    for scheme, port in (("https://", ":443"), ("http://", ":80")):  # which browsers leave out
        if origin.startswith(scheme):
            origin = origin.removesuffix(port)
    return Root(origin, found[2])


def space_root(hosts: str) -> Root:
    """Return where visitors find a Hugging Face Space.

    Args:
        hosts: the variable SPACE_HOST of the Space; if it has a domain of its own, that is behind
            a comma.

    Raises:
        ValueError: it is no host name.
    """
    host = hosts.partition(",")[0].strip()
    if not re.fullmatch(r"[A-Za-z0-9.-]+", host):
        raise ValueError(f"space must be a host such as user-demo.hf.space, got {hosts!r}")
    return parse_root(f"https://{host}")
