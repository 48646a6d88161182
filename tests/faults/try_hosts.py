"""Several hosts on one machine: network namespaces, each with a network interface, an /etc/hosts and a name of its own.

The trials run scripts/train_hosts.sh as a user would: on each host, or through ssh and pdsh where these are installed.
They are a part of soak.py (bash scripts/try_hosts.sh).
"""

import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

from harness import default_signals, last_weights, log_of

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SWITCH = "trial-switch"
END_SECONDS = 300
PATHS = f"{os.environ['PATH']}:/usr/sbin:/sbin"
BASE_STEPS = 1  # of make_base.py: whether the base has learnt anything does not matter here
NUM_ROWS = 12  # one update of two processes has 2 x 1 x 2 of them
SHORT = "--max_len 256 --max_src_len 160 --gradient_accumulation_steps 2 --show_loss_step 1 --num_train_epochs 2"
ENDLESS = f"{SHORT} --num_train_epochs 1000"
NUM_STEPS = 6


def missing():
    """Why there can be no trial here; None where there can be."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare", "mount", "hostname"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    done = subprocess.run(["ip", "netns", "add", SWITCH], capture_output=True, text=True)
    if done.returncode != 0:
        return f"ip netns add: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", SWITCH], check=True)
    return None


def no_ssh():
    """Why the launcher cannot start the hosts by itself; None where it can."""
    absent = [tool for tool in ("sshd", "ssh", "ssh-keygen", "pdsh") if not shutil.which(tool, path=PATHS)]
    return f"{', '.join(absent)} not installed" if absent else None


def call(*words):
    """Run a command that must succeed."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)


class Host:
    """One host: a namespace, and what runs there."""

    def __init__(self, number, folder, version):
        self.number, self.folder, self.version = number, folder, version
        self.name, self.space = f"host{number}", f"trial-host{number}"
        self.address = f"10.77.0.{number}" if version == 4 else f"fd77::{number}"
        self.process = None

    def up(self):
        """Make it, with a cable to the switch."""
        call("ip", "netns", "add", self.space)
        cable = f"cable{self.number}"
        call("ip", "-n", SWITCH, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", self.space)
        call("ip", "-n", SWITCH, "link", "set", cable, "master", "switch", "up")
        width = ("/24",) if self.version == 4 else ("/64", "nodad")
        call("ip", "-n", self.space, "address", "add", self.address + width[0], "dev", "eth0", *width[1:])
        for device in ("lo", "eth0"):
            call("ip", "-n", self.space, "link", "set", device, "up")
        # As Debian and Ubuntu write it: the host's own name is an address that no other host reaches.
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", f"127.0.1.1 {self.name}"]
        others = [f"{self.address.rpartition(sign)[0]}{sign}{n} host{n}" for n in range(1, 4) for sign in self.sign]
        lines += [line for line in others if not line.endswith(self.name)]
        (self.folder / f"{self.name}.hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def sign(self):
        """What is before the last part of an address, in a tuple."""
        return (".",) if self.version == 4 else (":",)

    def command(self, line):
        """Words that run a line of bash on this host."""
        own = f"hostname {self.name} && mount --bind {self.folder}/{self.name}.hosts /etc/hosts && {line}"
        return ["ip", "netns", "exec", self.space, "unshare", "--uts", "bash", "-c", own]

    def start(self, line, environment):
        """Start a line of bash; its output goes to a file."""
        self.output = self.folder / f"{self.name}.out"
        with open(self.output, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                self.command(line),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=default_signals,
            )

    @property
    def text(self):
        """What was printed so far."""
        return self.output.read_text(encoding="utf-8", errors="replace") if self.process else ""

    def processes(self):
        """Ids of all processes there."""
        done = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True)
        return [int(word) for word in done.stdout.split()]

    def is_busy(self):
        """Does anything run there, or is about to?"""
        return bool(self.process and self.process.poll() is None or self.processes())

    def ranks(self):
        """Ids of the training processes there."""
        found = []
        for process in self.processes():
            with contextlib.suppress(OSError):
                words = pathlib.Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
                if b"train.py" in words and any(word.startswith(b"--local_rank") for word in words):
                    if b"deepspeed.launcher.launch" not in words:
                        found.append(process)
        return found

    def down(self):
        """End all that runs there, and take it away."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self.process:
            self.process.wait(60)
        subprocess.run(["ip", "netns", "del", self.space], capture_output=True)


class Trial:
    """Hosts on one switch, and a training over them."""

    def __init__(self, folder, common, num_hosts=2, version=4):
        folder.mkdir(parents=True)
        self.folder, self.common = folder, common
        self.outs = folder / "outs"
        self.outs.mkdir()
        self.hosts = [Host(number, folder, version) for number in range(1, num_hosts + 1)]
        lines = [f"{host.name} slots=1\n" for host in self.hosts]
        (folder / "hostfile").write_text("".join(lines), encoding="utf-8")

    def __enter__(self):
        call("ip", "netns", "add", SWITCH)
        call("ip", "-n", SWITCH, "link", "add", "switch", "type", "bridge")
        call("ip", "-n", SWITCH, "link", "set", "switch", "up")
        for host in self.hosts:
            host.up()
        return self

    def __exit__(self, *error):
        for host in self.hosts:
            host.down()
        subprocess.run(["ip", "netns", "del", SWITCH], capture_output=True)

    def start(self, flags, hosts=None, before=None, output="out", launcher=True):
        """Start the training on these hosts (all of them). before: {host: bash that runs there first}."""
        for host in hosts or self.hosts:
            told = f"--no_ssh --node_rank {host.number - 1} --master_addr {self.hosts[0].address}" if launcher else ""
            environment = {
                **{"HOSTFILE": str(self.folder / "hostfile"), "LAUNCHER_FLAGS": told, "MODE": "glm3"},
                **{"MODEL": str(self.common / "base"), "TRAIN_TYPE": "lora", "OUTPUT": str(self.outs / output)},
                **{"TRAIN_PATH": str(self.common / "rows.json"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
            }
            environment["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
            line = (before or {}).get(host, "true") + f" && exec bash scripts/train_hosts.sh {flags}"
            host.start(line, environment)
        self.begun = time.monotonic()

    def wait_for(self, text, host=None):
        """Wait until a host, the first one, has printed this; AssertionError where it does not come."""
        host = host or self.hosts[0]
        end = time.monotonic() + END_SECONDS
        while text not in host.text:
            assert host.process.poll() is None and time.monotonic() < end, self.text[-4000:]
            time.sleep(0.05)

    def end(self):
        """({host: exit code}, seconds) until nothing runs on any host; a host where something hangs has None."""
        begun = time.monotonic()
        while any(host.is_busy() for host in self.hosts) and time.monotonic() < begun + END_SECONDS:
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        codes = [None if host.is_busy() else host.process.returncode for host in self.hosts if host.process]
        return codes, round(seconds, 1)

    @property
    def text(self):
        """What all hosts have printed."""
        return "\n".join(f"--- {host.name}\n{host.text}" for host in self.hosts)


def result(trial, codes, seconds, holds):
    """A row; what was printed is shown where it does not hold."""
    if not holds:
        print(trial.text[-6000:])
    return {"hosts": len(trial.hosts), "codes": codes, "seconds": seconds, "holds": bool(holds)}


def is_trained(trial, output="out"):
    """Is the last checkpoint there?"""
    return bool(list((trial.outs / output).glob("epoch-2-step-*/adapter_model.safetensors")))


def plain(folder, common, num_hosts=2, version=4, slow=False):
    """A training that comes to its end."""
    with Trial(folder, common, num_hosts, version) as trial:
        for host in trial.hosts if slow else []:
            slow_down(host)
        trial.start(SHORT)
        codes, _ = trial.end()
        seconds = round(time.monotonic() - trial.begun, 1)
        said = f"{num_hosts} processes: 1 on host1 over eth0, 1 on host2 over eth0"
        return result(trial, codes, seconds, set(codes) == {0} and is_trained(trial) and said in trial.text)


def slow_down(host):
    """A link of 20 Mbit/s with 20 ms; without the delay where the kernel has no netem."""
    netem = ["tc", "-n", host.space, "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "20ms", "rate", "20mbit"]
    if subprocess.run(netem, capture_output=True).returncode:
        call(*netem[:-5], "tbf", "rate", "20mbit", "burst", "32kbit", "latency", "400ms")


def struck(folder, common, strike):
    """A training that something happens to: seconds until no process is left on any host."""
    with Trial(folder, common) as trial:
        trial.start(ENDLESS)
        trial.wait_for("loss ")
        strike(trial)
        codes, seconds = trial.end()
        return result(trial, codes, seconds, None not in codes and 0 not in codes and seconds < 120)


def kill_a_rank(trial):
    for process in trial.hosts[1].ranks():
        os.kill(process, signal.SIGKILL)


def cut_the_cable(trial):
    call("ip", "-n", SWITCH, "link", "set", "cable2", "down")


def resumed(folder, common):
    """A run that is killed on both hosts after a state and started again: the weights of one that was not."""
    with Trial(folder, common) as trial:
        flags = f"{SHORT} --save_state_step 2"
        trial.start(flags, output="whole")
        trial.end()
        trial.start(flags)
        trial.wait_for("/state-step-2")
        for host in trial.hosts:
            for process in host.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        trial.end()
        trial.start(flags)
        codes, _ = trial.end()
        seconds = round(time.monotonic() - trial.begun, 1)
        holds = set(codes) == {0} and "resumed from" in trial.text
        outs = [trial.outs / name for name in ("whole", "out")]
        holds = holds and last_weights(outs[0], NUM_STEPS) == last_weights(outs[1], NUM_STEPS)
        return result(trial, codes, seconds, holds and log_of(outs[0]) == log_of(outs[1]))


def absent(folder, common):
    """A host that does not start: the other one ends after --start_timeout, here half a minute."""
    with Trial(folder, common) as trial:
        trial.start(f"{SHORT} --start_timeout 0.5", hosts=trial.hosts[:1])
        codes, _ = trial.end()
        seconds = round(time.monotonic() - trial.begun, 1)
        says = "of 2 processes 1 came in 0.5 minutes (host1); missing: rank 1 on host2"
        return result(trial, codes, seconds, codes == [4] and says in trial.text)


def refused(folder, common, says, before, flags=SHORT):
    """A fault that one line names on all hosts before the training. before: {number of a host: bash}."""
    with Trial(folder, common) as trial:
        words = {"outs": shlex.quote(str(trial.outs)), "common": shlex.quote(str(common))}
        trial.start(flags, before={trial.hosts[n - 1]: line.format(**words) for n, line in before.items()})
        codes, _ = trial.end()
        seconds = round(time.monotonic() - trial.begun, 1)
        return result(trial, codes, seconds, codes == [2, 2] and says in trial.text)


def through_ssh(folder, common):
    """The launcher starts the second host by itself, through pdsh and ssh."""
    with Trial(folder, common) as trial:
        key, settings = folder / "key", folder / "ssh"
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        options = [f"IdentityFile {key}", "StrictHostKeyChecking no", "UserKnownHostsFile /dev/null", "LogLevel ERROR"]
        settings.write_text("\n".join(["Host *", *options, ""]), encoding="utf-8")
        os.makedirs("/run/sshd", exist_ok=True)
        daemon = (
            f"{shutil.which('sshd', path=PATHS)} -D -h {key} -o AuthorizedKeysFile={key}.pub -o StrictModes=no"
            " -o PidFile=none -o UsePAM=no -o PermitRootLogin=yes"
        )
        call("chmod", "600", key)
        daemons = [subprocess.Popen(host.command(f"exec {daemon}"), start_new_session=True) for host in trial.hosts]
        first = trial.hosts[0]
        ssh = f"ssh -F {settings}"
        wrapper = folder / "bin"
        wrapper.mkdir()
        (wrapper / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {settings} "$@"\n', encoding="utf-8")
        os.chmod(wrapper / "ssh", 0o755)
        before = {first: f"export PATH={wrapper}:$PATH; until {ssh} host2 true; do sleep 0.2; done"}
        trial.start(SHORT, hosts=[first], before=before, launcher=False)
        code = first.process.wait(END_SECONDS)
        seconds = round(time.monotonic() - trial.begun, 1)
        for process in daemons:
            process.kill()
        return result(trial, [code], seconds, code == 0 and is_trained(trial))


SHARED = "host2 does not see what the first host writes there: give a folder that all hosts share"
TRIALS = {  # {name · in Chinese: function of (folder, common)}
    "plain, 2 hosts · 普通训练，2 台": plain,
    "plain, 3 hosts · 普通训练，3 台": lambda *where: plain(*where, num_hosts=3),
    "IPv6 alone · 只有 IPv6": lambda *where: plain(*where, version=6),
    "slow link, 20 Mbit/s · 慢速链路": lambda *where: plain(*where, slow=True),
    "through ssh and pdsh · 经 ssh 与 pdsh": through_ssh,
    "killed and resumed, bit for bit · 杀死后恢复，逐位相同": resumed,
    "a rank killed: until all are gone · 杀死一个进程：到全部退出": lambda *where: struck(*where, kill_a_rank),
    "cable cut: until all are gone · 断网线：到全部退出": lambda *where: struck(*where, cut_the_cable),
    "a host that does not start, --start_timeout 0.5 · 一台没有启动": absent,
    "a host without the rows · 一台没有数据": lambda *where: refused(
        *where, "no such file", {2: "mount -t tmpfs none {common}"}
    ),
    "other rows on a host · 一台的数据不同": lambda *where: refused(
        *where,
        "rows (or the tokenizer): host2 has other ones than host1",
        {2: "mount --bind {common}/other.json {common}/rows.json"},
    ),
    "folder not shared · 文件夹不共享": lambda *where: refused(*where, SHARED, {2: "mount -t tmpfs none {outs}"}),
    "port in use · 端口被占用": lambda *where: refused(
        *where,
        "--master_port 29500: another program has this port on host1",
        {1: "{{ timeout 60 python -m http.server 29500 & sleep 2; }}"},
    ),
}


def trials(args, folder):
    """Rows of all trials. The part of soak.py."""
    common = folder / "common"
    common.mkdir(parents=True)
    base = [sys.executable, "scripts/make_base.py", "--mode", "glm3", "--output_dir", str(common / "base")]
    subprocess.run([*base, "--num_steps", str(BASE_STEPS)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()
    for name, lines in (("rows", rows[:NUM_ROWS]), ("other", rows[1 : NUM_ROWS + 1])):
        (common / f"{name}.json").write_text("\n".join(lines), encoding="utf-8")
    chosen = [name for name in TRIALS if args.inputs in name]
    for number, name in enumerate(chosen[: args.limit or None]):
        if TRIALS[name] is through_ssh and (reason := no_ssh()):
            print(f"skipped: {name}: {reason}", flush=True)
            continue
        yield {"case": name, **TRIALS[name](folder / str(number), common)}
