"""Processes that begin with the host library loaded, for tests of what programs do, not of how they start.

A server loads torch and transformers once, which takes seconds, and forks for each program. None of our modules is
among them: a program loads those itself, under its own environment.
"""

import atexit
import functools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
LOADED = (
    "torch", "torch._dynamo", "torchvision", "transformers.masking_utils", "transformers.modeling_utils",
    "transformers.generation", "transformers.models.auto.processing_auto", "transformers.models.auto.modeling_auto",
)  # fmt: skip
LIMIT_S = 300
# Hands its arguments, environment and streams to the server, and ends as the program does.
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b" "], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[2:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(9)))
"""


@functools.cache
def python() -> tuple[str, ...]:
    """The words that start a Python program; the plain ones where processes cannot be forked."""
    if not (hasattr(os, "fork") and hasattr(socket, "send_fds")):
        return (sys.executable,)
    folder = tempfile.mkdtemp(prefix="mminfer-")  # a socket's path has to be short
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    client, path = Path(folder, "client.py"), str(Path(folder, "socket"))
    client.write_text(CLIENT, "utf-8")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.preloaded", path]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    return (sys.executable, "-S", "-E", str(client), path)


def serve(path: str) -> None:
    """Forks for each request; returns in the process that is to become the program."""
    for name in LOADED:
        import_module(name)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:  # it ends with whoever started it
            connection, _ = server.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            return answer(connection)
    os._exit(0)


def answer(connection: socket.socket) -> None:
    """Waits for the program and tells how it ended; returns in the program."""
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    words, folder, environment = json.loads(b"".join(iter(lambda: connection.recv(2**16), b"")))
    program = os.fork()
    if program:
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    connection.close()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(streams[number], number)
        os.close(streams[number])
        kind = {"errors": "backslashreplace", "buffering": 1} if name == "stderr" else {}
        setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False, **kind))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    signal.alarm(LIMIT_S)


def run() -> None:
    """What Python does with its arguments."""
    kind, *rest = sys.argv
    sys.path[0] = ""
    if kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
    run()
