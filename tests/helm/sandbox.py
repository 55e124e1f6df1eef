"""A container for a test, made of what a container is made of: root in new mount, network and process namespaces.

    unshare --mount --net --pid --fork --kill-child python sandbox.py SPECIFICATION.json

builds a root file system that is read-only but for the mounts given, starts the command in it as the user given, with
no capability left and with exactly the environment given, asks it over HTTP, runs further commands in there, stops it
with SIGTERM, and prints what happened as JSON.
"""

import ctypes
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str | None, flags: int, data: str | None = None) -> None:
    arguments = [text.encode() if text is not None else None for text in (source, str(target), kind)]
    if _libc.mount(*arguments, flags, data.encode() if data else None) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mount {source} at {target}: {os.strerror(error)}")


def build(root: Path, read_only: list[str], writable: dict[str, str]) -> None:
    mount("none", Path("/"), None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", 0, "mode=755")
    # First, since what is read-only may lie below one of these, as a venv in /tmp does.
    for target_name, source_name in writable.items():
        target = root / target_name.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        mount(source_name, target, None, MS_BIND)
    for name in read_only:
        source = Path(name)
        target = root / name.lstrip("/")
        if source.is_symlink():
            target.symlink_to(source.readlink())
            continue
        target.mkdir(parents=True, exist_ok=True)
        mount(name, target, None, MS_BIND | MS_REC)
        mount("none", target, None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    for name in ("/dev", "/proc"):
        (root / name[1:]).mkdir()
    mount("proc", root / "proc", "proc", 0)
    mount("/dev", root / "dev", None, MS_BIND | MS_REC)
    mount("none", root, None, MS_REMOUNT | MS_RDONLY)


def loopback_up() -> None:
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14s", b"lo", IFF_UP, b""))


def ask(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def main(specification: dict[str, Any]) -> dict[str, Any]:
    root = Path(specification["root"])
    build(root, specification["read_only"], specification["writable"])
    loopback_up()

    user = str(specification["user"])
    inside = [
        shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot",
        str(root),
        "setpriv",
        f"--reuid={user}",
        f"--regid={user}",
        "--clear-groups",
    ]
    inside += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]

    def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
        done = subprocess.run([*inside, *command], env=environment, capture_output=True, text=True, timeout=60)
        return {"status": done.returncode, "output": done.stdout + done.stderr}

    log = Path(specification["log"])
    with log.open("w") as output:
        server = subprocess.Popen(
            [*inside, *specification["command"]], env=specification["environment"], stdout=output, stderr=output
        )
        deadline = time.monotonic() + 60
        while ask(specification["ready"]) != 200 and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        result: dict[str, Any] = {"probes": {url: ask(url) for url in specification["probes"]}}
        result["status"] = (root / f"proc/{server.pid}/status").read_text() if server.poll() is None else ""
        result["commands"] = [run(one["command"], one["environment"]) for one in specification["commands"]]
        server.terminate()
        try:
            result["exit"] = server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            result["exit"] = server.wait()
    result["log"] = log.read_text()
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
