"""How the processes of a run find each other: strangers, addresses, ports, those who do not come, what hosts share."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

import utils
from flags.train import train_parser
from runtime import distributed, hosts, shared_files
from runtime.distributed import free_port
from runtime.exits import NotStartedError, UserError

TOKEN = bytes(range(32))


@pytest.fixture
def launched(monkeypatch):
    """The variables of a launcher; a function changes them."""

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    for name in (*hosts.INTERFACES, "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.setenv(name, "")  # put back afterwards, as they were
        monkeypatch.delenv(name)
    change(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, LOCAL_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    monkeypatch.setattr(hosts, "LEAVE_SECONDS", 0.3)
    return change


# Strangers.


def stranger(address, *words):
    """A connection that says this and stays."""
    line = socket.create_connection(address)
    for word in words:
        line.sendall(word)
    return line


def is_closed(line):
    """Has the other side closed a connection, within some seconds?"""
    line.settimeout(60)
    try:
        while line.recv(1 << 16):
            pass
    except ConnectionError:
        return True
    return True


def test_unknown_connections_do_not_disturb_the_start(launched, monkeypatch):
    """The kind: whoever connects while the ranks do, and says nothing, garbage, too much, or what a rank has said.

    None of them ends or holds the start, or is kept; the ranks come in."""
    monkeypatch.setattr(hosts, "STRANGER_SECONDS", 0.5)
    monkeypatch.setattr(hosts, "MOST_STRANGERS", 30)
    launched(WORLD_SIZE=3)
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    address, found = listener.getsockname(), []
    thread = threading.Thread(target=lambda: found.append(hosts.open_lifelines(listener, TOKEN, 60)), daemon=True)
    thread.start()
    number = (2).to_bytes(4, "big")
    strangers = [
        stranger(address),
        stranger(address, b"\xff\xfe"),
        stranger(address, b"\xff\xfe\r\n" * 20),
        stranger(address, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"),
        stranger(address, b"x" * (32 << 10)),
        stranger(address, TOKEN[:-1] + b"x" + number),
        stranger(address, TOKEN, (0).to_bytes(4, "big")),
        stranger(address, TOKEN, (3).to_bytes(4, "big")),
        stranger(address, TOKEN, b"\xff" * 4),
        *(stranger(address) for _ in range(60)),
    ]
    assert all(map(is_closed, strangers))
    assert thread.is_alive(), "they ended the start"
    for rank in (2, 1):
        launched(RANK=rank)
        assert hosts.join_lifeline(address, TOKEN, 60).gettimeout() is None
        if rank == 2:
            again = stranger(address, TOKEN, number)
            assert is_closed(again), "a rank came twice"
    thread.join(60)
    assert sorted(found[0].values()) == [1, 2] and all(line.getblocking() for line in found[0])


def test_ranks_that_do_not_connect(launched):
    """Strangers do not make the wait longer; a rank that is not taken knows it, and does not count the first for dead."""
    listener = socket.create_server(("127.0.0.1", 0))
    begun = time.monotonic()
    silent = stranger(listener.getsockname())
    assert hosts.open_lifelines(listener, TOKEN, 0.5) == {} and time.monotonic() - begun < 30 and is_closed(silent)
    launched(RANK=1)
    with pytest.raises(OSError):
        hosts.join_lifeline(listener.getsockname(), TOKEN, 0.5)


# Addresses and ports.


def test_the_interface_that_reaches_the_first_process_is_chosen(launched, monkeypatch):
    """That of the address by which the first process is reached, unless the environment names one; on one host, none
    but the host itself."""
    own = "192.0.2.7", "2001:db8::7"
    interfaces = {"lo": ["127.0.0.1", "::1"], "eth0": [own[0], "fe80::1%eth0"], "eth1": [own[1], "fe80::2%eth1"]}
    entries = {name: [type("Entry", (), {"address": text}) for text in texts] for name, texts in interfaces.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: entries)
    for address, name in zip(own, ("eth0", "eth1")):
        assert hosts.interface_of(address) == name
        launched(GLOO_SOCKET_IFNAME="", NCCL_SOCKET_IFNAME="")
        assert hosts.choose_interface(hosts.Place("first", 1, socket.AF_INET, address)) == name
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == (name, f"={name}")
    assert hosts.interface_of("fe80::2%eth1") == "eth1" and hosts.interface_of("198.51.100.1") is None
    launched(GLOO_SOCKET_IFNAME="ib0", NCCL_SOCKET_IFNAME="")
    assert hosts.choose_interface(hosts.Place("first", 1, socket.AF_INET, own[0])) == "ib0"
    launched(GLOO_SOCKET_IFNAME="", LOCAL_SIZE=2, MASTER_ADDR=own[0])
    assert hosts.choose_interface(hosts.find_place()) == "lo" and hosts.find_place().own == "127.0.0.1"


def test_a_store_is_served_over_ipv6_alone(launched):
    if not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    launched(MASTER_ADDR="::1")
    place = hosts.find_place()
    assert (place.family, place.own) == (socket.AF_INET6, "::1")
    store = hosts.serve(place)
    assert TCPStore("::1", place.port, is_master=False).check(["a"]) is False and store.host == "::1"


@pytest.mark.parametrize(
    "variables, says",
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, r"MASTER_ADDR=no-such-host\.invalid: \S+ does not know this host"),
        ({"MASTER_ADDR": "a" * 70}, r"MASTER_ADDR=a{70}: \S+ does not know this host"),
        ({"MASTER_PORT": "no"}, r"--master_port no: must be a number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, r"--master_port 65536: must be a number from 1 to 65535"),
        ({"MASTER_ADDR": "node1"}, r"MASTER_ADDR=node1: is 127\.0\.1\.1 on \S+, where no other host reaches it: start"),
    ],
)
def test_wrong_addresses_of_the_first_host_are_refused(launched, monkeypatch, variables, says):
    """The kind: what the launcher was told about the first host; one line, before anything waits."""
    found = socket.getaddrinfo

    def look_up(name, *rest, **kwargs):
        return found("127.0.1.1" if name == "node1" else name, *rest, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    launched(**variables)
    with pytest.raises(UserError, match=says):
        hosts.meet(1)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use(launched, address):
    with socket.create_server((address, 0)) as other:
        launched(MASTER_PORT=other.getsockname()[1])
        with pytest.raises(UserError, match=r"--master_port \d+: another program has this port on \S+: choose another"):
            hosts.meet(1)


def test_one_process_listens_on_this_host_alone(launched):
    """And on a port that the system gives: two runs that start at the same moment do not take each other's."""
    launched(WORLD_SIZE=1)
    stores = [hosts.meet(1) for _ in range(2)]
    assert stores[0].port != stores[1].port and stores[0].host == "127.0.0.1"
    for store in stores:
        with pytest.raises(OSError):  # of all addresses of the host, only that one
            socket.create_connection(("127.0.0.2", store.port), timeout=5)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_free_port_is_not_one_that_the_system_gives():
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="utf-8") as file:
        first, last = map(int, file.read().split())
    if first < 32768:
        pytest.skip("this machine's range begins lower")
    assert all(not first <= distributed.free_port() <= last for _ in range(5))


@pytest.mark.parametrize(
    "text, says",
    [
        ("node1\n", ":1: write HOST slots=GPUS: node1"),
        ("# two\n\nnode1 slots=2\nnode2 slots=two\n", ":4: write HOST slots=GPUS: node2 slots=two"),
        ("node1 slots=0\n", ":1: write HOST slots=GPUS: node1 slots=0"),
        ("node1 slots=1\nnode1 slots=1\n", ":2: the host stands there twice, give it one line: node1"),
        ("# none\n", ": holds no host: write a line HOST slots=GPUS for each"),
        (None, ': no such file: write a line "HOST slots=GPUS" for each host'),
        ("node1 slots=1\nnode2\tslots=2 \n", None),
    ],
)
def test_a_hostfile_that_is_wrong(tmp_path, text, says):
    """One line and exit code 2 before the launcher, whose own answer is a traceback."""
    (tmp_path / "deepspeed").write_text("#!/bin/sh\necho started\n")
    (tmp_path / "deepspeed").chmod(0o755)
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    environment = {**os.environ, "HOSTFILE": str(path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = os.path.join(os.path.dirname(utils.__file__), "scripts", "train_hosts.sh")
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=120)
    expected = (2, "", f"error: HOSTFILE={path}{says}\n") if says else (0, "started\n", "")
    assert (done.returncode, done.stdout, done.stderr) == expected


# Who comes.


def test_a_process_that_does_not_come(launched, monkeypatch):
    monkeypatch.setattr(hosts, "launched_hosts", lambda: {0: "node1", 1: "node2"})
    with pytest.raises(NotStartedError) as stop:
        hosts.meet(0.005)
    assert stop.value.code == 4
    said = r"--start_timeout 0.005: of 2 processes 1 came in 0.005 minutes \(\S+\); missing: rank 1 on node2: see what"
    assert re.search(said, str(stop.value)), stop.value


@pytest.mark.parametrize("listens", [False, True], ids=["nobody", "another program"])
def test_a_first_process_that_does_not_answer(launched, listens):
    launched(RANK=1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        if listens:
            launched(MASTER_PORT=other.getsockname()[1])
        with pytest.raises(NotStartedError) as stop:
            hosts.meet(0.01)
    assert stop.value.code == 4 and "had no answer from the first process at 127.0.0.1 port" in str(stop.value)
    assert ("another program" in str(stop.value)) == listens


def test_another_program_where_the_first_process_should_be(launched, monkeypatch):
    """torch would wait for it without end; it is known long before --start_timeout."""
    monkeypatch.setattr(hosts, "CONNECT_SECONDS", 0.3)
    launched(RANK=1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        launched(MASTER_PORT=other.getsockname()[1])
        with pytest.raises(
            NotStartedError, match=r"--master_port \d+: what answers \S+ at 127.0.0.1 is another"
        ) as stop:
            hosts.meet(10)
    assert stop.value.code == 2


def rolls():
    """The store of the run that `launched` describes, as another process sees it, when it is there."""
    end = time.monotonic() + 60
    while True:
        try:
            return PrefixStore(f"start {hosts.run_key()}", hosts.reach(hosts.find_place(), end, 1))
        except NotStartedError:
            assert time.monotonic() < end


def test_the_store_of_torchrun(launched, capsys):
    """Its agent has the port: the first process is no server there; all come, and the first one says so."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launched(MASTER_PORT=agent.port, TORCHELASTIC_USE_AGENT_STORE="True")
    PrefixStore(f"start {hosts.run_key()}", agent).set("here 1", '["node2", "eth0"]')
    assert hosts.meet(1).port == agent.port
    assert re.fullmatch(r"2 processes: 1 on \S+ over lo, 1 on node2 over eth0\n", capsys.readouterr().out)


def test_a_process_that_leaves_before_the_start(launched):
    """The others do not wait for it until --start_timeout, and end with its exit code."""
    threading.Thread(target=lambda: rolls().set("left 1", '["node2", 2]'), daemon=True).start()
    with pytest.raises(NotStartedError) as stop:
        hosts.meet(5)
    assert (stop.value.code, str(stop.value)) == (
        2, "rank 1 on node2 left before the start with exit code 2: see what it said"
    )  # fmt: skip


def test_the_first_process_leaves_before_the_start(launched):
    answers = []

    def hear():
        roll = rolls()
        answers.append(hosts.ask(roll, "answer", float("inf")))
        roll.set("heard 1", "")

    thread = threading.Thread(target=hear, daemon=True)
    thread.start()
    hosts.LEAVE_SECONDS = 60  # put back by `launched`
    hosts.leave_word(2)
    thread.join(60)
    assert "rank 0 on " in answers[0] and "left before the start with exit code 2" in answers[0]


def test_leaving_on_one_host_tells_nobody(launched, monkeypatch):
    """The launcher ends the others; and there may be no torch to tell it with."""
    monkeypatch.setattr(hosts, "find_place", lambda: pytest.fail("it looked for others"))
    launched(LOCAL_SIZE=2)
    hosts.leave_word(2)


def test_hosts_of_the_launcher(launched, monkeypatch):
    slots = base64.urlsafe_b64encode(json.dumps({"node1": [0, 1], "node2": [0]}).encode()).decode()
    child = "from runtime import hosts; print(hosts.describe_missing({1, 2, 3}))"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    words = [sys.executable, "-c", parent, f"--world_info={slots}"]
    done = subprocess.run(words, cwd=utils.__file__.rpartition("/")[0], capture_output=True, text=True, timeout=120)
    assert done.stdout == "rank 1 on node1; rank 2 on node2; rank 3\n", done.stderr
    assert hosts.describe([["a", "eth0"], ["a", "eth0"], ["b", "ens3"]]) == "2 on a over eth0, 1 on b over ens3"


def test_the_deadline_of_the_start(monkeypatch, capsys):
    """Of what waits in a library after all have met; 0 is none, and a start in time is left alone."""
    ended = threading.Event()
    monkeypatch.setattr(hosts.os, "_exit", lambda code: ended.set() if code == 4 else None)
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.05)
    with hosts.ending_in(0), hosts.ending_in(1):
        pass
    time.sleep(0.2)
    assert not ended.is_set()
    with hosts.ending_in(0.001):
        assert ended.wait(60)
    assert "error: --start_timeout 0.001: " in capsys.readouterr().err
    [flag] = [action for action in train_parser()._actions if "--start_timeout" in action.option_strings]
    assert flag.help.startswith("minutes ") and flag.help.endswith("0: off") and flag.default == 10


# What hosts share.


@pytest.fixture
def several(launched, monkeypatch):
    """Collectives of two hosts, as the second one sees them; a function says what the others give."""

    def give(name, others):
        monkeypatch.setattr(shared_files, "on_main", lambda function: name)
        monkeypatch.setattr(shared_files, "SHARE_SECONDS", 0.1)
        monkeypatch.setattr(shared_files, "host_name", lambda: "node2")

        def gather(found, value):
            found[:] = [*others, value]

        monkeypatch.setattr(dist, "all_gather_object", gather)

    launched(RANK=1)
    return give


def test_a_folder_that_a_host_does_not_see(several, tmp_path):
    several(str(tmp_path / "seen"), [None])
    with pytest.raises(UserError, match="--output_dir out: node2 does not see what the first host writes there: give"):
        shared_files.check_shared("out")
    (tmp_path / "seen").touch()
    shared_files.check_shared("out")
    several(str(tmp_path / "seen"), ["node3"])
    with pytest.raises(UserError, match="--output_dir out: node3 does not see"):
        shared_files.check_shared("out")


def test_what_the_first_host_writes_goes_again(launched, monkeypatch, tmp_path):
    monkeypatch.setattr(dist, "all_gather_object", lambda found, value: None)
    shared_files.check_shared(str(tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []


def test_rows_that_differ_between_hosts(several):
    several("", [("node1", "a")])
    shared_files.check_same("rows", "a")
    with pytest.raises(UserError, match="rows: node2 has other ones than node1: copy the first host's files"):
        shared_files.check_same("rows", "b")


def test_on_one_host_nothing_is_compared(launched, monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: pytest.fail("it asked"))
    launched(LOCAL_SIZE=2)
    shared_files.check_shared("nowhere")
    shared_files.check_same("rows", "a")
    assert hosts.control_group(torch.device("cpu")) is None
