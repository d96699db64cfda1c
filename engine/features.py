"""features.py: what the frozen towers see of the pictures of a data set, computed before anything is trained."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from data import rows
from engine import cache, published, towers


@torch.no_grad()
def predicted_styles(net, size, checkpoint, splits, workers, device, log=print, field="style"):
    """--style or --context efficientnet: the rows of every split with the classifier's likeliest style of their picture in `field`.

    net: the EfficientNet28 on `device`; size: of the pictures; checkpoint: its file, for the message."""
    if note := getattr(net, "note", ""):
        log(note)
    paths = list(dict.fromkeys(row.image for read in splits for row in read))
    style = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for start in tqdm(range(0, len(paths), 32), desc="styles", leave=False, mininterval=1, disable=None):
            chunk = paths[start:start + 32]
            images = torch.stack(list(pool.map(lambda path: rows.picture_tensor(path, size), chunk)))
            style |= dict(zip(chunk, likeliest_styles(net, images.to(device))))
    log(f"style of {len(paths)} pictures predicted by {checkpoint}: {rows.histogram(style.values(), 30)}")
    return [[replace(row, **{field: style[row.image]}) for row in read] for read in splits]


@torch.no_grad()
def likeliest_styles(net, images):
    """images [B,3,h,w] -> B names: what the style classifier takes them for."""
    names = net.style_names()
    return [names[index] for index in net.logits(net(images)).argmax(-1).tolist()]


@torch.no_grad()
def cached_features(folder, blip2, qformer, load_style, questions, accelerator, dtype, workers):
    """--cache: (cache.Features of the rows' pictures, {"vision_model": its fingerprint}); without a folder (None, {}).

    qformer: where the Q-Former comes from, None: from blip2; its ln_vision counts to the tower. load_style: function that loads the
    EfficientNet28, None where no gates are built. The towers come in turns: the vision tower is gone again when the classifier is
    loaded, both when the language model is, so that memory holds the largest and not the sum.
    """
    if folder is None:
        return None, {}
    paths = list(dict.fromkeys(row.image for row in questions))
    tower, _ = published.load_vision(blip2, dtype)
    if qformer:
        towers.join(tower, qformer, blip2, accelerator.print)
    tower.requires_grad_(False)
    size, kept = tower.config.image_size, {}
    with accelerator.main_process_first():  # the others find everything there
        kept["image_embeds"] = cache.vision_features(folder, tower, paths, partial(rows.picture_tensor, size=size),
                                                     rows.preprocessing(size), workers, accelerator.device, accelerator.print)
        frozen = {"vision_model": towers.fingerprint(tower)}
        del tower
        if load_style is not None:
            kept["style_feature"] = style_features(folder, load_style().to(accelerator.device), paths, size, accelerator, workers)
    return cache.Features(**kept), frozen


def style_features(folder, net, paths, size, accelerator, workers):
    """cache.Store of the style classifier's pooled feature [F], in float32."""
    store = cache.Store(folder, "style", cache.made_from(net, rows.preprocessing(size)), (net.width,), torch.float32)
    store.fill(paths, partial(rows.picture_tensor, size=size), net, cache.BATCH, workers, accelerator.print,
               accelerator.device)
    return store
