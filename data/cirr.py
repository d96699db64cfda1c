"""cirr.py: everything around composed image retrieval (CIRR, FashionIQ, CIRCO) that is not the model.

    annotations, read_split     a split -> [Pool]: queries and the gallery they are ranked in; then with pictures found
    pictures_of                 the pictures that a query is about: what training sees of it
    clean_text, text_of         captions as LAVIS cleans them; the text of a query
    check                       what --check-data prints
    pad_to_ratio, prepare       a picture -> [3, size, size] as SPRC prepares it
    write_submission            the two files of CIRR's test server: ranking, submission, check_submission
    write_circo                 the one file of CIRCO's

Bad input raises DataError, whose text is one line that names the file, the row and what to do about it.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
from PIL import Image

from data import rows
from data.tables import cell, locate, parse_json, read_json, read_text, excerpt
from engine import files
from engine.errors import DataError
from engine.text import UNSPACED, first_words, unit_of, words_of

SPLITS = {"cirr": ("train", "val", "test1"), "fashioniq": ("train", "val"), "circo": ("val", "test")}  # what check looks at
UNSEEN = {"cirr": "test1", "circo": "test"}  # the split whose targets a server alone knows
COCO = "COCO2017_unlabeled"  # CIRCO's gallery, beside its annotations
CATEGORIES = ("dress", "shirt", "toptee")  # of FashionIQ
SUFFIXES = (".png", ".jpg", ".jpeg")
MEMBERS = 6  # pictures of an image set
LISTED = {"recall": 50, "recall_subset": 3}  # names a query in a submission
MAX_BYTES = 5_000_000  # of a submission
MAX_PIXELS = 178_956_970  # of a padded picture, as in rows.load_image


@dataclass(frozen=True, slots=True)
class Query:
    """A row of a captions file: the reference picture changed as the caption says is the target picture."""
    pairid: str  # of CIRR; the row's number in FashionIQ
    reference: str  # pictures as the split file names them
    target: str  # "" where it is not given (test1)
    captions: tuple  # one in CIRR, two in FashionIQ; cleaned
    members: tuple  # the names of the image set, reference and target among them; () in FashionIQ
    file: str
    line: int  # the row's number, from 1
    fault: str = ""  # why it was left out
    answers: tuple = ()  # of CIRCO: all right answers, the target the first of them

    @property
    def name(self):
        return f"{self.reference} + {excerpt(' / '.join(self.captions))}"


@dataclass(frozen=True, slots=True)
class Pool:
    """Queries and the gallery each of them is ranked in: all of a CIRR split, or one category of a FashionIQ split."""
    name: str  # cirr, dress, shirt, toptee or circo
    queries: list  # of Query
    gallery: dict  # {picture's name: absolute path}; from annotations(): the path as the split file has it
    split: str
    file: str  # the split file


# --- captions ------------

def clean_text(text, max_words=50):
    """A caption as LAVIS's "blip_caption" cleans it: lower case, . ! " ( ) * # : ; ~ become spaces, the first 50 words; in scripts
    without blanks between words, which LAVIS would leave whole, the first 50 characters."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = " ".join(re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ").split(" ")[:max_words])
    return first_words(text, max_words) if UNSPACED.search(text) else text


def text_of(query, draw=None):
    """The text of a query. CIRR: its caption. FashionIQ's two captions a, b: "a and b"; in training `draw` in [0, 1) picks
    one of "a and b", "b and a", "a", "b". (SPRC also writes the first letter large, which the cleaning undoes.)"""
    if len(query.captions) == 1:
        return query.captions[0]
    a, b = query.captions
    variants = (f"{a} and {b}", f"{b} and {a}", a, b)
    return clean_text(variants[0 if draw is None else int(4 * draw)])


# --- annotations ------------

def annotation_folder(data, format="cirr"):
    """The folder that holds captions/ and image_splits/ (of CIRCO annotations/): `data`, or cirr/ in it."""
    if format == "circo":
        if not os.path.isdir(os.path.join(data, "annotations")):
            raise DataError(f"{data}: no folder annotations/ in it: --data is the folder that holds annotations/ and {COCO}/ "
                            "(github.com/miccunifi/CIRCO)")
        return str(data)
    for folder in (str(data), os.path.join(data, "cirr")):
        if os.path.isdir(os.path.join(folder, "captions")):
            return folder
    raise DataError(f"{data}: no folder captions/ in it, nor in {os.path.join(data, 'cirr')}: --data is the folder that holds "
                    "captions/ and image_splits/; python tools/make_sample.py --cirr draws one, data/cirr")


def needed_file(folder, inner, name):
    path = os.path.join(folder, inner, name)
    if not os.path.isfile(path):
        there = sorted(entry for entry in rows.entries(os.path.dirname(path)) if entry.endswith(".json"))
        listed = excerpt(", ".join(there), 300) if there else "no JSON"
        raise DataError(f"{path}: there is no such file; {inner}/ holds {listed}: check --data")
    try:
        pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text: download it again, or save it as UTF-8") from None
    return path


def read_names(path):
    """A split file -> {picture's name: relative path}. CIRR: such an object; FashionIQ: a list of names, files NAME.jpg."""
    found = parse_json(path, read_text(path, "utf-8"))
    names = list(found) if isinstance(found, (dict, list)) else []
    values = found.values() if isinstance(found, dict) else names
    if not names or not all(isinstance(value, str) and value.strip() for value in values):
        raise DataError(f"{path}: no object {{name: path}} (CIRR) and no list of names (FashionIQ): download it again")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: picture {excerpt(twice)} stands there twice: remove one")
    return dict(found) if isinstance(found, dict) else {name: f"{name}.jpg" for name in names}


def texts_in(where, cells, key, what):
    """The list of texts under `key`. DataError: absent, no list, something else in it."""
    values = cells.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: {excerpt(key)} is {excerpt(json.dumps(values))} and no list of {what}: mend the row")
    return tuple(values)


def cirr_query(where, line, cells, path, split):
    """A Query of a row of cap.rc2.*.json. target_soft is not read: the standard evaluation has one target."""
    image_set = cells.get("img_set")
    if not isinstance(image_set, dict):
        raise DataError(f"{where}: 'img_set' is {excerpt(json.dumps(image_set))} and no object with members: mend the row")
    query = Query(cell(where, cells, "pairid", "pair id"), cell(where, cells, "reference", "reference picture"),
                  cell(where, cells, "target_hard", "target picture", needed=not split.startswith("test")),
                  (clean_text(cell(where, cells, "caption", "caption")),),
                  texts_in(where, image_set, "members", "picture names"), path, line)
    if len(set(query.members)) != MEMBERS or len(query.members) != MEMBERS:
        raise DataError(f"{where}: {len(set(query.members))} different members in the image set, {MEMBERS} belong there: "
                        "mend the row")
    for what, name in (("reference", query.reference), ("target", query.target)):
        if name and name not in query.members:
            raise DataError(f"{where}: the {what} {excerpt(name)} is no member of the image set: mend the row")
    if query.target == query.reference:
        raise DataError(f"{where}: {excerpt(query.target)} is reference and target, so it is never found: leave the row out")
    return query


def fashioniq_query(where, line, cells, path, split):
    """A Query of a row of cap.{dress,shirt,toptee}.*.json."""
    captions = texts_in(where, cells, "captions", "two captions")
    if len(captions) != 2:
        raise DataError(f"{where}: {len(captions)} captions where two belong: mend the row")
    return Query(str(line), cell(where, cells, "candidate", "reference picture"),
                 cell(where, cells, "target", "target picture", needed=not split.startswith("test")),
                 tuple(clean_text(caption.strip(".?, ")) for caption in captions), (), path, line)


def read_pool(folder, name, label, split, query_of):
    """One captions file with its split file -> Pool; the gallery's paths are those of the split file."""
    path = needed_file(folder, "captions", f"cap.{label}.{split}.json")
    split_file = needed_file(folder, "image_splits", f"split.{label}.{split}.json")
    gallery, queries, seen = read_names(split_file), [], {}
    for line, cells in read_json(path)[1]:
        where = f"{path}, {locate(path, line)}"
        query = query_of(where, line, cells, path, split)
        if query.pairid in seen:
            raise DataError(f"{where}: pair id {excerpt(query.pairid)} is that of row {seen[query.pairid]} as well: remove one")
        if not query.pairid.isdigit():  # it becomes a key beside "version" and "metric" in a submission
            raise DataError(f"{where}: pair id {excerpt(query.pairid)} is no number: mend the row")
        named = [("reference", query.reference), ("target", query.target), *(("member", name) for name in query.members)]
        for what, picture in named:
            if picture not in gallery and (picture or what != "target" or not split.startswith("test")):
                raise DataError(f"{where}: the {what} {excerpt(picture)} is not in {split_file}: take both files from one "
                                "release")
        seen[query.pairid] = line
        queries.append(query)
    return Pool(name, queries, gallery, split, split_file)


def image_id(where, cells, key, what):
    """The number of a COCO picture, as it is written, is its name in the gallery."""
    value = cells.get(key)
    if not isinstance(value, str) or not re.fullmatch("0|[1-9][0-9]*", value):  # parse_json leaves numbers as they are written
        raise DataError(f"{where}: {excerpt(key)} is {excerpt(json.dumps(value))} and no number of a {what}: mend the row")
    return str(value)


def circo_query(where, line, cells, path, split):
    """A Query of a row of annotations/{val,test}.json; in test there is neither a target nor a list of right answers."""
    target, answers = "", ()
    if not split.startswith("test"):
        target, listed = image_id(where, cells, "target_img_id", "target picture"), cells.get("gt_img_ids")
        answers = tuple(image_id(where, {"gt_img_ids": one}, "gt_img_ids", "right answer") for one in listed) \
            if isinstance(listed, list) else ()
        if target not in answers or len(set(answers)) < len(answers):
            raise DataError(f"{where}: gt_img_ids is {excerpt(json.dumps(listed))}: the target and all other right answers belong in "
                            "it, each once: mend the row")
    reference = image_id(where, cells, "reference_img_id", "reference picture")
    if reference in answers:
        raise DataError(f"{where}: {excerpt(reference)} is reference and right answer: mend the row")
    caption = clean_text(cell(where, cells, "relative_caption", "caption"))
    return Query(image_id(where, cells, "id", "query"), reference, target, (caption,), (), path, line, answers=answers)


def read_circo(folder, split):
    """annotations/SPLIT.json with COCO's list of unlabeled pictures -> Pool; a picture's name is its number."""
    path = needed_file(folder, "annotations", f"{split}.json")
    listed = needed_file(folder, f"{COCO}/annotations", "image_info_unlabeled2017.json")
    content = parse_json(listed, read_text(listed, "utf-8"))
    images = content.get("images") if isinstance(content, dict) else None
    if not images or not all(isinstance(one, dict) and {"id", "file_name"} <= one.keys() for one in images):
        raise DataError(f"{listed}: no list of images with id and file_name: download it again")
    gallery, queries, seen = {str(one["id"]): f"{COCO}/unlabeled2017/{one['file_name']}" for one in images}, [], {}
    for line, cells in read_json(path)[1]:
        where = f"{path}, {locate(path, line)}"
        query = circo_query(where, line, cells, path, split)
        if query.pairid in seen:
            raise DataError(f"{where}: query {excerpt(query.pairid)} is that of row {seen[query.pairid]} as well: remove one")
        for picture in (query.reference, *query.answers):
            if picture not in gallery:
                raise DataError(f"{where}: picture {excerpt(picture)} is not in {listed}: take both files from their releases")
        seen[query.pairid] = line
        queries.append(query)
    return Pool("circo", queries, gallery, split, listed)


def annotations(data, format, split, category="all"):
    """A split -> [Pool] without looking for pictures. CIRR and CIRCO have one pool; FashionIQ one for each category, since each
    query is ranked among its own category. DataError: a missing or damaged file, a row that breaks the format's rules."""
    folder = annotation_folder(data, format)
    if format == "circo":
        return [read_circo(folder, split)]
    if format == "cirr":
        return [read_pool(folder, "cirr", "rc2", split, cirr_query)]
    wanted = CATEGORIES if category == "all" else (category,)
    return [read_pool(folder, name, name, split, fashioniq_query) for name in wanted]


# --- pictures ------------

def find_images(gallery, root, find=rows.find_picture):
    """({name: absolute path}, {name: why there is none}) of {name: relative path}; with another suffix as well."""
    found = rows.find_pictures(gallery.values(), root, SUFFIXES, find)
    return ({name: found[relative][0] for name, relative in gallery.items() if found[relative][0]},
            {name: found[relative][1] for name, relative in gallery.items() if found[relative][1]})


def image_root(data, images, pools, format="cirr"):
    """The folder that the split files' paths start from: `images`, else whichever of img_raw/, images/ and the folder itself,
    in `data`, beside the annotations and one above, has most of fifty pictures, by their file names alone only where none has any
    otherwise. The last is SPRC's layout."""
    if images:
        if not os.path.isdir(images):
            raise DataError(f"{images}: there is no such image folder: check --images")
        return str(images)
    folder = annotation_folder(data, format)
    places = (str(data), folder, os.path.dirname(os.path.abspath(folder)))
    roots = [str(pathlib.Path(place, inner)) for place in places for inner in ("img_raw", "images", "")]
    roots = [root for root in dict.fromkeys(roots) if os.path.isdir(root)]
    names = list(pools[0].gallery)
    sample = {name: pools[0].gallery[name] for name in names[::max(1, len(names) // 50)]}
    for find in (functools.partial(rows.find_picture, anywhere=False), rows.find_picture):
        count = {root: len(find_images(sample, root, find)[0]) for root in roots}
        if any(count.values()):
            break
    return max(roots, key=count.get)


def broken_images(gallery, workers):
    """{name: why its picture cannot be decoded} of {name: absolute path}."""
    reasons = dict(rows.verify_images([SimpleNamespace(image=path) for path in gallery.values()], workers))
    return {name: reasons[path] for name, path in gallery.items() if path in reasons}


def without(pool, faults, log):
    """The pool without the pictures in `faults` and the queries that need one of them, be it for the image set; says so."""
    def fault(query):
        return next((faults[name] for name in (query.reference, query.target, *query.members, *query.answers) if name in faults), "")

    queries = [replace(query, fault=fault(query)) for query in pool.queries]
    good, bad = [q for q in queries if not q.fault], [q for q in queries if q.fault]
    if not good:
        raise DataError(f"{pool.file}: without the {len(faults)} bad pictures no query is left: check --images")
    for name, reason in list(faults.items())[:20]:
        log(f"left out: {name}: {reason}")
    log(f"WARNING: {pool.name} {pool.split}: {len(faults)} of {len(pool.gallery)} pictures and {len(bad)} of {len(queries)} "
        "queries are left out (--skip-bad): recall over this smaller gallery does not compare with published figures, and "
        "CIRR's server refuses a submission that lacks queries; --check-data lists the pictures")
    return replace(pool, queries=good, gallery={name: path for name, path in pool.gallery.items() if name not in faults})


def with_images(pool, root, skip_bad, workers, log):
    """The pool with absolute paths in its gallery. skip_bad: the share of the gallery that may be left out as missing or,
    since then every picture is decoded, broken. DataError: more than that."""
    found, faults = find_images(pool.gallery, root)
    log(f"{pool.name} {pool.split}: {pool.queries[0].file}: {len(pool.queries)} queries, {len(pool.gallery)} pictures named, "
        f"images in {root}")
    if skip_bad:
        faults |= broken_images(found, workers)
    if not faults:
        return replace(pool, gallery=found)
    total = len(pool.gallery)
    if len(faults) > skip_bad * total:
        advice = f", or leave them and their queries out with --skip-bad {min(1, len(faults) / total + 0.005):.2f}"
        raise DataError(f"{pool.file}: {len(faults)} of {total} pictures are missing or cannot be used: "
                        f"{' | '.join(list(faults.values())[:3])}: pass their folder with --images, list them all with "
                        f"--check-data{advice if len(faults) < total else ''}")
    return without(replace(pool, gallery=pool.gallery | found), faults, log)


def read_split(data, format, split, images=None, category="all", skip_bad=0.0, workers=2, log=print):
    """A split of `format` cirr, fashioniq or circo -> [Pool], every picture found. category: one of CATEGORIES, or all of them.

    DataError: as annotations; pictures that are missing, more than the share skip_bad."""
    pools = annotations(data, format, split, category)
    root = image_root(data, images, pools, format)
    return [with_images(pool, root, skip_bad, workers, log) for pool in pools]


def pictures_of(queries, gallery, members=False):
    """Of each query the paths of its pictures: the reference, the target or all right answers and, with `members`, the rest of its
    image set. gallery: {name: path}."""
    named = [(q.reference, q.target, *q.answers, *(q.members if members else ())) for q in queries]
    return [[gallery[name] for name in dict.fromkeys(names) if name] for names in named]  # test1 has no target


def fingerprint(queries):
    """Short hash of everything in the queries but where they stand: tells whether a run is resumed on other data."""
    content = [(q.pairid, q.reference, q.target, q.captions, q.members) for q in queries]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


# --- --check-data ------------

def check(data, format, chance_text, images=None, category="all", splits=None, workers=2, absent="", log=print):
    """--check-data: say what is there and decode every picture; exit code 1 where a run would fail, 0 where not.

    chance_text: Pool -> what a random ranking scores in it. absent: what else is missing, and the ways to it. splits: which; default
    those of SPLITS, test1 only where there is a file of it."""
    if splits is None:
        there = rows.entries(os.path.join(annotation_folder(data, format), "captions"))
        splits = [split for split in SPLITS[format] if split != "test1" or "cap.rc2.test1.json" in there]
    failed, homes = False, {}
    for split in splits:
        try:
            pools = annotations(data, format, split, category)
            root = image_root(data, images, pools, format)
        except DataError as error:
            log(f"{split}: error: {error}")
            failed = True
            continue
        for pool in pools:
            found, bad = check_pool(pool, root, chance_text, workers, log)
            homes.setdefault(split, []).extend(SimpleNamespace(image=path) for path in found.values())
            failed = failed or bad
    shared = rows.shared_images(homes if format != "circo" else {})  # CIRCO's splits have one gallery
    for image, names in list(shared.items())[:10]:
        log(f"in {' and '.join(names)}: {image}")
    if len(shared) > 10:
        log(f"... {len(shared)} pictures stand in more than one split")
    return rows.verdict(failed, absent, log)


def check_pool(pool, root, chance_text, workers, log):
    """Say what a pool holds, every missing and every broken picture, then how many. (pictures found, whether any is bad)."""
    texts = [caption for query in pool.queries for caption in query.captions]
    lengths = [len(words_of(text)) for text in texts]
    sets = len({frozenset(query.members) for query in pool.queries if query.members})
    log(f"{pool.name} {pool.split}: {len(pool.queries)} pairs, {len({q.reference for q in pool.queries})} references, "
        f"{f'{sets} image sets, ' if sets else ''}gallery of {len(pool.gallery)} pictures; captions of {min(lengths)} to "
        f"{max(lengths)} {unit_of(texts)}, {lengths.count(0)} empty; a random ranking scores {chance_text(pool)}")
    found, missing = find_images(pool.gallery, root)
    for name, reason in missing.items():
        log(f"missing: {name}: {reason}")
    broken = broken_images(found, workers)
    for name, reason in broken.items():
        log(f"broken: {name}: {reason}")
    log(f"{pool.name} {pool.split}: {len(missing)} of {len(pool.gallery)} pictures are missing in {root}, {len(broken)} are "
        "broken")
    return found, bool(missing or broken)


# --- pixels ------------

def pad_to_ratio(image, ratio):
    """SPRC's TargetPad: where the long side is `ratio` times the short one or more, black beside it until it is just so."""
    left, top = (max(int((max(image.size) / ratio - side) / 2), 0) for side in image.size)
    width, height = image.width + 2 * left, image.height + 2 * top
    if width * height > MAX_PIXELS:
        raise DataError(f"a picture of {image.width} x {image.height} is too long to be padded: crop it")
    padded = Image.new(image.mode, (width, height))
    padded.paste(image, (left, top))
    return padded


def prepare(image, size, transform="targetpad", ratio=1.25):
    """RGB image -> float32 [3, size, size] in BLIP's normalisation.

    targetpad: pad_to_ratio, the short side to `size` (bicubic), the centre cut out; squarepad: the same with ratio 1;
    plain: squashed, as LAVIS does."""
    if transform == "plain":
        return rows.image_tensor(image, size)
    image = pad_to_ratio(image, {"targetpad": ratio, "squarepad": 1}[transform])
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), rows.RESAMPLING)
    return rows.image_tensor(image.crop((left, top, left + size, top + size)), size)


# --- CIRR's test server ------------

def ranking(scores, gallery):
    """Yield the gallery's names for each row of scores [N,G], best first: ties in the gallery's order, NaN last."""
    names = list(gallery)
    for row in np.asarray(scores):
        yield [names[i] for i in np.argsort(-row, kind="stable")]


def submission(queries, ranked, metric):
    """The content of a submission. metric: recall (the best 50) or recall_subset (the best 3 of the image set).

    ranked: for each query the names of the gallery, best first; the reference is left out here."""
    content = {"version": "rc2", "metric": metric}
    for query, names in zip(queries, ranked, strict=True):
        allowed = [n for n in names if n != query.reference and (metric == "recall" or n in query.members)]
        content[query.pairid] = allowed[:LISTED[metric]]
    return content


def as_json(content):
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def check_submission(content, queries, gallery):
    """DataError where CIRR's server would refuse the content, or would score less than was ranked."""
    metric = content.get("metric")
    if content.get("version") != "rc2" or metric not in LISTED:
        raise DataError(f"submission: version {excerpt(content.get('version'))}, metric {excerpt(metric)}: rc2 and one of "
                        f"{', '.join(LISTED)} belong there")
    wrong = {query.pairid for query in queries} ^ (content.keys() - {"version", "metric"})
    if wrong:
        raise DataError(f"submission: pair {min(wrong)} is missing or is none of the split's: write it from the whole split")
    for query in queries:
        names = content[query.pairid]
        pool, where = set(gallery if metric == "recall" else query.members) - {query.reference}, f"pair {query.pairid}"
        count = min(LISTED[metric], len(pool))
        if len(names) != count or len(set(names)) != count:
            raise DataError(f"submission: {where}: {len(set(names))} different names in {len(names)}, {count} belong there")
        if not pool.issuperset(names):
            stray = next(name for name in names if name not in pool)
            raise DataError(f"submission: {where}: {excerpt(stray)} is the reference or none of the pictures to rank")
    size = len(as_json(content).encode())
    if size > MAX_BYTES:
        raise DataError(f"submission: {size:,} bytes are over the server's {MAX_BYTES:,}")


def write_submission(folder, queries, gallery, scores):
    """Check and write recall_submission.json and recall_subset_submission.json of scores [N,G] into `folder`; their paths."""
    paths, ranked = [], list(ranking(scores, gallery))
    for metric in LISTED:
        content = submission(queries, ranked, metric)
        check_submission(content, queries, gallery)
        paths.append(pathlib.Path(folder) / f"{metric}_submission.json")
        with files.whole_file(paths[-1]) as file:
            file.write(as_json(content))
    return paths


def write_circo(folder, queries, gallery, scores):
    """Write circo_submission.json, {query: the numbers of the best 50 pictures}, of scores [N,G] into `folder` -> [its path]. The
    reference is not left out, as on CIRCO's server."""
    content = {query.pairid: [int(name) for name in names[:LISTED["recall"]]]
               for query, names in zip(queries, ranking(scores, gallery), strict=True)}
    path = pathlib.Path(folder) / "circo_submission.json"
    with files.whole_file(path) as file:
        file.write(as_json(content))
    return [path]
