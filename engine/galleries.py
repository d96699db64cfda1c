"""galleries.py: the pictures of a gallery, and a retrieval model over them: queries and pictures as vectors, their cosines.

    Opener, Gallery, collate_gallery    a path as the model takes it; the pictures of a pool, as batches
    kept_features, beginning            the tower's features of all pictures, from a cache; a pool as large as a batch
    encode, evaluate    every picture and query of a pool as vectors; the recalls of each pool and what they are made of
    score_gallery, score_alone          cosines of every query and picture; what the sentence or the picture finds alone
    rerank              the best by cosine, scored once more by matching: stage 1
    patch_change, write_gate_maps       how much the gate changes each patch; for some queries, as a file
    index_folder, query_vector          a folder of pictures, indexed once; a picture and a sentence to search it with

model: Sprc of train_cir.py, or another core.Blip2Retrieval with its query(), fused() and prompted(); of rerank any
core.Blip2Retrieval. Capitals in shape comments: G pictures of a gallery, N queries, Q vectors of a picture, E their length; B, P, W
and L as in core.py.
"""

import hashlib
import json
import os
import pathlib
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import Dataset
from tqdm import tqdm

from data import cirr, rows
from engine import cache, loaders, pages, picture_index, prompts, retrieval, vision
from engine.errors import DataError
from engine.similarity import max_similarity

MAPS = 8  # queries of a pool that write_gate_maps takes


# --- pictures ------------

class Opener:
    """Path -> picture [3,s,s] as --transform wants it. A class and not a closure: it also works where loaders are spawned."""

    def __init__(self, size, transform, ratio):
        self.size, self.transform, self.ratio = size, transform, ratio

    def __call__(self, path):
        return cirr.prepare(rows.load_image(path), self.size, self.transform, self.ratio)

    def preprocessing(self):
        """What the pixels depend on, for a cache's key."""
        return rows.preprocessing(self.size, f"{self.transform}, {self.ratio}")


class Gallery(Dataset):
    """Number -> (picture [3,s,s], its name), or (the DataError of a broken picture, its name)."""

    def __init__(self, paths, open_picture):
        self.names, self.paths, self.open = list(paths), paths, open_picture

    def __len__(self):
        return len(self.names)

    def __getitem__(self, number):
        name = self.names[number]
        try:
            return self.open(self.paths[name]), name
        except DataError as error:
            return error, name


def collate_gallery(samples):
    """Samples of Gallery -> {"images": [B,3,s,s]}."""
    for found, _ in samples:
        if isinstance(found, DataError):
            return {"fault": str(found)}
    return {"images": torch.stack([image for image, _ in samples])}


def kept_features(folder, model, opener, pools, accelerator, workers):
    """What opens a picture of the pools in place of `opener`: path -> the tower's features [P,W], kept in `folder` and made where they are
    missing. The tower is then gone from the model."""
    paths = list(dict.fromkeys(path for pool in pools for path in pool.gallery.values()))
    with accelerator.main_process_first():  # the others find everything there
        store = cache.vision_features(folder, model.vision_model, paths, opener, opener.preprocessing(), workers, accelerator.device,
                                      accelerator.print)
    model.vision_model = None
    return store.__getitem__


def beginning(pool, size):
    """A pool of the first query, its reference and `size` more pictures: what a rehearsal encodes."""
    names = dict.fromkeys([pool.queries[0].reference, *list(pool.gallery)[:size]])
    return replace(pool, queries=pool.queries[:1], gallery={name: pool.gallery[name] for name in names})


# --- vectors and scores ------------

def read_texts(model, texts):
    """Texts -> what model.query and the like take beside a picture, on the model's device: {input_ids, attention_mask: [B,L]}."""
    return send_to_device(prompts.text_ids(model.tokenizer, texts), model.query_tokens.device)


@torch.no_grad()
def encode(model, pool, opener, accelerator, batch_size, workers):
    """Every picture of a pool goes through the vision tower once, as a gallery picture and as the reference of its queries.

    -> (gallery features [G,Q,E], query vectors [N,E], mean relative change of the patches by the gate), on every process.
    """
    model.eval()
    data, queries_of = Gallery(pool.gallery, opener), {}
    for number, query in enumerate(pool.queries):
        queries_of.setdefault(query.reference, []).append(number)
    mine = list(range(len(data)))[accelerator.process_index::accelerator.num_processes]
    batches = [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]
    loaded, pictures, queries = iter(loaders.load_batches(data, collate_gallery, batches, workers)), [], []
    for numbers in tqdm(batches, desc="encoding", leave=False, mininterval=1, disable=None if accelerator.is_main_process else True):
        embeds = model.image_embeds(loaders.next_batch(loaded, accelerator.device)["images"])  # [B,P,W]
        with accelerator.autocast():
            pictures += zip(numbers, model.image_features(embeds).float().cpu())  # [Q,E] each
        asked = [(k, n) for k, i in enumerate(numbers) for n in queries_of.get(data.names[i], ())]
        for start in range(0, len(asked), batch_size):
            places, which = zip(*asked[start:start + batch_size])
            text, reference = read_texts(model, [cirr.text_of(pool.queries[n]) for n in which]), embeds[list(places)]
            with accelerator.autocast():
                vectors = model.query(reference, **text)[1].float().cpu()  # [B,E]
                change = patch_change(model, reference, text).mean(1).cpu()  # [B]
            queries += zip(which, vectors, change.tolist())
    pictures, queries = (sorted(gather_object(part), key=lambda one: one[0]) for part in (pictures, queries))
    features, vectors = (torch.stack([one[1] for one in part]) for part in (pictures, queries))  # [G,Q,E], [N,E]
    return features, vectors, float(np.mean([one[2] for one in queries]))


def patch_change(model, image_embeds, text):
    """How much the gate changes each patch, relative to its length: [B,P]; 0 without a gate."""
    fused = model.fused(image_embeds, **text).float()
    return (fused - image_embeds).norm(dim=-1) / image_embeds.norm(dim=-1).clamp(min=1e-6)


def score_gallery(vectors, features, chunk=256):
    """query vectors [N,E], gallery features [G,Q,E] -> cosines [N,G], the largest over Q; `chunk` queries at a time."""
    return torch.cat([max_similarity(part, features) for part in vectors.split(chunk)]).numpy()


@torch.no_grad()
def score_alone(model, pool, features, accelerator, batch_size):
    """What either half of the queries finds without the other -> {"text alone", "picture alone": scores [N,G]}.

    Text: the learned prompts with the sentence, which --loss-rtc trains to find the target; without that loss the sentence's own vector.
    Picture: the mean over the reference's query tokens, among the others of the gallery. features: [G,Q,E]."""
    place, vectors = {name: column for column, name in enumerate(pool.gallery)}, []
    sentence_vector = model.prompted if model.prompt_tokens.requires_grad else model.text_features
    for start in range(0, len(pool.queries), batch_size):
        text = read_texts(model, [cirr.text_of(query) for query in pool.queries[start:start + batch_size]])
        with accelerator.autocast():
            vectors.append(sentence_vector(**text).float().cpu())
    pictures = F.normalize(features[[place[query.reference] for query in pool.queries]].mean(1), dim=-1)  # [N,E]
    return {"text alone": score_gallery(torch.cat(vectors), features), "picture alone": score_gallery(pictures, features)}


def evaluate(model, pools, opener, accelerator, layout, batch_size, workers):
    """Every pool -> (recalls and the change by the gate, {"both", "text alone", "picture alone": scores [N,G]})."""
    for pool in pools:
        features, vectors, change = encode(model, pool, opener, accelerator, batch_size, workers)
        scores = {**score_alone(model, pool, features, accelerator, batch_size), "both": score_gallery(vectors, features)}
        yield {**retrieval.recalls(scores["both"], pool, layout), "change": change}, scores


@torch.no_grad()
def rerank(model, cosines, images, input_ids, attention_mask, k, chunk=64):
    """LAVIS's two-step retrieval: the k best by cosine are scored by ITM's "yes" + cosine, all others -100.

    cosines [T,G] of T texts and G images, on the CPU; images [G,P,W], text [T,L], `chunk` pairs at a time -> (scores [T,G] for
    finding the image of a text, scores [G,T] for finding the text of an image).
    """
    tables = []
    for by_text, table in ((True, cosines), (False, cosines.T)):
        best = table.topk(min(k, table.shape[1]), dim=1).indices  # [rows,k]
        row = torch.arange(len(table), device=best.device).repeat_interleave(best.shape[1])
        text, image = (row, best.flatten()) if by_text else (best.flatten(), row)
        scores = torch.full_like(table, -100.0)
        for t, i, r, c in zip(text.split(chunk), image.split(chunk), row.split(chunk), best.flatten().split(chunk)):
            yes = model.match(images[i].to(input_ids.device).float(), input_ids[t], attention_mask[t])[:, 1]
            scores[r, c] = yes.float().cpu() + table[r, c]
        tables.append(scores)
    return tables


# --- what the gate changed ------------

@torch.no_grad()
def write_gate_maps(page, checkpoint, model, pool, scores, opener, preparation):
    """Of MAPS queries spread over the pool, what the gate changed and what was found, as the results of `page` (pages.write_results).

    scores: [N,G] of both; opener: path -> what model.image_embeds takes; preparation: size, transform and ratio of an Opener, for the
    picture beside the map. -> absolute paths of the figures that show.gallery draws of them."""
    names, maps = list(pool.gallery), []
    for number in np.linspace(0, len(pool.queries) - 1, min(MAPS, len(pool.queries))).round().astype(int):
        query = pool.queries[number]
        path, text = pool.gallery[query.reference], cirr.text_of(query)
        embeds = model.image_embeds(opener(path)[None].to(model.query_tokens.device))  # [1,P,W]
        change = patch_change(model, embeds, read_texts(model, [text]))[0]  # [P]
        side = vision.patch_grid(len(change))[1]
        left_out = query.reference if query.members else None  # in CIRR alone it is no candidate
        best = [name for name in next(cirr.ranking(scores[[number]], names)) if name != left_out][:5]
        maps.append({"file": f"{query.pairid}.png", "reference": path, "heat": change[-side * side:].view(side, side).tolist(),
                     "text": text, "target": pool.gallery[query.target],
                     "found": [(pool.gallery[name], name in (query.answers or (query.target,))) for name in best]})
    pages.write_results(page, "gate maps", checkpoint, preparation=preparation, maps=maps)
    return [os.path.abspath(pathlib.Path(page).with_name(one["file"])) for one in maps]


# --- a folder that is searched ------------

def index_folder(folder, store, model, opener, weights, accelerator, workers, batch_size):
    """The index of a folder of pictures, made once below the folder `store` -> (names, features [G,Q,E]), see picture_index.open_index.

    weights: text that tells the model's weights and its precision from all others."""
    about = json.dumps(cache.made_from(model, opener.preprocessing(), weights))  # a stale feature can never be read
    key, place = (hashlib.sha256(text.encode()).hexdigest() for text in (about, os.path.realpath(folder)))
    width = model.query_tokens.shape[1], model.vision_projection.out_features  # (Q, E)

    def encode_pictures(images):
        embeds = model.image_embeds(torch.stack(images).to(accelerator.device))  # [B,P,W]
        with accelerator.autocast():
            return model.image_features(embeds)

    return picture_index.open_index(folder, store / place[:16], key, width, opener, encode_pictures, workers, batch_size)


@torch.no_grad()
def query_vector(model, accelerator, reference, text):
    """Picture [3,s,s] and sentence -> unit vector [E] as numpy."""
    ids = read_texts(model, [cirr.clean_text(text)])
    embeds = model.image_embeds(reference[None].to(accelerator.device))  # [1,P,W]
    with accelerator.autocast():
        return model.query(embeds, **ids)[1][0].float().cpu().numpy()
