"""Why a peer cannot join: each address of the swarm dialled on its own, and a verdict in words that lead on."""

import asyncio
import contextlib
import multiprocessing
import re
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal, TypeVar

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.timed_storage import MAX_DHT_TIME_DISCREPANCY_SECONDS

from collab.clock import HOW_TO_SET_IT, TOLERATED_SECONDS, clock_ahead, offset_in, wrong_clock
from collab.manifest import PROTOCOL
from collab.peer import HEADER_BYTES, identity_in_use

T = TypeVar("T")
Verdict = Literal["ok", "warning", "failed", "unknown"]

CONNECT_SECONDS = 4.0  # of a TCP connection; Linux repeats a lost first packet after 1 and 3 seconds
NEW_ADDRESS = "Ask the organizer for the run's current address."
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    :param check: its short name.
    :param message: what it found, in one sentence.
    :param advice: what to do about it; empty where nothing has to be done.
    """

    check: str
    verdict: Verdict
    message: str
    advice: str = ""

    @classmethod
    def of_error(cls, check: str, error: Exception, verdict: Verdict = "failed") -> "Finding":
        """The words of a UserError: its first sentence tells what happened, the others what to do."""
        what, *rest = re.split(r"(?<=\.)\s+(?=[A-Z])", str(error), maxsplit=1)
        return cls(check, verdict, what, "".join(rest))


@dataclass(frozen=True)
class PeerFinding(Finding):
    """What became of dialling one address.

    :param round_trip: seconds that its DHT took to answer; None if it did not.
    :param clock_ahead: seconds that this computer's clock is ahead of that peer's, at least.
    """

    address: str = ""
    round_trip: float | None = None
    clock_ahead: float | None = None


def diagnose_peers(addresses: Sequence[str], timeout: float = 12.0) -> list[PeerFinding]:
    """Dial each address by itself, all at once, and go as far with it as a newcomer has to.

    If one of them is good, another that is dead does no harm and counts as a warning; one with a wrong clock does harm:
    hivemind gives up joining.

    :param addresses: multiaddresses that end in /p2p/PEER_ID.
    :param timeout: seconds for all of it. On a slow machine libp2p's daemon takes some of them to start.
    """
    answers = in_child(partial(_diagnose_all, addresses, timeout), timeout + 3.0)
    if answers is None:
        why = "it could not be dialled: libp2p's daemon hangs on this computer"
        answers = [PeerFinding(_name(a), "unknown", f"{a}: {why}.", address=a) for a in addresses]
    someone_is_good = any(answer.verdict == "ok" and not _too_far(answer.clock_ahead) for answer in answers)
    offset = most_likely_offset(answers)
    return [_in_context(answer, offset, someone_is_good) for answer in answers]


def most_likely_offset(answers: Iterable[PeerFinding]) -> float | None:
    """Seconds that this clock is ahead, by the word of the peer in the middle; of two, by the one that agrees more."""
    offsets = sorted((a.clock_ahead for a in answers if a.clock_ahead is not None), key=abs)
    return offsets[(len(offsets) - 1) // 2] if offsets else None


def clock_finding(answers: Iterable[PeerFinding]) -> Finding:
    """Whether this computer's clock is right, as far as the peers that answered can tell."""
    offset = most_likely_offset(answers)
    if offset is None:
        return Finding("clock", "unknown", "Not compared: no peer answered.")
    if _too_far(offset):
        return Finding.of_error("clock", ValueError(wrong_clock(offset)))
    what = f"{'Behind' if offset < 0 else 'Ahead of'} the peers' clocks by {abs(offset):.1f} seconds"
    if abs(offset) > TOLERATED_SECONDS:
        limit = f"from {MAX_DHT_TIME_DISCREPANCY_SECONDS} seconds on peers refuse each other"
        return Finding("clock", "warning", f"{what}; {limit}.", HOW_TO_SET_IT)
    return Finding("clock", "ok", "Agrees with the peers' clocks.")


def identity_finding(identity_path: str, addresses: Sequence[str], timeout: float = 10.0) -> Finding:
    """Whether a running peer of the swarm has this identity already.

    :param identity_path: an existing identity file.
    :param addresses: peers that answer.
    """

    async def ask() -> bool:
        return await P2P.is_identity_taken(
            identity_path, initial_peers=addresses, tls=True, use_auto_relay=False, use_ipfs=False, use_relay=True
        )

    taken = in_child(ask, timeout)
    if taken is None:
        return Finding("identity", "unknown", f"The swarm did not tell within {timeout:.0f} seconds who is there.")
    if taken:
        return Finding.of_error("identity", ValueError(identity_in_use(identity_path)))
    return Finding("identity", "ok", f"No running peer uses {identity_path}.")


def why_not_joined(addresses: Sequence[str], reason: str) -> str:
    """The message of a program that could not join.

    :param reason: hivemind's own.
    """
    findings = diagnose_peers(addresses)
    offset = most_likely_offset(findings)
    if offset is None:  # nobody answers, or nobody any more
        offset = offset_in(reason) or 0.0
    if _too_far(offset):
        return wrong_clock(offset)
    listing = "\n  ".join(finding.message for finding in findings)
    advice = dict.fromkeys(finding.advice for finding in findings if finding.advice)
    if not any(finding.verdict == "failed" for finding in findings):
        advice["Start again; on a slow or busy computer with a larger --startup_timeout."] = None
    return (
        f"The swarm could not be joined. What became of each address:\n  {listing}\n{chr(10).join(advice)}\n"
        f"(hivemind said: {reason}) To check this computer too, put scripts/doctor.py in the place of run_trainer.py."
    )


def in_child(work: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T | None:
    """Run a coroutine that starts libp2p daemons; None if it is not done in time, or fails.

    In a forked process: like everything that a fork starts, its daemons end when this program does (`guard_children`),
    and the caller may have an event loop of its own, as notebooks do.
    """
    receiving, sending = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_run_and_send, args=(work, sending), daemon=True)
    process.start()
    sending.close()
    try:
        result: T | None = receiving.recv() if receiving.poll(seconds) else None
        process.join(2.0)
        return result
    except EOFError:
        return None
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        receiving.close()


def _run_and_send(work: Callable[[], Coroutine[Any, Any, Any]], sending: Connection) -> None:
    with contextlib.suppress(P2PDaemonError, ControlFailure, TimeoutError, OSError):
        sending.send(asyncio.run(work()))


# ---- one address -------------------------------------------------------------------------------------------------


class _Fault(Exception):
    """What is wrong with an address, as the end of a sentence that begins with it, and what to do."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(what)
        self.what, self.advice = what, advice


async def _diagnose_all(addresses: Sequence[str], timeout: float) -> list[PeerFinding]:
    return list(await asyncio.gather(*(_diagnose(address, timeout) for address in addresses)))


async def _diagnose(address: str, timeout: float) -> PeerFinding:
    finding = PeerFinding(_name(address), "failed", "", address=address)
    give_up = time.monotonic() + timeout
    try:
        await _try_tcp(Multiaddr(address), min(CONNECT_SECONDS, timeout / 2))
        try:
            # One daemon for each address: it would not dial a second address of a peer that it is connected to.
            p2p = await P2P.create(
                no_listen=True, dht_mode="client", auto_nat=False, nat_port_map=False, startup_timeout=timeout / 2
            )
        except P2PDaemonError as error:
            return replace(finding, verdict="unknown", message=f"{address}: libp2p did not start here ({error}).")
        try:
            return await _ask(p2p, finding, give_up)
        finally:
            await p2p.shutdown()
    except _Fault as fault:
        return replace(finding, message=f"{address}: {fault.what}.", advice=fault.advice)
    except Exception as error:  # noqa: BLE001 - the verdicts on the other addresses must not be lost
        reason = str(error) or type(error).__name__
        return replace(finding, verdict="unknown", message=f"{address}: it could not be dialled ({reason}).")


async def _try_tcp(address: Multiaddr, timeout: float) -> None:
    """Whether anybody listens there: the operating system says it more exactly than libp2p passes on."""
    parts = [(protocol.name, value) for protocol, value in address.items()]
    if len(parts) < 3:
        raise ValueError("it names no computer and port")
    [kind, host], [port_kind, port], *_ = parts
    if kind not in ("ip4", "ip6", "dns", "dns4", "dns6") or port_kind != "tcp":
        return  # then only libp2p can tell
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(kind[-1], socket.AF_UNSPEC)
    try:
        async with asyncio.timeout(timeout):
            _, writer = await asyncio.open_connection(host, int(port), family=family)
        writer.close()
    except TimeoutError as error:
        raise _Fault(
            f"{host} does not answer within {timeout:.0f} seconds",
            f"That computer is off, a firewall drops what is sent to it, or the address is wrong. Ask the organizer "
            f"whether it runs and whether port {port} is open to you.",
        ) from error
    except socket.gaierror as error:
        raise _Fault(
            f"the name {host} has no address ({error.strerror})",
            f"Check how {host} is spelled, and whether this computer can look up names at all.",
        ) from error
    except ConnectionRefusedError as error:
        raise _Fault(
            f"{host} is there, but nobody listens on port {port}",
            f"That peer has ended, or was started again on another port. {NEW_ADDRESS}",
        ) from error
    except OSError as error:
        raise _Fault(
            f"no way leads to {host} ({error.strerror or error})",
            f"Check this computer's network. If all else works, the address is wrong: {NEW_ADDRESS}",
        ) from error


async def _ask(p2p: P2P, finding: PeerFinding, give_up: float) -> PeerFinding:
    """libp2p's handshake, the DHT, the manifest: one after the other, because each needs the one before."""
    target, _, peer_id = finding.address.rpartition("/p2p/")
    peer = PeerID.from_base58(peer_id)
    left = partial(_left_until, give_up)
    try:
        await asyncio.wait_for(p2p._client.connect(peer, [Multiaddr(target)]), left(share=0.6))
    except TimeoutError as error:
        raise _silent() from error
    except ControlFailure as error:
        raise _why_no_handshake(str(error)) from error
    try:
        asked = get_dht_time()
        call = p2p.call_protobuf_handler(peer, "DHTProtocol.rpc_ping", dht_pb2.PingRequest(), dht_pb2.PingResponse)
        answer = await asyncio.wait_for(call, left(share=0.7))
        answered = get_dht_time()
    except TimeoutError as error:
        raise _Fault(
            "the connection is made, but the peer's DHT says nothing",
            f"It is overloaded or hangs. Try again in a minute, or tell the organizer. {NEW_ADDRESS}",
        ) from error
    except (P2PDaemonError, P2PHandlerError) as error:
        raise _Fault(
            "a libp2p peer answers, but it belongs to another network: it has no DHT of hivemind's",
            f"That is not an address of this run. {NEW_ADDRESS}",
        ) from error
    ahead = clock_ahead(asked, answer.dht_time, answered)
    finding = replace(finding, round_trip=answered - asked, clock_ahead=ahead)
    what = f"{finding.address}: it answers in {1000 * (answered - asked):.0f} ms"
    if not await _serves_manifest(p2p, peer, left()):
        return replace(
            finding,
            message=f"{what}, but hands out no run manifest: it belongs to another network, or to another version of "
            f"this code.",
            advice="Use the address that the run's auxiliary peer prints, and the code that the organizer names.",
        )
    return replace(finding, verdict="ok", message=f"{what}.")


def _left_until(moment: float, share: float = 1.0) -> float:
    """A share of the seconds that are left until then, so that what comes after has some too."""
    return max(0.5, share * (moment - time.monotonic()))


def _why_no_handshake(reason: str) -> _Fault:
    """From what p2pd says: `Connect failed. msg=...: all dials failed\\n  * [ADDRESS] failed to negotiate ...: WHY`."""
    if "peer id mismatch" in reason:
        return _Fault(
            f"another peer ({reason.split()[-1]}) answers there, not the one that the address names",
            f"The run's peer was started with a new key, or somebody has taken its place. {NEW_ADDRESS}",
        )
    before, handshake, why = reason.partition("failed to negotiate security protocol: ")
    if not handshake:
        return _Fault(
            f"libp2p cannot dial it ({before.rpartition('msg=')[2].splitlines()[-1].strip()})",
            f"The address is mistyped, or of a kind that is not known here. {NEW_ADDRESS}",
        )
    if "deadline exceeded" in why or "timeout" in why:
        return _silent()
    if "EOF" in why or "reset by peer" in why:
        return _Fault(
            "something takes the connection there, and closes it at once",
            f"Probably a forwarded port (Docker, a tunnel, a router) whose peer has ended. {NEW_ADDRESS}",
        )
    return _Fault(
        f"what answers there does not speak libp2p ({why})",
        f"The port belongs to another program, such as a web server or a proxy. {NEW_ADDRESS}",
    )


def _silent() -> _Fault:
    return _Fault(
        "something takes the connection there, but does not answer as libp2p does",
        f"A firewall or another program sits on that port, or the peer hangs. {NEW_ADDRESS}",
    )


async def _serves_manifest(p2p: P2P, peer: PeerID, timeout: float) -> bool:
    async def first_bytes() -> None:
        _, reader, writer = await p2p.call_binary_stream_handler(peer, PROTOCOL)
        with contextlib.closing(writer):
            await reader.readexactly(HEADER_BYTES)

    try:
        await asyncio.wait_for(first_bytes(), timeout)
    except (TimeoutError, P2PDaemonError, OSError, EOFError):
        return False
    return True


def _in_context(answer: PeerFinding, offset: float | None, someone_is_good: bool) -> PeerFinding:
    """What an answer means beside those of the other addresses."""
    if _too_far(answer.clock_ahead):
        apart = f"its clock and this computer's are {abs(answer.clock_ahead or 0.0):.1f} seconds apart"
        others_agree = "Others agree with this clock: leave that address out, and tell its owner."
        advice = HOW_TO_SET_IT if _too_far(offset) else others_agree
        return replace(answer, verdict="failed", message=f"{answer.message[:-1]}, but {apart}.", advice=advice)
    if answer.verdict == "failed" and someone_is_good:
        return replace(answer, verdict="warning")
    return answer


def _too_far(offset: float | None) -> bool:
    return offset is not None and abs(offset) > MAX_DHT_TIME_DISCREPANCY_SECONDS


def _name(address: str) -> str:
    return f"peer {address[-6:]}"
