"""Nothing that a client can write as a URL, and nothing that its name server says, leads to a private address."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpcore2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ropeway.config import ServerConfig
from ropeway.errors import ConfigError, RequestError
from ropeway.jobs import destinations
from ropeway.jobs.destinations import Address, Rules, is_own, is_public, take_apart
from ropeway.jobs.egress import Egress
from webhookkit import LOOPBACK, receiving, status

STRICT = Rules(ports=(range(1, 65536),), allow_http=True)
"""Rules under which the address alone decides."""

PRIVATE = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "100.64.0.1", "169.254.169.254", "172.31.255.255",
    "192.0.0.192", "192.168.1.1", "198.18.0.1", "203.0.113.9", "224.0.1.1", "239.255.255.250", "240.0.0.1",
    "255.255.255.255", "168.63.129.16", "192.88.99.1", "100.100.100.200",
    "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "100::1", "2001::1", "2001:0:7f00:1::", "2001:db8::1", "2002:7f00:1::",
    "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1",
]  # fmt: skip
PUBLIC = ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


@pytest.mark.parametrize("text", PRIVATE)
def test_what_is_private(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_what_is_public(text: str) -> None:
    assert is_public(ip_address(text))


@given(st.ip_addresses())
def test_public_is_no_more_than_what_the_registries_call_global(address: Address) -> None:
    if is_public(address):
        inner = getattr(address, "ipv4_mapped", None) or address
        assert inner.is_global
        assert not inner.is_multicast
    if isinstance(address, IPv4Address):
        inside = int(address)
        assert is_public(IPv6Address((0xFFFF << 32) | inside)) == is_public(address)
        assert is_public(IPv6Address((0x64FF9B << 96) | inside)) == is_public(address)


URLS = [
    "http://127.0.0.1:{port}/", "http://127.1:{port}/", "http://2130706433:{port}/", "http://0x7f.1:{port}/",
    "http://0x7f000001:{port}/", "http://0177.0.0.1:{port}/", "http://0:{port}/", "http://0.0.0.0:{port}/",
    "http://127.0.0.1.:{port}/", "http://LOCALHOST:{port}/", "http://localhost:{port}/", "http://localhost.:{port}/",
    "http://[::1]:{port}/", "http://[::]:{port}/", "http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/", "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/", "http://[64:ff9b::7f00:1]:{port}/",
    "http://[::1%25lo]:{port}/", "http://[::1%lo]:{port}/", "http://[fe80::1%25lo]:{port}/",
    "http://①②⑦.⓪.⓪.①:{port}/", "http://127。0。0。1:{port}/", "http://127.0.0.1\t:{port}/", "http://127.0.0.1\n:{port}/",
    "http://example.com@127.0.0.1:{port}/", "http://127.0.0.1:{port}@example.com/", "http://a:b@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}\\@example.com/", "http://example.com\\@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}#@example.com/", "http://example.com#@127.0.0.1:{port}/", "http://127.0.0.1:{port}\x00/",
    "http://127.0.0.1:{port}/\r\nX-Injected: 1", "http://127.0.0.1:{port}/ HTTP/1.1", " http://127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/", "http:/127.0.0.1:{port}/", "http:127.0.0.1:{port}/", "//127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}/", "HTTP://127.0.0.1:{port}/", "https://127.0.0.1:{port}/", "ws://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_POST", "ftp://127.0.0.1:{port}/", "file:///etc/passwd", "unix:///var/run/docker.sock",
    "http://127.0.0.1:+{port}/", "http://127.0.0.1:{port}:80/", "http://127.0.0.1:0{port}/", "http://:{port}/",
    "http://a..b:{port}/", "http://" + "a" * 250 + ":{port}/", "http://a" + ".a" * 2000 + ":{port}/",
]  # fmt: skip


async def test_no_way_of_writing_a_url_reaches_this_machine() -> None:
    """A canary listens on loopback; that it can be reached at all is checked with the very same parts."""
    async with receiving(status(200)) as canary:
        for url in URLS:
            answer = await Egress(STRICT, timeout=5.0).post(url.format(port=canary.port), {}, b"{}")
            assert answer.status is None, url
            assert answer.error, url
        assert canary.connections == 0
        assert (await Egress(LOOPBACK).post(canary.url(), {}, b"{}")).status == 200
        assert canary.connections == 1


class Names:
    """A name server in the hands of a stranger: its n-th answer is the n-th of `answers`, then the last one."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers, self.asked = answers, 0

    def __call__(self, host: str) -> list[Address]:
        self.asked += 1
        return [ip_address(text) for text in self.answers[min(self.asked, len(self.answers)) - 1]]


@pytest.mark.parametrize(
    "answers",
    [[text] for text in PRIVATE] + [["93.184.216.34", "127.0.0.1"], ["127.0.0.1", "93.184.216.34"], []],
    ids=" ".join,
)
async def test_no_name_reaches_this_machine(answers: list[str]) -> None:
    async with receiving(status(200)) as canary:
        answer = await Egress(STRICT, resolver=Names(answers)).post(canary.url(host="evil.example"), {}, b"{}")
        assert answer.status is None
        assert canary.connections == 0


async def test_a_name_is_resolved_once_and_its_address_is_where_the_request_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rebinding: public while it is checked, private when it is asked for again. Nobody asks again."""
    dialled = []

    async def dial(_: Any, host: str, port: int, **kwargs: Any) -> Any:
        dialled.append((host, port))
        raise httpcore2.ConnectError("unreachable in this test")

    monkeypatch.setattr(httpcore2.AnyIOBackend, "connect_tcp", dial)
    names = Names(["93.184.216.34", "2606:4700::1111"], ["127.0.0.1"])
    answer = await Egress(STRICT, resolver=names).post("http://rebind.example:8080/", {}, b"{}")
    assert (answer.status, names.asked) == (None, 1)
    assert dialled == [("93.184.216.34", 8080), ("2606:4700::1111", 8080)]
    assert (await Egress(STRICT, resolver=names).post("http://rebind.example:8080/", {}, b"{}")).status is None
    assert len(dialled) == 2, "the second answer is refused"


async def test_a_name_leads_to_the_first_address_where_somebody_is() -> None:
    async with receiving(status(200)) as receiver:
        names = Names(["127.0.0.2", "127.0.0.1"])
        answer = await Egress(LOOPBACK, resolver=names).post(receiver.url(host="two.example"), {}, b"{}")
        assert (answer.status, receiver.connections) == (200, 1)
        [hit] = receiver.hits
        assert hit.headers["host"] == f"two.example:{receiver.port}"


async def test_redirects_and_proxies_of_the_environment_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving(status(200)) as canary:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
            monkeypatch.setenv(name.lower(), f"http://127.0.0.1:{canary.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        for code in (301, 302, 303, 307, 308):
            async with receiving(status(code, location=canary.url(), refresh=f"0; url={canary.url()}")) as receiver:
                assert (await Egress(LOOPBACK).post(receiver.url(), {}, b"{}")).status == code
        assert canary.connections == 0


async def test_a_slow_name_server_costs_the_time_of_one_attempt() -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def never(host: str) -> list[Address]:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(30)
        return []

    answer = await Egress(STRICT, timeout=0.05, resolver=never).post("http://slow.example:80/", {}, b"{}")
    assert answer.error == "No answer within 0.05 s."
    release.set()


def test_this_machine_is_refused_by_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are public: what listens on them may trust the machine that it runs on."""
    assert not is_own(IPv4Address("192.0.2.1"))
    monkeypatch.setattr(destinations, "is_public", lambda address: True)
    STRICT.check_url("http://192.0.2.1/")
    with pytest.raises(RequestError, match="another machine"):
        STRICT.check_url("http://127.0.0.1/")


@given(st.from_regex(r"https?://[a-z0-9.:@#?/\\%\[\]_-]{1,30}", fullmatch=True))
@example("http://a.example?x=1")
@example("http://[::1]:80/x?y")
def test_taking_urls_apart_agrees_with_other_parsers(url: str) -> None:
    """Where this parser sees a host, Python's sees the same one: no two readings of one URL."""
    target = take_apart(url)
    if target is not None:
        parts = urlsplit(url)
        assert (parts.hostname, parts.username, parts.password, parts.fragment) == (target.host, None, None, "")
        assert (parts.port or {"http": 80, "https": 443}[target.scheme]) == target.port


def rules(**kwargs: Any) -> Rules:
    return Rules.of(ServerConfig(**kwargs))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a.example/", "--webhook-allow-http"),
        ("https://a.example:22/", "port 22"),
        ("https://10.0.0.1/", "--webhook-allow"),
        ("https://a.example/#x", "fragment"),
        ("https://a.example:0/", "https://example.com/hook"),
        ("https://a.example:65536/", "https://example.com/hook"),
        ("https://[93.184.216.34]/", "https://example.com/hook"),
        ("a.example", "https://example.com/hook"),
        ("https://a.example/" + "x" * 2048, "2048"),
    ],
)
def test_the_door_says_what_is_wrong_and_what_would_help(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        rules().check_url(url)
    assert refusal.value.param == "callback_url"


def test_the_operator_decides() -> None:
    open_rules = rules(
        webhook_allow="10.0.0.0/8, hooks.internal, ::1", webhook_allow_http=True, webhook_ports="443,9000-9010"
    )
    for url in ("http://10.9.8.7:9000/", "https://[::1]/", "http://hooks.internal:9010/x", "https://a.example/"):
        open_rules.check_url(url)
    for url in ("https://10.9.8.7:9011/", "http://[::2]:443/", "https://192.168.0.1/"):
        with pytest.raises(RequestError):
            open_rules.check_url(url)
    own = "http://127.0.0.1:5000/all"
    rules(webhook_url=own).check_url(own)
    with pytest.raises(RequestError):
        rules(webhook_url=own).check_url(own + "?x")


@pytest.mark.parametrize(
    "wrong",
    [
        {"webhook_allow": "10.0.0.0/33"}, {"webhook_allow": "https://a.example"}, {"webhook_allow": "a b"},
        {"webhook_allow": "a.example:80"}, {"webhook_ports": "http"}, {"webhook_ports": "0"},
        {"webhook_ports": "443,70000"}, {"webhook_ports": "9-8"}, {"webhook_url": "ftp://a.example/"},
        {"webhook_url": ""},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        rules(**wrong)
    assert refusal.value.param == next(iter(wrong))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Of hooks.example, and its key."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-keyout", key, "-out", certificate, "-subj", "/CN=x", "-addext", "subjectAltName=DNS:hooks.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


async def test_the_certificate_is_that_of_the_name(certificate: tuple[Path, Path]) -> None:
    """The connection goes to an address, while server name, certificate and Host header are those of the URL."""
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    local = Rules(networks=(ip_network("127.0.0.0/8"),), ports=(range(1, 65536),))
    names = Names(["127.0.0.1"])
    async with receiving(status(204), tls=served) as receiver:
        url = receiver.url(scheme="https", host="hooks.example")
        assert (await Egress(local, resolver=names, tls=trusting).post(url, {}, b"{}")).status == 204
        assert receiver.names == ["hooks.example"]
        assert receiver.hits[0].headers["host"] == f"hooks.example:{receiver.port}"
        assert receiver.hits[0].line == "POST /hook HTTP/1.1"
        for distrusted, tls in ((url, None), (receiver.url(scheme="https", host="other.example"), trusting)):
            answer = await Egress(local, resolver=names, tls=tls).post(distrusted, {}, b"{}")
            assert answer.status is None
            assert "CERTIFICATE_VERIFY_FAILED" in answer.error
        assert len(receiver.hits) == 1
