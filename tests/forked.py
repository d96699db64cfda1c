"""Commands of the project in processes of their own, without the ten seconds in which each would import torch and transformers.

One process imports them, and nothing of the project, and forks for every command. What the command meets is otherwise what it meets
where a shell starts it: its own working directory, environment, arguments, import path and output, and the interpreter's own end.
"""

import contextlib
import importlib
import json
import os
import pathlib
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time

IMPORTED = ("accelerate", "filelock", "matplotlib.backends.backend_agg", "matplotlib.pyplot", "timm", "torch.utils.tensorboard",
            "transformers.models.blip_2.modeling_blip_2", "transformers.models.gpt2.tokenization_gpt2",
            "transformers.models.opt.modeling_opt")  # what a run imports on the way


# --- in the process that forks ------------

def obey(order):
    """In the fork: run the script, or the text behind -c, and leave by SystemExit or by whatever it raises."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    first, *rest = order["argv"]
    if first == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0], sys.argv = str(pathlib.Path(first).resolve().parent), [first, *rest]
        runpy.run_path(first, run_name="__main__")
    sys.exit()


def prepare():
    """What every fork would do for itself, a second or two of it: import, and the table of names that transformers 5 makes at the first
    loading, a thousand patterns."""
    for name in IMPORTED:
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        get_checkpoint_conversion_mapping("blip-2")


def serve():
    """A line of stdin is a list of orders (JSON, see Forker.run): fork a process for each, all at once -> a line with their exit codes.

    Nothing here may compute: a fork of a process whose OpenMP threads run can hang.
    """
    import torch
    torch.set_num_threads(1)
    prepare()
    for line in sys.stdin:
        orders, codes, started = json.loads(line), {}, time.monotonic()
        children = {}
        for order in orders:
            child = os.fork()
            if not child:
                obey(order)
            children[child] = order
        while len(codes) < len(children):
            for child in children.keys() - codes.keys():
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() - started > children[child]["timeout"]:
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.005)
        print(json.dumps([codes[child] for child in children]), flush=True)


# --- in pytest ------------

class Forker:
    """Starts commands by the process that forks; the first of them waits until it is there."""

    def __init__(self):
        self.process = None

    def run(self, *commands, cwd=None, env=os.environ, own=({},), timeout=100):
        """Run commands at once, each [script, argument, ...] or ["-c", text, argument, ...], one thread each, with `env` and what
        is its `own` of it, in `cwd` (one for all, or a list) -> CompletedProcess of each; its returncode is -9 where it took longer
        than `timeout` seconds."""
        with tempfile.TemporaryDirectory() as place:
            orders = [{"argv": [str(word) for word in argv], "cwd": str(cwd[number] if isinstance(cwd, list) else cwd or os.getcwd()),
                       "env": {**env, "OMP_NUM_THREADS": "1", **mine},
                       "stdout": f"{place}/{number}.out", "stderr": f"{place}/{number}.err", "timeout": timeout}
                      for number, (argv, mine) in enumerate(zip(commands, own, strict=True))]
            codes = self.ask(orders)
            return [subprocess.CompletedProcess(order["argv"], code, *(pathlib.Path(order[name]).read_text(encoding="utf-8")
                                                                       for name in ("stdout", "stderr")))
                    for order, code in zip(orders, codes)]

    def together(self, argv, processes=2, machines=1, cwds=None):
        """A script in processes that find each other by the variables that torchrun sets -> CompletedProcess of each rank.

        machines: how many they are spread over; cwds: the working directory of each process."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank % (processes // machines)), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes // machines),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""} for rank in range(processes)]
        return self.run(*[argv] * processes, own=own, cwd=cwds, timeout=300)

    def ask(self, orders):
        if self.process is None:
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(60)


if __name__ == "__main__":
    serve()
