"""How the processes of a run find each other: where they meet, who came, and what listens for whom."""

from __future__ import annotations

import base64
import binascii
import contextlib
import datetime
import errno
import hashlib
import hmac
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from runtime.distributed import free_port
from runtime.exits import EXIT_STALLED, EXIT_WRONG_INPUT, NotStartedError, UserError
from runtime.ranks import is_main, local_rank, print_rank_0, rank, world_size
from runtime.streams import visible

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore

START_MINUTES = 10.0  # of --start_timeout
GROUP_TIMEOUT = datetime.timedelta(hours=2)  # of the process group: a save or an evaluation may take long
POLL_SECONDS = 0.2
CONNECT_SECONDS = 30  # for torch's store to be reached where something listens
LEAVE_SECONDS = 20  # how long a process that leaves before the start waits to tell the others
GRACE_SECONDS = 30  # after --start_timeout: the roll call speaks first, it knows who is missing
TOKEN_BYTES = 32  # of the secret that a lifeline begins with
STRANGER_SECONDS = 5  # in which whoever connects has to show the secret
MOST_STRANGERS = 128  # at a time; the one that has waited longest goes
INTERFACES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}  # "=": no interface that only begins like it
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Place(NamedTuple):
    """Where the first process is: MASTER_ADDR and MASTER_PORT as seen from here."""

    name: str  # what the others connect to
    port: int
    family: int  # socket.AF_INET or AF_INET6
    own: str  # the address of this host on the way there


def is_one_host() -> bool:
    """Are all processes on this host, as far as the launcher tells?"""
    local_size = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE")
    if local_size is None and os.environ.get("MASTER_ADDR") in LOOPBACK:
        return True
    return world_size() == 1 or local_size == str(world_size())


def is_server() -> bool:
    """Is torch's store in this process? torchrun has one of its own, which all processes use."""
    return is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def host_name() -> Any:
    """This host, as messages name it."""
    return visible(socket.gethostname())


# ---------------------------------------------------------------- the network


def find_place() -> Place:
    """The Place where the processes meet; UserError where this host knows no way to it."""
    port = os.environ.get("MASTER_PORT", "29500")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--master_port {port}: must be a number from 1 to 65535")
    if is_one_host():
        return Place("127.0.0.1", int(port), socket.AF_INET, "127.0.0.1")
    name = os.environ["MASTER_ADDR"]
    fix = "start with --master_addr and an address of the first host that all hosts reach"
    try:
        found = socket.getaddrinfo(name, int(port), type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"MASTER_ADDR={name}: {host_name()} does not know this host ({reason}): {fix}") from None
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing, it asks for the way
            own = probe.getsockname()[0]
            if own.startswith(("127.", "::1")) and name not in (*LOOPBACK, address[0]):  # a line of many an /etc/hosts
                where = f"is {address[0]} on {host_name()}, where no other host reaches it"
                raise UserError(f"MASTER_ADDR={name}: {where}: {fix}")
            return Place(name, int(port), family, own)
    raise UserError(f"MASTER_ADDR={name}: there is no way to it from {host_name()}: {fix}")


def interface_of(address: Any) -> str | None:
    """Name of the network interface that has this address; None where there is none."""
    import psutil  # DeepSpeed needs it, too

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.partition("%")[0] == entry.address.partition("%")[0] for entry in addresses):
            return name
    return None


def choose_interface(place: Place) -> str:
    """Let gloo and NCCL use the interface on the way to the first process, unless the environment names another.

    gloo would take the address that the host's own name has, which in most /etc/hosts is one that only this host
    reaches. Returns what gloo uses, as the start's line says it.
    """
    name = "lo" if is_one_host() else interface_of(place.own)
    for variable, form in INTERFACES.items():
        if name and not os.environ.get(variable):
            os.environ[variable] = form.format(name)
    return os.environ.get("GLOO_SOCKET_IFNAME") or "the interface of the host's name"


# ---------------------------------------------------------------- the meeting


def start_distributed(device: torch.device, minutes: float = START_MINUTES) -> None:
    """Join the process group (nccl on GPUs, gloo on CPUs); one process without a launcher is a group of one.

    minutes: how long the processes wait for each other, 0: without end. UserError for an address or a port that is not
    right, NotStartedError where not all came. Collective.
    """
    import deepspeed
    import torch
    import torch.distributed as dist

    if world_size() == 1:
        own = {"RANK": 0, "LOCAL_RANK": local_rank(), "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in own.items()})
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce that only its inference uses.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    deepspeed.utils.logger.setLevel("WARNING")
    backend = "gloo" if device.type == "cpu" else "nccl"
    store = meet(minutes)
    several: dict[str, Any] = {} if device.type == "cpu" or world_size() == 1 else {"device_id": device}
    try:
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=world_size(), timeout=GROUP_TIMEOUT, **several
        )
    except RuntimeError as error:
        if is_one_host():
            raise
        used = ", ".join(f"{name}={os.environ.get(name)}" for name in INTERFACES)
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the hosts do not reach each other: {reason}: open all ports between them, or name another network"
            f" ({used})"
        ) from error
    deepspeed.init_distributed(dist_backend=backend, timeout=GROUP_TIMEOUT, verbose=False)  # takes the group over


def control_group(device: torch.device) -> Any:
    """A process group for small numbers on the CPU: the usual one there, another one beside a GPU's. Collective."""
    import torch.distributed as dist

    return None if device.type == "cpu" else dist.new_group(backend="gloo")


def meet(minutes: float) -> Any:
    """torch's store, when all processes are there; the first one says who they are. Collective."""
    from torch.distributed import PrefixStore

    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    if world_size() == 1:
        os.environ.update({name: os.environ.get(name) or form.format("lo") for name, form in INTERFACES.items()})
        return serve(Place("127.0.0.1", 0, socket.AF_INET, "127.0.0.1"))
    place = find_place()
    interface = choose_interface(place)
    store = serve(place) if is_server() else reach(place, end, minutes)
    # A process of another run that takes this port for its own answers to other names.
    roll = PrefixStore(f"start {run_key()}", store)
    roll.set(f"here {rank()}", json.dumps([host_name(), interface]))
    if is_main():
        answer = call_roll(roll, end, minutes, place)
        roll.set("answer", json.dumps(answer))
    else:
        answer = json.loads(ask(roll, "answer", end + GRACE_SECONDS) or "{}")
    if "problem" in answer:
        roll.set(f"heard {rank()}", "")
        wait_for_others(roll)
        raise NotStartedError(answer["problem"], answer["code"])
    if "hosts" not in answer:
        raise NotStartedError(f"the first process, at {place.name} port {place.port}, has gone before the start", 1)
    print_rank_0(f"{world_size()} processes: {describe(answer['hosts'])}")
    store.set_timeout(GROUP_TIMEOUT)
    return store


def run_key() -> str:
    """The same for all processes of a run, and hardly for those of another."""
    words = [word for word in sys.argv if not word.startswith(("--local_rank", "--local-rank"))]
    return hashlib.sha256(json.dumps([world_size(), words]).encode()).hexdigest()[:16]


def serve(place: Place) -> TCPStore:
    """torch's store with its server in this process, which listens at one address: torch would take all of them."""
    from torch.distributed import TCPStore

    try:
        listener = socket.create_server((place.own, place.port), family=place.family, backlog=1024)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise UserError(f"MASTER_ADDR={place.name}: {host_name()} cannot listen there: {error.strerror}") from None
        reason = "another program has this port" if error.errno == errno.EADDRINUSE else "this port is for root alone"
        raise UserError(
            f"--master_port {place.port}: {reason} on {host_name()}: choose another, such as {free_port()}"
        ) from None
    return TCPStore(
        place.own,
        listener.getsockname()[1],
        world_size=world_size(),
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(minutes=1),
        master_listen_fd=listener.detach(),
    )


def reach(place: Place, end: Any, minutes: float) -> Any:
    """torch's store in the first process; NotStartedError where none answers until `end`."""
    from torch.distributed import TCPStore

    def connect() -> None:
        with contextlib.suppress(RuntimeError):  # torch's DistError
            found.append(TCPStore(place.name, place.port, is_master=False, timeout=datetime.timedelta(minutes=1)))

    answers, found = False, []
    while time.monotonic() < end:
        try:  # torch would wait in its library, where no signal is heard
            socket.create_connection((place.name, place.port), timeout=5).close()
        except OSError:
            time.sleep(POLL_SECONDS)
            continue
        answers = True
        # What listens there may be another program, and torch waits without end for one that says nothing.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(max(0.0, min(CONNECT_SECONDS, end - time.monotonic())))
        if found:
            return found[0]
        if thread.is_alive() and time.monotonic() < end:
            raise NotStartedError(
                f"--master_port {place.port}: what answers {host_name()} at {place.name} is another program: choose"
                " another port",
                EXIT_WRONG_INPUT,
            )
        time.sleep(POLL_SECONDS)
    what = "what listens there is another program" if answers else "does it run, and is the port open?"
    raise NotStartedError(
        f"--start_timeout {minutes:g}: {host_name()} had no answer from the first process at {place.name} port"
        f" {place.port} in {minutes:g} minutes: {what}"
    )


def ask(roll: Any, key: str, end: Any) -> Any:
    """A value of the store when it is there; None where `end` comes first, or the store has gone."""
    with contextlib.suppress(RuntimeError):  # torch's DistError
        while time.monotonic() < end:
            if roll.check([key]):
                return roll.get(key).decode()
            time.sleep(POLL_SECONDS)
    return None


def call_roll(roll: Any, end: Any, minutes: float, place: Place) -> dict:
    """Wait for all processes: {"hosts": [[host, interface] of each rank]}, or {"problem", "code"}."""
    missing, hosts = set(range(world_size())), {}
    while True:
        for other in sorted(missing):
            if roll.check([f"here {other}"]):
                hosts[other] = json.loads(roll.get(f"here {other}"))
                missing.remove(other)
            elif roll.check([f"left {other}"]):
                host, code = json.loads(roll.get(f"left {other}"))
                problem = f"rank {other} on {host} left before the start with exit code {code}: see what it said"
                return {"problem": problem, "code": code}
        if not missing:
            return {"hosts": [hosts[number] for number in range(world_size())]}
        if time.monotonic() > end:
            break
        time.sleep(POLL_SECONDS)
    here = ", ".join(dict.fromkeys(host for host, _ in hosts.values()))
    problem = (
        f"--start_timeout {minutes:g}: of {world_size()} processes {len(hosts)} came in {minutes:g} minutes ({here});"
        f" missing: {describe_missing(missing)}: see what they said, and whether they reach {place.name} port"
        f" {place.port}"
    )
    return {"problem": problem, "code": EXIT_STALLED}


def describe(hosts: Any) -> str:
    """Hosts, with their processes and the interface, as a line."""
    counts = {}
    for host in map(tuple, hosts):
        counts[host] = counts.get(host, 0) + 1
    return ", ".join(f"{count} on {host} over {interface}" for (host, interface), count in counts.items())


def describe_missing(ranks: Any) -> str:
    """Ranks as a text; with their hosts, where the launcher knows them."""
    named = launched_hosts()
    groups = {}
    for number in sorted(ranks):
        groups.setdefault(named.get(number), []).append(str(number))
    texts = []
    for host, numbers in groups.items():
        text = f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
        texts.append(f"{text} on {visible(host)}" if host else text)
    return "; ".join(texts)


def launched_hosts() -> dict:
    """{rank: its host in the hostfile}, from the words of DeepSpeed's launcher that started this process."""
    try:
        with open(f"/proc/{os.getppid()}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").split("\0")
        [value] = [word.partition("=")[2] for word in words if word.startswith("--world_info=")]
        slots = json.loads(base64.urlsafe_b64decode(value))
        return dict(enumerate(host for host, numbers in slots.items() for _ in numbers))
    except (OSError, ValueError, binascii.Error, AttributeError, TypeError):
        return {}


def wait_for_others(roll: Any, waits: Any = False) -> None:
    """In the first process, whose end takes the store away: wait until the others have read the answer.

    waits: for those, too, that have not come yet.
    """
    end = time.monotonic() + LEAVE_SECONDS
    with contextlib.suppress(RuntimeError):
        while is_main() and time.monotonic() < end:
            others = [number for number in range(1, world_size()) if not roll.check([f"left {number}"])]
            if all(roll.check([f"heard {number}"]) for number in others if waits or roll.check([f"here {number}"])):
                return
            time.sleep(POLL_SECONDS)


def leave_word(code: int) -> None:
    """This process ends before it met the others: let those on other hosts know, who would wait in vain."""
    if is_one_host() or code == 0:
        return  # the launcher ends all processes of a host
    from torch.distributed import PrefixStore

    with contextlib.suppress(UserError, NotStartedError, RuntimeError):
        place = find_place()
        store = serve(place) if is_server() else reach(place, time.monotonic() + LEAVE_SECONDS, LEAVE_SECONDS / 60)
        roll = PrefixStore(f"start {run_key()}", store)
        roll.set(f"left {rank()}", json.dumps([host_name(), code]))
        if is_main():
            problem = f"rank 0 on {host_name()} left before the start with exit code {code}: see what it said"
            roll.set("answer", json.dumps({"problem": problem, "code": code}))
            wait_for_others(roll, waits=True)


@contextlib.contextmanager
def ending_in(minutes: float) -> Iterator[None]:
    """End the process where the block, the start, takes longer: a library that waits cannot be interrupted."""

    def end() -> NoReturn:
        print(
            f"\n{os.path.basename(sys.argv[0])}: error: --start_timeout {minutes:g}: {host_name()} met the other"
            " processes, but could not connect with all of them: open all ports between the hosts, or name another"
            f" network (GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME')})",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_STALLED)

    timer = threading.Timer(60 * minutes + GRACE_SECONDS, end)
    timer.daemon = True
    if minutes:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---------------------------------------------------------------- lifelines


def open_lifelines(listener: Any, token: Any, seconds: float) -> dict:
    """{connection: rank} of the ranks that come to a listener within `seconds` and show the token.

    token: bytes, TOKEN_BYTES long. Others may connect and say what they like: each has STRANGER_SECONDS and as many
    bytes as a rank needs, and is then closed.
    """
    lines, strangers, end = {}, {}, time.monotonic() + seconds  # strangers: {connection: (bytes so far, its end)}
    size = TOKEN_BYTES + 4

    def close(line: Any) -> None:
        selector.unregister(line)
        strangers.pop(line)
        line.close()

    with selectors.DefaultSelector() as selector:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        while len(lines) < world_size() - 1 and time.monotonic() < end:
            for line in [line for line, (_, last) in strangers.items() if time.monotonic() > last]:
                close(line)
            for key, _ in selector.select(POLL_SECONDS):
                found_line: Any = key.fileobj
                line = found_line
                with contextlib.suppress(OSError):
                    if line is listener:
                        line, _ = listener.accept()
                        line.setblocking(False)
                        selector.register(line, selectors.EVENT_READ)
                        strangers[line] = b"", time.monotonic() + STRANGER_SECONDS
                        if len(strangers) > MOST_STRANGERS:
                            close(next(iter(strangers)))
                        continue
                    if line not in strangers:
                        continue
                    said, last = strangers[line]
                    news = line.recv(size - len(said))
                    said += news
                    strangers[line] = said, last
                    if len(said) == size and hmac.compare_digest(said[:TOKEN_BYTES], token):
                        number = int.from_bytes(said[TOKEN_BYTES:], "big")
                        if 0 < number < world_size() and number not in lines.values():
                            selector.unregister(line)
                            del strangers[line]
                            line.setblocking(True)
                            line.sendall(b"!")
                            lines[line] = number
                            continue
                    if news and len(said) < size:
                        continue
                if line is not listener and line in strangers:
                    close(line)
        for line in list(strangers):
            close(line)
    return lines


def join_lifeline(address: Any, token: Any, seconds: float) -> Any:
    """The connection of this rank to the first one's listener; OSError where it is not taken within `seconds`."""
    line = socket.create_connection(address, timeout=seconds)
    try:
        line.sendall(token + rank().to_bytes(4, "big"))
        if line.recv(1) != b"!":
            raise OSError(errno.ECONNREFUSED, "the first process did not take it")
        line.settimeout(None)
        return line
    except OSError:
        line.close()
        raise
