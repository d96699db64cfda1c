"""environment.py: where a run happens: versions, machine; and how that is told without telling names and places.

    note_versions, project_version   packages outside the tested ranges; the commit
    provenance                       how a result was made, for the last part of a page
    environment                      what a bug report needs (python core.py --env), names and paths masked
    masked, masked_path, masked_names, last_part    words of a command line as they may be shown to others
"""

import contextlib
import getpass
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

from engine.files import PROJECT


# --- versions ------------

def note_versions():
    """Lines about installed packages that are outside the ranges of requirements.txt, in which everything was tested."""
    from packaging.requirements import Requirement
    notes = []
    for line in (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line)
            try:
                found = importlib.metadata.version(wanted.name)
            except importlib.metadata.PackageNotFoundError:
                found = None
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                notes.append(f"note: {wanted.name} {found or 'is not installed'}: tested with {wanted.specifier}")
    return notes


def project_version():
    """The commit of this project, whether its files have changed since, and the code that is not in it."""
    def git(*words):
        return subprocess.run(["git", "-C", str(PROJECT), *words], capture_output=True, text=True, timeout=30)

    try:
        commit, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--untracked-files=all", "-z")
    except (OSError, subprocess.TimeoutExpired):
        return "not known (git cannot be run)"
    if commit.returncode:
        return "not known (no git checkout)"
    changed = [entry for entry in changes.stdout.split("\0") if entry]
    untracked = [entry[3:] for entry in changed if entry.startswith("??") and entry.endswith(".py")]
    return commit.stdout.strip() + (", with changes that are not committed" if any(not e.startswith("??") for e in changed) else "") + (
        f", with code that is not in it ({', '.join(untracked[:4])}{', ...' if len(untracked) > 4 else ''})" if untracked else "")


def provenance(**lines):
    """How a result was made: `lines` as they are but for None, command, version of this project, packages, date -> [(name, text)]."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "numpy")]
    known = {"command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": project_version(),
             "versions": ", ".join(["Python " + sys.version.split()[0], *packages]), "date": time.strftime("%Y-%m-%d %H:%M %z")}
    return [(name, str(value)) for name, value in {**lines, **known}.items() if value is not None]


# --- masks ------------

def masked(word):
    """A word of a command line or the value of a variable: of each path outside the working folder its last part, names hidden."""
    head, equals, tail = word.rpartition("=")
    if "://" in tail:  # may hold a password
        return masked_path(head) + equals + tail.partition("://")[0].rpartition(":")[-1] + "://..."
    pieces = re.split(r"(?<!^[A-Za-z]):", tail)  # a list of paths; C: is none
    return masked_path(head) + equals + ":".join(masked_path(piece) for piece in pieces)


def masked_path(path):
    """A path inside the working folder as it is; of another one the last part, after dots. Names are hidden."""
    parts = re.split(r"[/\\]", path)
    outside = path[:1] in ("/", "\\", "~") or ".." in parts or re.match(r"[A-Za-z]:[/\\]", path)
    return masked_names(".../" + last_part(path) if outside else path)


def last_part(path):
    """The last part of a path of any system; names are hidden."""
    return masked_names(re.split(r"[/\\]", path.rstrip("/\\"))[-1])


def masked_names(text):
    """The user's and the machine's name, where they stand as a word, as <user> and <host>."""
    for hidden, names in (("<user>", _user_names()), ("<host>", _host_names())):
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?i)(?<![A-Za-z0-9<]){re.escape(name)}(?![A-Za-z0-9])", hidden, text)
    return text


def _user_names():
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(Exception):  # a container's user may have no name: KeyError, OSError or ImportError
        names.add(getpass.getuser())
    with contextlib.suppress(RuntimeError):
        names.add(pathlib.Path.home().name)
    return names - {""}


def _host_names():
    names = {socket.gethostname(), platform.node()}
    return {part for name in names for part in (name, name.partition(".")[0])} - {"", "localhost"}


# --- the machine ------------

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "timm", "peft", "bitsandbytes", "safetensors", "huggingface_hub",
            "numpy", "pillow")
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS",
             "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "PYTORCH_CUDA_ALLOC_CONF",
             "CUBLAS_WORKSPACE_CONFIG", "NCCL_P2P_DISABLE", "LD_LIBRARY_PATH", "PYTHONPATH", "TMPDIR")


def environment():
    """What a bug report needs, a line for each thing; user, host and paths are masked. What cannot be found out is said."""
    found = {"project": project_version, "python": platform.python_version, "platform": platform.platform,
             "processors": _processors, "memory": _memory,
             "free disk, this folder": lambda: f"{shutil.disk_usage('.').free / 2**30:.1f} GiB", "cuda": _cuda,
             **{name: lambda name=name: installed(name) for name in PACKAGES}, "outside the tested versions": _untested,
             **{name: lambda name=name: masked(os.environ[name]) for name in VARIABLES if name in os.environ}}
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {masked_names(tried(look))}" for name, look in found.items())


def tried(look):
    """look() as one line of text, or what kept it from answering: a report on a broken installation must not break itself."""
    try:
        return " ".join(str(look()).split())
    except Exception as error:  # of any library
        return f"cannot be told ({type(error).__name__})"


def installed(name):
    """The version of a package, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processors():
    import torch
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} of {os.cpu_count()}, {torch.get_num_threads()} threads in torch"


def _memory():
    return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _cuda():
    import torch
    if not torch.cuda.is_available():
        return f"no GPU in use (torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU'})"
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}; " + ", ".join(f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus)


def _untested():
    return "; ".join(note.removeprefix("note: ") for note in note_versions()) or "none"
