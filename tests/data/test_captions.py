"""pytest tests/data/test_captions.py: files of captions as other people keep them, each in the hands of the three that read it:
train_blip_caption.py (read_data), pretrain_qformer.py (pairs.read_sets) and metrics.py --references.
"""

import json
import pathlib

import pytest
from PIL import Image

import metrics
from data import captions, pairs
from engine import errors
from engine.errors import DataError

NAMES = [f"COCO_val2014_{n:012}.jpg" for n in range(1, 7)]
TEXTS = {name: [f"a picture, number {n}", f'"{n}" dogs'] for n, name in enumerate(NAMES, 1)}
SPLITS = dict(zip(NAMES, ("train", "restval", "train", "val", "val", "test")))


def karpathy_rows(names):
    return [{"caption": text, "image": f"val2014/{name}", "image_id": f"coco_{name}"} for name in names for text in TEXTS[name]]


def karpathy_file(**folder):
    return {"images": [{**folder, "filename": name, "split": SPLITS[name], "sentences": [{"raw": text, "tokens": []} for text in texts]}
                       for name, texts in TEXTS.items()], "dataset": "coco"}


def coco(names):
    rows = [{"image_id": int(name[-8:-4]), "id": 7, "caption": text} for name in names for text in TEXTS[name]]
    return {"images": [{"id": int(name[-8:-4]), "file_name": name} for name in names], "annotations": rows}


def table(mark, head="image{}caption", quoted=True):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if quoted else text
    return head.format(mark) + "\n" + "".join(f"{name}{mark}{cell(text)}\n" for name, texts in TEXTS.items() for text in texts)


def textcaps(names):
    return {"dataset_name": "textcaps", "data": [
        {"image_id": name[:-4], "image_name": name[:-4], "image_path": f"train/{name}", "caption_str": text, "reference_strs": TEXTS[name]}
        for name in names for text in TEXTS[name]]}


def metadata(names, image="file_name", caption="text"):
    """HuggingFace's metadata.jsonl."""
    return "".join(json.dumps({image: name, caption: text}) + "\n" for name in names for text in TEXTS[name])


# Kaggle's Flickr30k; in one line of it, as published, the second | is missing
COMMENTS = "image_name| comment_number| comment\n" + "".join(
    f"{name}| {n}{'   ' if (name, n) == (NAMES[2], 1) else '| '}{text}\n" for name, texts in TEXTS.items() for n, text in enumerate(texts))
TOKENS = "".join(f"{name}#{n}\t{text}\n" for name, texts in TEXTS.items() for n, text in enumerate(texts))
LISTS = {path: "".join(f"{name}\n" for name in NAMES if SPLITS[name] in captions.KARPATHY[split]) for split, path in captions.LISTS.items()}
OWN = {"train": NAMES[:3], "val": NAMES[3:5], "test": NAMES[5:]}
# files, what the first is called where it is read
LAYOUTS = {
    "BLIP's Karpathy rows": ({f"coco_karpathy_{s}.json": karpathy_rows(names) if s == "train" else [
        {"image": f"val2014/{name}", "caption": TEXTS[name]} for name in names] for s, names in OWN.items()}, "rows of image and caption"),
    "the same under another name": ({f"{s}_captions.json": karpathy_rows(names) for s, names in OWN.items()}, "rows of image and caption"),
    "COCO": ({f"annotations/captions_{s}2014.json": coco(names) for s, names in OWN.items()}, "COCO's annotations"),
    "dataset_coco": ({"dataset_coco.json": karpathy_file(filepath="val2014")}, "Karpathy's file, "),
    "dataset_flickr8k": ({"dataset_flickr8k.json": karpathy_file()}, "Karpathy's file, "),
    "Flickr8k's tokens with its lists": ({"Flickr8k.token.txt": TOKENS, **LISTS}, "Flickr8k's tokens, Flickr_8k."),
    "captions.txt with the lists": ({"captions.txt": table(","), **LISTS}, "Flickr8k's captions.txt, Flickr_8k."),
    "CSV": ({f"{s}.csv": "Image,x,Caption\n" + "".join(f'{n},1,"{t.replace(chr(34), chr(34) * 2)}"\n' for n in names for t in TEXTS[n])
             for s, names in OWN.items()}, "CSV, column Image for the image, Caption for the caption"),
    "Karpathy's dataset.json": ({"dataset.json": karpathy_file()}, "Karpathy's file, "),
    "TextCaps": ({f"TextCaps_0.1_{s}.json": textcaps(names) for s, names in OWN.items()},
                 'rows under "data", as TextCaps, column image_path for the image, caption_str for the caption'),
}
WHOLE = {"captions.txt": table(","), "Flickr8k.token.txt": TOKENS, "captions.csv": table(","), "captions.tsv": table("\t"),
         "results.csv": COMMENTS, "metadata.csv": table(",", "file_name{}text"), "metadata.jsonl": metadata(NAMES)}


def put(folder, files, images="images"):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for n, name in enumerate(NAMES):
        (folder / images).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (40 * n, 0, 0)).save(folder / images / name)
    return folder


def read(folder, split):
    said = []
    found = captions.read_data(folder, split, log=said.append)
    return {pathlib.Path(p.image).name: list(p.captions) for p in found}, said[0]


def read_pairs(place, split):
    said, found = [], {}
    for pair in pairs.read_sets({"x": str(place)}, split, log=said.append):
        found.setdefault(pathlib.Path(pair.image).name, []).append(pair.text)
    return found, said[0]


@pytest.mark.parametrize("images", ["images", "images/val2014", "Images"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_by_both_trainings_and_it_is_said(tmp_path, name, images):
    files, form = LAYOUTS[name]
    folder = put(tmp_path, files, images)
    for split, names in OWN.items():
        found, said = read(folder, split)
        assert found == {one: TEXTS[one] for one in names} and form in said
    for split in ("train", "val"):
        found, said = read_pairs(folder, split)
        assert {one: len(texts) for one, texts in found.items()} == dict.fromkeys(OWN[split], 2) and form in said
        assert found[OWN[split][0]][0] == TEXTS[OWN[split][0]][0]


@pytest.mark.parametrize("name", WHOLE)
def test_one_file_without_splits_holds_pictures_out(tmp_path, name):
    folder = put(tmp_path, {name: WHOLE[name]})
    for place in (folder, folder / name):
        (train, said), (val, _) = read(place, "train"), read(place, "val")
        assert "held out" in said and not set(train) & set(val) and train | val == TEXTS
        assert not captions.split_file(place, "test").is_file()
        (train, _), (val, _) = read_pairs(place, "train"), read_pairs(place, "val")
        assert not set(train) & set(val) and set(train) | set(val) == set(TEXTS)


@pytest.mark.parametrize("folder", ["val", "validation"])
def test_huggingfaces_folders_have_their_pictures_beside_them(tmp_path, folder):
    """ImageFolder: a folder a split, each with metadata.jsonl or metadata.csv; a caption or a list of them."""
    lists = "".join(json.dumps({"file_name": name, "captions": TEXTS[name]}) + "\n" for name in OWN["test"])
    files = {"train/metadata.jsonl": metadata(OWN["train"], caption="caption"), "test/metadata.jsonl": lists,
             f"{folder}/metadata.csv": "file_name,text\n" + "".join(f'{n},"one, two"\n{n},three\n' for n in OWN["val"])}
    for split in ("train", folder, "test"):
        put(tmp_path, files, split)
    for split, names in OWN.items():
        found, said = read(tmp_path, split)
        assert list(found) == names and "HuggingFace's metadata, " in said
        assert said.endswith(f"images in {tmp_path / (folder if split == 'val' else split)}")
        assert found[names[0]] == (["one, two", "three"] if split == "val" else TEXTS[names[0]])
    for split in ("train", "val"):
        found, said = read_pairs(tmp_path, split)
        assert list(found) == OWN[split] and "column file_name for the image" in said


def test_metadata_in_the_folder_itself_is_the_training_split_where_there_is_another(tmp_path):
    put(tmp_path, {"metadata.jsonl": metadata(OWN["train"]), "val/metadata.jsonl": metadata(OWN["val"])}, "val")
    for split in ("train", "val"):
        found, said = read(tmp_path, split)
        assert list(found) == OWN[split] and "held out" not in said
        assert list(read_pairs(tmp_path, split)[0]) == OWN[split]


@pytest.mark.parametrize("name", ["train_captions", "train", "captions", "anything"])
@pytest.mark.parametrize("ending", [".xlsx", ".parquet"])
def test_excel_and_parquet_tables(tmp_path, ending, name):
    pandas, _ = pytest.importorskip("pandas"), pytest.importorskip({".xlsx": "openpyxl"}.get(ending, "pyarrow"))
    frame = pandas.DataFrame([{"Image": one, "Caption": text} for one in NAMES for text in TEXTS[one]])
    path = put(tmp_path, {}) / f"{name}{ending}"
    frame.to_excel(path, index=False) if ending == ".xlsx" else frame.to_parquet(path)
    if name.startswith("train"):
        path.rename(path.with_name(path.name.replace("train", "val")))
        frame.to_excel(path, index=False) if ending == ".xlsx" else frame.to_parquet(path)
    place = path if name == "anything" else tmp_path
    found, said = zip(read(place, "train"), read(place, "val"))
    assert {**found[0], **found[1]} == TEXTS and "column Image for the image, Caption for the caption" in said[0]
    assert {".xlsx": "Excel, sheet Sheet1", ".parquet": "Parquet"}[ending] in said[0]
    assert ("held out" in said[0]) == (not name.startswith("train"))
    assert set(read_pairs(place, "train")[0]) == set(found[0])


def test_a_list_of_captions_in_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pandas
    frame = pandas.DataFrame([{"file_name": name, "captions": TEXTS[name]} for name in NAMES])
    frame.to_parquet(put(tmp_path, {}) / "train_captions.parquet")
    assert read(tmp_path, "train")[0] == TEXTS


def test_commas_and_quotes_in_captions_txt_need_no_quotes(tmp_path):
    lines = table(",", quoted=False).replace('"1" dogs', 'two BIG dogs, a cat').replace('"', "").replace("BIG", '"big"')
    folder = put(tmp_path, {"captions.txt": lines})
    (found, _), (val, _) = read(folder, "train"), read(folder, "val")
    assert (found | val)[NAMES[0]] == ["a picture, number 1", 'two "big" dogs, a cat']


REFERENCES = {"dataset.json": karpathy_file(filepath="val2014"), "rows.json": karpathy_rows(NAMES), "coco.json": coco(NAMES),
              "captions.txt": table(","), "tokens.txt": TOKENS, "own.csv": table(","), "own.tsv": table("\t"),
              "results.csv": COMMENTS, "metadata.csv": table(",", "file_name{}text"), "metadata.jsonl": metadata(NAMES),
              "textcaps.json": textcaps(NAMES), "flickr30k.txt": table(",1,", "image_name,comment_number,comment"),
              "lists.json": [{"image": name, "caption": texts} for name, texts in TEXTS.items()]}


@pytest.mark.parametrize("by", ["name", "folder", "number"])
@pytest.mark.parametrize("name", REFERENCES)
def test_metrics_scores_against_every_layout(tmp_path, capsys, name, by):
    """Predictions by file name, with a folder, and by COCO's number give the same scores."""
    put(tmp_path, {name: REFERENCES[name]})
    told = {one: f"a picture, number {n}" for n, one in enumerate(NAMES, 1)}
    keyed = {"name": told, "folder": {f"val2014/{one}": text for one, text in told.items()},
             "number": [{"image_id": int(one[-8:-4]), "caption": text} for one, text in told.items()]}[by]
    put(tmp_path, {"preds.json": keyed})
    code = errors.exit_code(metrics.main, ["--references", str(tmp_path / name), "--predictions", str(tmp_path / "preds.json"), "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert json.loads(out)["corpus"]["ROUGE-L"] == metrics.score_captions(told, TEXTS)["corpus"]["ROUGE-L"] == 1


def test_metrics_matches_file_names_whose_folders_differ(tmp_path, capsys):
    put(tmp_path, {"refs.json": {"Images/a.jpg": ["a cat"], "Images/b.jpg": ["a dog"]}, "preds.json": {"b.jpg": "a dog", "a.jpg": "a cat"}})
    flags = ["--references", str(tmp_path / "refs.json"), "--predictions", str(tmp_path / "preds.json")]
    assert not errors.exit_code(metrics.main, flags) and "ROUGE-L               1.0000" in capsys.readouterr().out
    put(tmp_path, {"refs.json": {"train/a.jpg": ["a cat"], "val/a.jpg": ["a dog"]}, "preds.json": {"a.jpg": "a dog"}})
    assert errors.exit_code(metrics.main, flags) == 2  # which of the two?


def test_a_subset_is_scored_only_when_asked(tmp_path, capsys):
    put(tmp_path, {"refs.json": karpathy_file(), "preds.json": {NAMES[0]: TEXTS[NAMES[0]][0], NAMES[3]: "x"}})
    flags = ["--references", str(tmp_path / "refs.json"), "--predictions", str(tmp_path / "preds.json")]
    assert errors.exit_code(metrics.main, flags) == 2
    assert "no caption for 4 of 6 images" in (err := capsys.readouterr().err) and "--subset" in err
    assert not errors.exit_code(metrics.main, [*flags, "--subset"])
    out = capsys.readouterr().out
    assert "note: --subset: 2 of 6 images of" in out and "note: references: Karpathy's file, all splits" in out
    put(tmp_path, {"preds.json": {NAMES[0]: "x", "stranger.jpg": "y"}})
    assert errors.exit_code(metrics.main, [*flags, "--subset"]) == 2
    assert "no references for 1 of 2 images, first 'stranger.jpg'" in capsys.readouterr().err


@pytest.mark.parametrize("name, content, message", [
    ("Flickr8k.token.txt", TOKENS + "a.jpg no tab\n", "line 13: 'a.jpg no tab' is not name#number, a tab and a caption"),
    ("captions.csv", "picture,caption\na.jpg,x\n",
     "no column image or file_name or filename or image_path or image_name or image_id; it has 'picture, caption'"),
    ("captions.csv", "picture,words\na.jpg,x\n", "image_id and no column caption or captions or text"),
    ("captions.csv", "image,Image,caption\na.jpg,b.jpg,x\n", "'image' could be any of the columns 'image, Image': rename all but one"),
    ("captions.csv", "IMAGE,Image,caption\na.jpg,b.jpg,x\n", "'image' could be any of the columns 'IMAGE, Image': rename all but one"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x", "Text": "y"}\n', "line 1: 'text' could be any of the columns 'text, Text'"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b.jpg"}\n', "line 2: no column caption or captions or text"),
    ("results.csv", "image_name| comment_number| comment\na.jpg| x\n", "line 2: 'a.jpg| x' is not name| number| caption"),
    ("TextCaps_0.1_train.json", {"data": [{"image_path": "train/a.jpg", "reference_strs": ["x"]}]}, "row 1: no column caption"),
    ("captions.txt", "image,caption\na.jpg\n", "line 2: expected 2 fields"),
    ("dataset_coco.json", {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}]}, "image 1: no 'raw'"),
    ("dataset_coco.json", {"images": [{"filename": "a.jpg", "split": "test", "sentences": []}]}, "no captions of the split train")])
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, {name: content}), "train")
    assert message in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize("name, content", [
    ("train.csv", "image,question,answer\na.jpg,Who?,x\n"), ("train/metadata.csv", "file_name,question,answer,text\na.jpg,Who?,x,y\n"),
    ("metadata.jsonl", '{"file_name": "a.jpg", "question": "Who?", "answer": "x"}\n'), ("metadata.csv", "file_name,label\na.jpg,x\n"),
    ("results.csv", "epoch,loss\n1,2\n"), ("dataset.json", {"a.jpg": "x"})])
def test_other_things_of_that_name_are_no_captions(tmp_path, name, content):
    with pytest.raises(DataError, match="train_captions.json: there is no such file"):
        read(put(tmp_path, {name: content}), "train")


# --- scripts without blanks between words ------------

def test_chinese_captions_are_counted_by_characters(tmp_path, capsys):
    """A hundred is the limit of --train-texts-clean: of Chinese characters as of words."""
    texts = {NAMES[0]: ["狗" * 101, "一只红色的狗。"], NAMES[1]: ["ก" * 101, "狗" * 100], NAMES[2]: ["dog " * 101, "dog " * 100]}
    put(tmp_path, {"train_captions.json": texts, "val_captions.json": {NAMES[3]: "一只狗，在跑"}})
    said = []
    found = captions.read_data(tmp_path, "train", texts_clean=True, log=said.append)
    assert [p.captions for p in found] == [("一只红色的狗。",), ("狗" * 100,), (" ".join(["dog"] * 100),)]
    assert "0 empty, 0 duplicate and 3 absurdly long captions" in said[0]

    def no_tokenizer():
        raise DataError("none")
    captions.check_data(str(tmp_path), no_tokenizer)
    assert "val: 1 different captions of 5 to 5 words (characters where no blanks part them), half up to 5" in capsys.readouterr().out


def test_chinese_pairs_are_cut_by_characters(tmp_path):
    put(tmp_path, {"train_captions.json": {NAMES[0]: "狗" * 60, NAMES[1]: "dog " * 60, NAMES[2]: "一只 dog，" + "猫" * 60}})
    said = []
    assert pairs.check({"x": str(tmp_path)}, val_share=0.34, log=said.append) == 0
    assert "of 50 to 50 words (characters where no blanks part them)" in " ".join(said)
    found = read_pairs(tmp_path, "train")[0] | read_pairs(tmp_path, "val")[0]
    assert found == {NAMES[0]: ["狗" * 50], NAMES[1]: [" ".join(["dog"] * 50)], NAMES[2]: ["一只 dog，" + "猫" * 47]}
