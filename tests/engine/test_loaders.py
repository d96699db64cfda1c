"""pytest tests/engine/test_loaders.py: how loader processes end."""

import textwrap
import time

from conftest import ROOT


def test_after_an_error_the_loaders_end_quietly(forker):
    """One line, nothing after it, and soon: loaders of which the error's frames hold the iterator were ended at exit by a signal."""
    script = textwrap.dedent("""
        import sys
        from engine import errors, loaders

        class Numbers:
            def __getitem__(self, number):
                return number

        def main(argv):
            batches = iter(loaders.load_batches(Numbers(), list, [[n] for n in range(100)], 2))
            next(batches)
            try:
                raise errors.DataError("a fault in the main process")
            except errors.DataError as error:
                kept = error  # a cycle of frame and error, as retries and context managers make them
                raise

        sys.exit(errors.exit_code(main))
    """)
    started = time.monotonic()
    ended, = forker.run(["-c", script], cwd=ROOT)
    assert ended.returncode == 2 and ended.stderr == "error: a fault in the main process\n" and ended.stdout == ""
    assert time.monotonic() - started < 25  # with torch's import


def test_a_loader_says_nothing_of_earlier_ones(forker):
    """An iterator of an evaluation that was not cleared yet is cleared in no loader of the next: torch's traceback of it reads as a
    fault of the run ("can only test a child process")."""
    script = textwrap.dedent("""
        import gc
        import os
        import sys
        from engine import loaders

        class Numbers:
            def __getitem__(self, number):
                gc.collect()
                return number

        gc.disable()
        left = [iter(loaders.load_batches(Numbers(), list, [[0], [1], [2], [3]], 1))]
        next(left[0])
        left.append(left)  # a cycle, which the collector alone clears
        del left
        print(list(loaders.load_batches(Numbers(), list, [[4], [5]], 1)))
        sys.stdout.flush()
        os._exit(0)  # at an exit of its own Python would wait 30 s for the first iterator's loader
    """)
    ended, = forker.run(["-c", script], cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[[4], [5]]\n", "")
