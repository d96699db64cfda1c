"""errors.py: what tells a user's mistake."""


class DataError(Exception):
    """Something that the user can mend: bad input, a missing file, a wrong flag. Told in one line, with exit code 2."""
