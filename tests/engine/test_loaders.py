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
