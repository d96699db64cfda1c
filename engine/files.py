"""files.py: files that are whole or not there at all, tables for people, where relative paths are looked for, locks, full disks."""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import tempfile

from engine.errors import DataError

PROJECT = pathlib.Path(__file__).resolve().parent.parent


def located(place):
    """A path from the working directory, else from the project's folder where it is there; absolute paths stay as they are."""
    own = os.path.join(PROJECT, place)
    return own if os.path.exists(own) and not os.path.exists(place) else str(place)


@contextlib.contextmanager
def whole_file(path, mode="w"):
    """Open a temporary file beside `path`; when the block ends well it is flushed to disk and renamed to `path`."""
    path = pathlib.Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with errors_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o644)  # mkstemp's 0600 would stay
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # a disk that is read-only by now keeps it; the error to tell is the first
                os.unlink(temporary)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut may undo the rename
        finally:
            os.close(folder)


@contextlib.contextmanager
def errors_about(path):
    """An OSError within names this file: a full disk does not say what for, and a temporary name says nothing."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def remedy(error):
    """What helps where an OSError, or a library's error that quotes one, kept a file from being written."""
    closed = (errno.EROFS, errno.EACCES, errno.EPERM)
    denied = getattr(error, "errno", None) in closed or any(os.strerror(number) in str(error) for number in closed)
    return "see that its folder can be written" if denied else "free some space"


def write_all(file, data):
    """All bytes of `data` to an unbuffered file: a write may take a part, and a full disk shows in the next."""
    data = memoryview(data)
    while data:
        data = data[file.write(data):]


def append_whole(path, data):
    """Bytes at the end of a file, all of them or none."""
    with errors_about(path), open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            write_all(file, data)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def write_csv(path, table):
    """A list of dicts as CSV for people to open: the columns as they come, empty cells where a row lacks one. A NUL, which an untrained
    model may answer and no table can hold (Python 3.10 does not write it, rows.py does not read it), becomes U+FFFD."""
    import pandas  # not above: it takes a second, which no start has to pay
    with whole_file(path) as file:
        pandas.DataFrame(table).replace("\0", "\N{REPLACEMENT CHARACTER}", regex=True).to_csv(file, index=False, lineterminator="\r\n")


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder beside `folder`, which takes its place (and replaces it) when the block ends well, and is deleted where it does not.
    What safetensors could not write is an OSError, as what others could not."""
    from safetensors import SafetensorError
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise OSError(errno.EIO, " ".join(str(error).split()), str(folder)) from None
        raise


def refuse_unwritable(path):
    """DataError where a file cannot be written, before hours are spent on what goes into it."""
    folder = pathlib.Path(path).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def file_lock(path, waiting, log=print):
    """Hold a lock file; a second process says `waiting` and waits until the first has ended, however that ends."""
    from filelock import FileLock, Timeout
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_full_disk(out, needed):
    """DataError where the disk of `out` has fewer than `needed` bytes free: better now than after the first epoch."""
    free = shutil.disk_usage(out).free
    if free < needed:
        raise DataError(f"--out {out}: {needed / 2**20:,.0f} MB are needed for the checkpoints and {free / 2**20:,.0f} MB are free")


def digest(path):
    """sha256 of a file's bytes."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(2**18))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
