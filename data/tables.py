"""Files of rows as people keep them: CSV, TSV, a JSON list, JSON Lines, talks about a picture.

    read_table            a CSV or TSV file -> [(line, {column: text})], no value converted or dropped
    read_sheet            an Excel or Parquet table, by pandas -> the same
    read_frame            a pandas DataFrame or a list of dicts, where Python is used -> the same
    read_json             a JSON list or JSON Lines file -> [(row or line, object)], numbers as they are written
    unfold                an object with LLaVA's conversations, or messages and images -> flat rows

Bad input raises DataError, whose text is one line that names the file, the row and what to do about it.
"""

import csv
import io
import json
import os
import re
from collections import Counter

from engine.errors import DataError

SHEETS = {".xlsx": "openpyxl", ".parquet": "pyarrow"}  # ending: what pandas needs to read it
FRAME = "the table"  # what stands for the path of a DataFrame or a list of dicts
SEPARATORS = {"tab": "\t", "\\t": "\t"}  # a real tab is hard to type in a shell
SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": ""}


def excerpt(text, limit=100):
    """`text` quoted for a one-line message: line breaks, NUL and the like escaped, a long one cut in the middle."""
    quoted = repr(str(text))
    return quoted if len(quoted) <= limit else f"{quoted[:limit - 20]}...{quoted[-17:]}"


# --- CSV and TSV ------------

def likely_encoding(data):
    """The encoding that the bytes `data` are probably in, or None where they are no text."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data.count(0) > len(data) // 4:
        return "utf-16"
    if b"\0" in data:
        return None
    try:
        data.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:  # cp1252 is latin-1 with curly quotes and dashes at 80-9f, five of them undefined
        windows = re.search(rb"[\x80-\x9f]", data) and not re.search(rb"[\x81\x8d\x8f\x90\x9d]", data)
        return "cp1252" if windows else "latin-1"


def read_text(path, encoding):
    """The whole file as text without its byte-order mark. DataError: not a file, not `encoding`, NUL, empty."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file: give a CSV, TSV, JSON or JSON Lines file")
    try:
        with open(path, "rb") as file:
            data = file.read()
        text = data.decode(encoding).removeprefix("\ufeff")
        place = data.find(b"\0") if "\0" in text else -1
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check its rights") from error
    except LookupError as error:
        raise DataError(f"{path}: unknown encoding {excerpt(encoding)}: try utf-8, cp1252, latin-1 or utf-16") from error
    except UnicodeDecodeError as error:
        place = error.start
    if place >= 0:
        likely = likely_encoding(data)
        advice = f"the file looks like {likely}: pass --encoding {likely}"
        if likely is None:
            advice = "NUL bytes do not belong in text: save the table as CSV or JSON in UTF-8"
        elif likely == encoding or (encoding.startswith("utf-8") and not data[:place].isascii()):
            advice = f"the text before it is good {encoding}: mend that line"
        line = data.count(b"\n", 0, place) + 1
        raise DataError(f"{path}, line {line}: byte {place} is not {encoding} text: {advice}")
    if not text.strip():
        raise DataError(f"{path}: the file is empty: it needs rows, and as a CSV or TSV a header line")
    return text


def pick_separator(path, text, separator):
    """The separator: the one given, else a tab for .tsv, else whichever of , ; and tab cuts the header most often."""
    separator = SEPARATORS.get(separator, separator)
    if separator is None:
        header = next(line for line in io.StringIO(text, newline=None) if line.strip())
        cuts = {mark: len(next(csv.reader([header], delimiter=mark))) for mark in ",;\t"}
        return "\t" if path.lower().endswith(".tsv") else max(cuts, key=cuts.get)
    if len(separator) != 1 or separator in '"\r\n':
        raise DataError(f"{path}: --separator {excerpt(separator)} is not one character: pass , ; | or tab")
    return separator


def split_lines(path, text, separator):
    """Yield (line, values) for every row that is not blank; `line` is the one on which the row starts."""
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1
    try:
        for values in reader:
            if len(values) > 1 or any(value.strip() for value in values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: a quote opened in this row is not closed properly (noticed on line "
                        f"{reader.line_num}: {error}): remove it or double it") from error


def swallowed_row(values, separator):
    """Whether a value holds a whole further row: as many fields, with a file name like .jpg where this row has one.

    That is what a forgotten quote leaves behind when a later quote happens to close it."""
    def ending(value):
        return re.search(r"\.\w{2,5}$|$", value.strip()).group().lower()

    inner = (line.split(separator) for value in values for line in value.splitlines()[1:])
    return any(len(cells) == len(values) and any(ending(a) and ending(a) == ending(b) for a, b in zip(values, cells))
               for cells in inner)


def read_table(path, encoding="utf-8", separator=None, join_rest=False):
    """Read a CSV or TSV file with a header as a list of (line, {column: text}); no value is converted or dropped.

    join_rest: further fields belong to the last column, whose text has the separator in it without quotes.
    DataError: unreadable, wrong encoding, NUL, empty, no rows, a column named twice, a row with too many or too few
    fields, an open quote."""
    path = str(path)
    text = read_text(path, encoding)
    separator = pick_separator(path, text, separator)
    lines = split_lines(path, text, separator)
    header = [name.strip() for name in next(lines)[1]]
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(f"{path}, line 1: column {excerpt(twice[0])} stands there twice: rename one of them")
    table = []
    for line, values in lines:
        if join_rest and len(values) > len(header):
            values[len(header) - 1:] = [separator.join(values[len(header) - 1:])]
        if len(values) != len(header):
            raise DataError(f"{path}, line {line}: expected {len(header)} fields as in the header, found {len(values)} "
                            f"(separator {separator!r}): quote values that hold the separator, or pass --separator")
        if swallowed_row(values, separator):
            raise DataError(f"{path}, line {line}: a quote opened in this row swallows the next row: close it")
        table.append((line, dict(zip(header, values))))
    if not table:
        raise DataError(f"{path}: a header but no rows: nothing to read")
    return table


# --- Excel and Parquet ------------

def plain(value):
    """A cell as text: a whole number as it is written, an empty cell as ""; lists and objects keep their form."""
    if hasattr(value, "tolist"):  # Arrow's lists come as arrays
        value = value.tolist()
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return "" if value is None or value != value else value if isinstance(value, bool) else str(value)


def read_sheet(path):
    """The first sheet of an .xlsx file, or a .parquet file -> (its kind, [(row as Excel counts, or from 1, {column: text})]).

    DataError: unreadable, a package missing, no rows, a column twice."""
    ending = os.path.splitext(path)[1].lower()
    if not os.path.isfile(path):
        raise DataError(f"{path}: there is no such file: check --data")
    try:
        import pandas
        __import__(SHEETS[ending])
    except ImportError as error:
        raise DataError(f"{path}: {ending} needs {SHEETS[ending]} ({error}): pip install {SHEETS[ending]}, or save the "
                        "table as CSV in UTF-8") from None
    try:
        if ending == ".parquet":
            frame = pandas.read_parquet(path, dtype_backend="pyarrow")
            kind, header, cells = "Parquet", [str(name) for name in frame.columns], frame.astype(object).values.tolist()
            numbered = list(enumerate(cells, 1))
        else:
            book = pandas.ExcelFile(path, engine="openpyxl")
            kind = f"Excel, sheet {book.sheet_names[0]}" + (f" of {len(book.sheet_names)}" if len(book.sheet_names) > 1 else "")
            # as objects and not dtype=str: whole numbers stay whole, and nothing becomes NaN
            cells = pandas.read_excel(book, header=None, dtype=object, na_filter=False).values.tolist()
            numbered = [(row, values) for row, values in enumerate(cells, 1) if any(plain(value).strip() for value in values)]
            header = [plain(name).strip() for name in numbered.pop(0)[1]] if numbered else []
    except Exception as error:  # of zip, XML and Arrow readers, each with its own
        raise DataError(f"{path}: cannot be read ({excerpt(error)}): save it again, or as CSV in UTF-8") from error
    twice = [name for name, count in Counter(filter(None, header)).items() if count > 1]
    if twice:
        raise DataError(f"{path}: column {excerpt(twice[0])} stands there twice: rename one of them")
    if not numbered:
        raise DataError(f"{path}: a header but no rows, or nothing at all: nothing to read")
    return kind, [(row, {name: "" if value is pandas.NA else plain(value) for name, value in zip(header, values) if name})
                  for row, values in numbered]


def read_frame(table):
    """A DataFrame or a list of dicts -> (its kind, [(row from 1, {column: text})]); a number as text, what is missing as "".

    DataError: neither of the two, no rows, a column twice."""
    kind = "DataFrame" if hasattr(table, "to_dict") else "list of dicts"
    if hasattr(table, "to_dict"):
        if not table.columns.is_unique:
            twice = table.columns[table.columns.duplicated()][0]
            raise DataError(f"{FRAME}: column {excerpt(twice)} stands there twice: rename one of them")
        table = table.astype(object).where(table.notna(), None).to_dict("records")
    if not isinstance(table, (list, tuple)) or not all(isinstance(one, dict) for one in table):
        raise DataError(f"{FRAME}: {type(table).__name__} where a path, a pandas DataFrame or a list of dicts belongs")
    if not table:
        raise DataError(f"{FRAME}: no rows: nothing to read")
    return kind, [(row, {str(name): plain(value) for name, value in one.items()}) for row, one in enumerate(table, 1)]


# --- JSON ------------

def locate(path, number):
    """Where a row stands, for messages: 'line 7'; in a .json file, often one long line, in SHEETS and in FRAME 'row 7', from 1."""
    return f"{'row' if path.lower().endswith(('.json', *SHEETS, FRAME)) else 'line'} {number}"


def parse_json(path, text, line=1):
    """One JSON value that starts on `line` of the file; numbers become text as they are written."""
    def without_twins(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise DataError(f"{path}: key {excerpt(twice[0])} stands twice in {excerpt(pairs)}: rename one of them")
        return dict(pairs)

    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=without_twins)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {line + error.lineno - 1}, character {error.colno}: not JSON ({error.msg}): "
                        "mend that place, or save or download the file again") from error
    except RecursionError as error:
        raise DataError(f"{path}, line {line}: brackets nested too deeply: give a list of objects") from error


def as_list(path, found):
    """A JSON value that must be a list of rows."""
    if not isinstance(found, list):
        keys = f" but an object with {excerpt(', '.join(found))}" if isinstance(found, dict) else ""
        raise DataError(f"{path}: the top level is no list{keys}: save the list of rows by itself")
    if not found:
        raise DataError(f"{path}: the list is empty: it needs rows")
    return found


def read_json(path, encoding="utf-8", unpack=None):
    """A .json file (a list, or one object per line) or a .jsonl file -> (its kind, [(number for locate, object)]).

    unpack: (path, object) of a .json file that is one object -> the same, None where it knows no rows in it.
    DataError: as read_text, no JSON, a key twice, neither a list nor one object per line, no rows."""
    text, by_line = read_text(path, encoding), not path.lower().endswith(".json")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if by_line and text.lstrip().startswith("["):
        raise DataError(f"{path}: a JSON list and not one object per line: let the file's name end in .json")
    if by_line or (len(lines) > 1 and re.fullmatch(r"\s*\{.*\}\s*", lines[0][1])):
        kind, table = "JSON Lines", [(number, parse_json(path, line, number)) for number, line in lines]
    else:
        content = parse_json(path, text)
        unpacked = unpack(path, content) if unpack and isinstance(content, dict) else None
        kind, table = unpacked or ("JSON list", list(enumerate(as_list(path, content), 1)))
    table = table if by_line else [(count, value) for count, (_, value) in enumerate(table, 1)]
    for number, value in table:
        if not isinstance(value, dict):
            raise DataError(f"{path}, {locate(path, number)}: {excerpt(json.dumps(value))} where an object {{...}} "
                            "belongs: mend the row")
    return kind, table


def cell(where, cells, column, name, needed=True, null=None):
    """The text of `column`, our `name`, in a row; "" where it is absent and not needed. null: what stands for JSON's null, as which
    pandas writes what is missing; None: nothing does. DataError: absent, not text."""
    if column not in cells and not needed:
        return ""
    if column not in cells:
        raise DataError(f"{where}: no {excerpt(column)} for the {name}: add it or leave the row out")
    value = null if cells[column] is None else cells[column]
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise DataError(f"{where}: {excerpt(column)} is {excerpt(json.dumps(value))} and not text: give the {name} as text")
    if re.search("[\0\ud800-\udfff]", value):  # JSON can write \u0000 and halves of a character
        raise DataError(f"{where}: {excerpt(column)} holds a NUL or half a character: mend {excerpt(value)}")
    return value


# --- talks ------------

def turn_text(where, turn):
    """(what SPEAKERS says, text without <image>) of one turn in LLaVA's form or that of messages."""
    keys = turn if isinstance(turn, dict) else {}
    speaker, text = str(keys.get("from", keys.get("role"))), keys.get("value", keys.get("content"))
    if isinstance(text, list):  # [{"type": "image"}, {"type": "text", "text": "..."}]
        parts = [part.get("text", "") if isinstance(part, dict) else None for part in text]
        text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if speaker not in SPEAKERS or not isinstance(text, str):
        raise DataError(f"{where}: {excerpt(json.dumps(turn))} is no turn: it needs from and value, or role and content, "
                        f"as text, the speaker being one of {', '.join(SPEAKERS)}")
    return SPEAKERS[speaker], text.replace("<image>", "").strip()


def unfold(where, cells, key):
    """A talk about one picture, its turns under `key` -> one flat row for every question with its answer."""
    if not isinstance(cells.get(key), list):
        raise DataError(f"{where}: no list of turns for {excerpt(key)}: add it or leave the row out")
    if "image" not in cells and "images" in cells:
        images = cells["images"] if isinstance(cells["images"], list) else [cells["images"]]
        if len(images) != 1:
            raise DataError(f"{where}: {len(images)} images where one belongs: leave the row out")
        cells = {**cells, "image": images[0]}
    turns = [(role, text) for role, text in (turn_text(where, turn) for turn in cells[key]) if role]
    if not turns or [role for role, _ in turns] != ["question", "answer"] * (len(turns) // 2):
        raise DataError(f"{where}: {excerpt(key)} is not question, answer, question, answer ...: mend the row")
    return [{**cells, "question": asked, "answer": told} for (_, asked), (_, told) in zip(turns[::2], turns[1::2])]
