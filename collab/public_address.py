"""The address at which an auxiliary peer is reached from outside, when its own interfaces do not have it."""

import logging
import re
import threading
import urllib.request
from collections.abc import Sequence
from ipaddress import IPv4Address, ip_address

from collab.peer import own_ips

logger = logging.getLogger(__name__)

# Each answers with the IPv4 address that a request comes from, as plain text, and wants no account.
SERVICES = ("https://api.ipify.org", "https://checkip.amazonaws.com", "https://ipv4.icanhazip.com")
SERVICE_SECONDS = 3.0
MAX_ANSWER_BYTES = 100


def public_addresses(host_maddrs: Sequence[str], services: Sequence[str] = SERVICES) -> list[str]:
    """What a peer that listens on `host_maddrs` should announce, the address that works from outside first.

    Empty: its own addresses are all there is to announce. That is so if an interface has a public address (libp2p finds
    it by itself), if no port is fixed (nobody could have opened or forwarded it), or if no service answers.
    """
    fixed = [re.fullmatch(r"/ip4/(?!127\.)[^/]+/tcp/([1-9]\d*)", address) for address in host_maddrs]
    port = next((found[1] for found in fixed if found), None)
    local = sorted(ip for ip in own_ips() if isinstance(ip_address(ip), IPv4Address))
    if port is None or any(ip_address(ip).is_global for ip in local):
        return []
    public = ask_public_ip(services)
    if public is None:
        logger.info(
            "This computer's public address could not be found out. If others join from outside its network, give it: "
            "--announce_maddrs /ip4/PUBLIC_IP/tcp/%s",
            port,
        )
        return []
    inside = [ip for ip in local if not ip_address(ip).is_loopback]
    logger.info(
        "Seen from outside, this computer is %s, which is its router's or provider's address: TCP port %s has to be "
        "open and forwarded to %s. To check, type `nc -vz %s %s` on a computer in another network. (--find_public_ip "
        "false leaves the question out.)",
        public, port, " or ".join(inside) or "this computer", public, port,
    )  # fmt: skip
    return [f"/ip4/{ip}/tcp/{port}" for ip in (public, *inside)]


def ask_public_ip(services: Sequence[str], seconds: float = SERVICE_SECONDS) -> str | None:
    """The public IPv4 address of this network, as the first of `services` that answers sees it.

    :param seconds: for each service; looking up its name counts, for which Python has no limit of its own.
    """
    for service in services:
        answers: list[str] = []
        thread = threading.Thread(target=_ask, args=(service, seconds, answers), daemon=True)
        thread.start()
        thread.join(seconds)
        if answers:
            return answers[0]
    return None


def _ask(service: str, seconds: float, answers: list[str]) -> None:
    try:
        with urllib.request.urlopen(service, timeout=seconds) as response:
            text = response.read(MAX_ANSWER_BYTES).decode("ascii").strip()
        if isinstance(ip_address(text), IPv4Address) and ip_address(text).is_global:
            answers.append(text)
    except (OSError, ValueError) as error:
        logger.debug("%s did not tell the public address: %r", service, error)
