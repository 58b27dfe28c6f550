"""Which URLs and which addresses this server sends requests to on behalf of strangers: public ones, unless the operator
says more.

A URL has one shape: a single expression takes it apart, and nothing parses it again.
Sources: https://www.iana.org/assignments/iana-ipv4-special-registry, its IPv6 sister, RFC 6052 (NAT64), RFC 3986.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NamedTuple

from ropeway.config.jobs import JobsConfig
from ropeway.errors import ConfigError, RequestError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\])(?::(?P<port>[0-9]{1,5}))?"
    r'(?P<target>[/?][!"$-~]*)?',
    re.ASCII | re.IGNORECASE,
)
_MAX_URL: Final = 2048
_PORTS: Final = {"http": 80, "https": 443}
_SHAPE: Final = (
    f"Give an absolute one of at most {_MAX_URL} ASCII characters, such as https://example.com/hook, without user, "
    "password, fragment and spaces."
)

# Written out, because `is_global` differs between patch releases of Python and calls some multicast groups global.
_NOT_PUBLIC: Final = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
            "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24",
            "203.0.113.0/24", "224.0.0.0/3",
            "168.63.129.16/32",  # the host of a virtual machine at Azure
            "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
        ),
    )
)  # fmt: skip
_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")


def is_public(address: Address) -> bool:
    """Whether `address`, and the IPv4 address inside it if there is one, belongs to the public internet."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _UNICAST:
            return False
    return not any(address in network for network in _NOT_PUBLIC)


class Target(NamedTuple):
    """A URL taken apart. `host` is in lower case, without the brackets of an IPv6 address."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def literal(self) -> Address | None:
        """The address that the host spells, in one of the old ways too (127.1, 0x7f000001); None: it is a name."""
        try:
            return ip_address(self.host)
        except ValueError:
            pass
        try:
            return IPv4Address(socket.inet_aton(self.host))
        except OSError:
            return None

    @property
    def header(self) -> str:
        """What the `Host` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def take_apart(url: str) -> Target | None:
    """None if `url` is not an absolute http or https URL, or has anything in it that is not needed to name a receiver:
    a user, a password, a fragment, spaces, letters beyond ASCII."""
    found = _URL.fullmatch(url) if len(url) <= _MAX_URL else None
    if found is None:
        return None
    scheme, host, path = found["scheme"].lower(), found["host"].lower(), found["target"] or "/"
    port = int(found["port"] or _PORTS[scheme])
    target = Target(scheme, host.strip("[]"), port, path if path.startswith("/") else "/" + path)
    if not 0 < port < 65536 or (host.startswith("[") and not isinstance(target.literal, IPv6Address)):
        return None
    return target


@dataclass(frozen=True)
class Rules:
    """Where requests may go. `names` and `networks` need not be public, `trusted` URLs obey no rule."""

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    ports: tuple[range, ...] = (range(80, 81), range(443, 444), range(8443, 8444))
    allow_http: bool = False
    trusted: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: JobsConfig) -> Rules:
        """The operator's. Raises ConfigError."""
        names, networks = set(), []
        for entry in _entries(config.webhook_allow):
            try:
                networks.append(ip_network(entry, strict=False))
            except ValueError:
                if take_apart(f"http://{entry}/") != Target("http", entry.lower(), 80, "/"):
                    raise ConfigError(
                        f"--webhook-allow has {entry!r}; it must be host names, addresses, and networks such as "
                        "10.0.0.0/8, with commas between them.",
                        param="webhook_allow",
                    ) from None
                names.add(entry.lower())
        if config.webhook_url is not None and take_apart(config.webhook_url) is None:
            raise ConfigError(f"--webhook-url is not a URL of a receiver. {_SHAPE}", param="webhook_url")
        return cls(
            names=frozenset(names),
            networks=tuple(networks),
            ports=tuple(map(_port_range, _entries(config.webhook_ports))),
            allow_http=config.webhook_allow_http,
            trusted=frozenset({config.webhook_url} if config.webhook_url is not None else ()),
        )

    def check_url(self, url: str, *, param: str = "callback_url") -> Target:
        """`url` taken apart, if a request may go there as far as that can be said before its name is resolved.

        Raises RequestError, naming the field `param`.
        """
        target = take_apart(url)
        if target is None:
            raise RequestError(f"{param} is not a URL of a receiver. {_SHAPE}", param=param)
        if url in self.trusted:
            return target
        if target.scheme == "http" and not self.allow_http:
            raise RequestError(
                f"{param} is an http URL, but this server sends to https URLs alone. Use https; the operator can allow "
                "http with --webhook-allow-http.",
                param=param,
            )
        if not any(target.port in ports for ports in self.ports):
            shown = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in self.ports)
            raise RequestError(
                f"{param} names port {target.port}, but this server sends to port {shown} alone. Use one of them; the "
                "operator can add others with --webhook-ports.",
                param=param,
            )
        if target.literal is not None:
            self.check_address(target, target.literal, param=param)
        return target

    def check_address(self, target: Target, address: Address, *, param: str = "callback_url") -> None:
        """Raises RequestError unless a request to `target` may go to `address`."""
        mapped: Address = getattr(address, "ipv4_mapped", None) or address
        if target.host in self.names or any(mapped in network for network in self.networks):
            return
        if not is_public(address) or is_own(mapped):
            raise RequestError(
                f"{param} leads to {address}, which is not a public address of another machine. The operator can allow "
                "it with --webhook-allow.",
                param=param,
            )


def is_own(address: Address) -> bool:
    """Whether this machine itself has `address`: then the kernel takes it as the source as well. Sends nothing."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))
        except OSError:
            return False
        return ip_address(probe.getsockname()[0]) == address


def _entries(text: str | None) -> list[str]:
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def _port_range(text: str) -> range:
    low, _, high = text.partition("-")
    try:
        ports = range(int(low), int(high or low) + 1)
    except ValueError:
        ports = range(0)
    if not ports or ports[0] < 1 or ports[-1] > 65535:
        raise ConfigError(
            f"--webhook-ports has {text!r}; it must be ports and ranges such as 443,8000-8999.", param="webhook_ports"
        )
    return ports
