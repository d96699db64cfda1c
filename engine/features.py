"""features.py: what the frozen towers see of the pictures of a data set, computed before anything is trained."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm


@torch.no_grad()
def predicted_styles(args, blip2, checkpoint, splits, device, say=print):
    """--style efficientnet: the rows of every split with the classifier's likeliest style of their picture."""
    net = efficientnet.EfficientNet28.from_checkpoint(checkpoint, args.safe_load).eval().to(device)
    names, size = net.style_names(), published.image_size_of(blip2)
    paths = list(dict.fromkeys(row.image for read in splits for row in read))
    style = {}
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        for start in tqdm(range(0, len(paths), 32), desc="styles", leave=False, mininterval=1, disable=None):
            chunk = paths[start:start + 32]
            images = torch.stack(list(pool.map(lambda path: rows.picture_tensor(path, size), chunk)))
            best = net.logits(net(images.to(device))).argmax(-1).tolist()
            style |= {path: names[index] for path, index in zip(chunk, best)}
    say(f"style of {len(paths)} pictures predicted by {checkpoint}: {rows.histogram(style.values(), 30)}")
    return [[replace(row, style=style[row.image]) for row in read] for read in splits]


@torch.no_grad()
def cached_features(args, built_from, questions, accelerator, dtype):
    """--cache: (cache.Features of the rows' pictures, {"vision_model": its fingerprint}); without it (None, {}).

    The towers come in turns: the vision tower is gone again when the classifier is loaded, both when the language model is, so
    that memory holds the largest and not the sum.
    """
    if args.cache is None:
        return None, {}
    paths = list(dict.fromkeys(row.image for row in questions))
    tower, _ = published.load_vision(built_from["blip2"], dtype)
    tower.requires_grad_(False)
    size, kept = tower.config.image_size, {}
    with accelerator.main_process_first():  # the others find everything there
        kept["image_embeds"] = cache.vision_features(args.cache, tower, paths, partial(rows.picture_tensor, size=size),
                                                     rows.PREPROCESSING, args.workers, accelerator.device, accelerator.print)
        towers = runfolder.fingerprint(torch.nn.ModuleDict({"vision_model": tower}))
        del tower
        if built_from["gating"] != "none":
            kept["style_feature"] = style_features(args, built_from["efficientnet"], paths, size, accelerator)
    return cache.Features(**kept), towers


def style_features(args, checkpoint, paths, size, accelerator):
    """cache.Store of the style classifier's pooled feature [F], in float32."""
    net = efficientnet.EfficientNet28.from_checkpoint(checkpoint, args.safe_load).eval().to(accelerator.device)
    store = cache.Store(args.cache, "style", {"weights": cache.weights_digest(net), "size": size, "pixels": rows.PREPROCESSING},
                        (net.width,), torch.float32)
    store.fill(paths, partial(rows.picture_tensor, size=size), net, cache.BATCH, args.workers, accelerator.print,
               accelerator.device)
    return store
