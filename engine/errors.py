"""errors.py: what a user can mend, and how it is told: one error and an exit code.

    DataError       a user's mistake, or a file's
    exit_code       what every script's main() is run by
    said            what an exception says, in one line of some length
    batch_size_in_memory_errors, out_of_memory, dead_loader    where memory runs out, or a loader process dies
"""

import contextlib
import multiprocessing
import os
import re
import select
import signal
import sys


class DataError(Exception):
    """Something that the user can mend: bad input, a missing file, a wrong flag. Told as one error, with exit code 2."""


DEAD_LOADER = r"DataLoader (worker \(pid|timed out)"  # what torch says of a loader process that died or hangs


def said(error, length=160):
    """What an exception (or a text) says, in one line; a long one ends with a whole sentence or, where none fits, a whole word."""
    text = " ".join(str(error).split())
    if len(text) <= length:
        return text
    sentences = re.match(r".{20,}[.!?](?= )", text[:length + 1])
    return sentences[0] if sentences else text[:length].rpartition(" ")[0] + " ..."


def exit_code(main, argv=None):
    """Run main(argv) and turn what a user can mend into one error and an exit code: 2 bad input, 130 Ctrl-C; 141 and no error
    where nobody reads the output any more (| head), as other programs end then."""
    try:
        try:
            return main(argv) or 0
        finally:
            sys.stdout.flush()  # here and not at exit, where Python would print a traceback of its own
    except DataError as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except OSError as error:  # a full disk, a folder without rights
        if isinstance(error, BrokenPipeError) and nobody_reads():
            end_loaders()
            return 141
        message, code = f"{error.filename or 'a file'}: {error.strerror or error}", 2
    except ModuleNotFoundError as error:  # of those that are imported where they are needed
        message, code = f"{error}: pip install -r requirements.txt", 2
    except (MemoryError, RuntimeError) as error:
        if ran_out_of_memory(error):
            message, code = out_of_memory(error, "--batch-size"), 2
        elif re.search(DEAD_LOADER, str(error)):
            message, code = dead_loader(error), 2
        else:
            raise
    end_loaders()
    print(f"error: {message}", file=sys.stderr)
    return code


def nobody_reads():
    """Has the reader of our output gone? What is still to be written then goes nowhere, so that Python's end is silent too."""
    watched = select.poll()
    for descriptor in (1, 2):
        watched.register(descriptor, 0)
    gone = [descriptor for descriptor, event in watched.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(gone)


def end_loaders():
    """End the loader processes that an error has left. Otherwise Python does it at exit with SIGTERM, which they outlive for 30 s, and
    torch, which watches them by SIGCHLD, tells of each after the error that was the reason."""
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if not left:
        return
    watching = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in left:
        child.kill()
    for child in left:
        child.join()
    signal.signal(signal.SIGCHLD, watching)


def ran_out_of_memory(error):
    """Is this what torch or Python raises where a GPU or the machine is too small?"""
    import torch  # not above: metrics.py as a command needs none of it
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def batch_size_in_memory_errors(batch_size, flag="--batch-size"):
    """Memory that runs out within is a DataError that says the batch size and the flag for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise DataError(out_of_memory(error, f"{flag} {batch_size}")) from None


def out_of_memory(error, batch_size):
    """The message for a GPU or a machine that is too small, with what was used where that is known. batch_size: the flag."""
    import torch
    used = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB were in use" if torch.cuda.is_initialized() else ""
    what = f"{said(error)}{used}" or "of this machine, not of a GPU"
    same = " (in training double --accumulation: the result is the same)" if batch_size.startswith("--batch-size") else ""
    return f"out of memory ({what}): halve {batch_size}{same}, use --precision bf16, or train fewer parts"


def dead_loader(error):
    """The message for a loader process that was killed or hangs."""
    return (f"a loader process failed ({said(error)}): use --workers 0, or give it more shared memory "
            "(/dev/shm); a hanging one often waits for a network disk")
