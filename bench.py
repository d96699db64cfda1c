"""bench.py: what a part costs, two recipes side by side in one run: interleaved pairs, the median of their ratios.

    python bench.py gate                # train_cir.py's step with and without gated fusion, at BLIP-2's real widths (random weights)
    python bench.py captions            # the tiny BLIP's captions one by one and in batches: the same captions?

Absolute times depend on the machine and on what else it does; a ratio of neighbours in time does not.
"""

import argparse
import statistics
import sys
import time

import torch
from tqdm import tqdm

import loop
import runfolder
import train_blip_caption
import train_cir


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(BENCHES), help="gate: the fusion of train_cir.py; captions: beam search in batches")
    parser.add_argument("--batch-size", type=runfolder.positive, help="(default: gate 4, captions 32)")
    parser.add_argument("--data", default="data/artquest", metavar="DIR", help="of captions (default: data/artquest)")
    parser.add_argument("--cached", action="store_true", help="gate: without the vision tower, as with a cache of its features")
    parser.add_argument("--repeats", type=runfolder.positive, default=10, help="pairs of steps (default: 10)")
    return parser.parse_args(argv)


def paired(first, second, repeats):
    """Run two functions in turns -> (median seconds of the first, of the second, median of second / first)."""
    def seconds(function):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first(), second()  # warm up
    pairs = [(seconds(first), seconds(second)) for _ in tqdm(range(repeats), desc="pairs", disable=None)]
    return *(statistics.median(side) for side in zip(*pairs)), statistics.median(b / a for a, b in pairs)


def gate(args):
    """A training step of SPRC, without and with the fusion: EVA-ViT-g, 257 patches of 1408, Q-Former of BERT-base's size, 32
    queries, sentences of 16 tokens. --cached: the features are there, so that the vision tower does not hide the gate."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionModel
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Blip2Config(qformer_config=Blip2QFormerConfig(vocab_size=30523, use_qformer_text_input=True).to_dict(), num_query_tokens=32)
    B, L, dtype = args.batch_size or 4, 16, torch.bfloat16 if device == "cuda" else torch.float32
    tower = torch.nn.Identity() if args.cached else Blip2VisionModel(config.vision_config).to(device, dtype)
    images = torch.randn(2 * B, 3, 224, 224, device=device)
    kept = torch.randn(2 * B, 257, 1408, device=device)
    text = {"input_ids": torch.randint(1000, 30000, (B, L), device=device), "attention_mask": torch.ones(B, L, dtype=torch.long, device=device)}

    def step_of(gated):
        loop.seed_everything(0)
        model = train_cir.Sprc(tower, config, None, gate=gated).to(device).train()
        optimizer = train_cir.make_optimizer(model, 1e-5, 0.05)

        def step():
            embeds = kept if args.cached else model.image_embeds(images)  # [2B,P,W]
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                model(embeds[:B], embeds[B:], **text)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    plain, gated, ratio = paired(step_of(False), step_of(True), args.repeats)
    print(f"training step of {B} triplets on {device}: {plain:.3f} s without the gate, {gated:.3f} s with it, ratio {ratio:.3f}")


def captions(args):
    """Beam search of the tiny BLIP over the validation pictures of --data, one by one and in batches."""
    flags = train_blip_caption.get_args(["--data", args.data, "--blip", "tiny"])
    model, tokenizer = train_blip_caption.load_blip(flags.blip)
    data = train_blip_caption.Captions(train_blip_caption.read_data(flags, "val"), model.config.vision_config.image_size, tokenizer)
    device, found = "cuda" if torch.cuda.is_available() else "cpu", {}
    model.eval().to(device)
    pixels = torch.stack([data[i][0]["pixel_values"] for i in range(len(data))]).to(device)

    def captioned(size):
        found[size] = [text for part in pixels.split(size)
                       for text in train_blip_caption.describe(model, tokenizer, part, train_blip_caption.GENERATION)]

    size = args.batch_size or 32
    batched, single, ratio = paired(lambda: captioned(size), lambda: captioned(1), args.repeats)
    same = sum(a == b for a, b in zip(found[size], found[1]))
    print(f"{len(pixels)} captions, 5 beams, on {device}: {single:.2f} s one by one, {batched:.2f} s in batches of {size}, ratio {ratio:.1f}; "
          f"{same} of {len(pixels)} are the same")


BENCHES = {"gate": gate, "captions": captions}


def main(argv=None):
    args = get_args(argv)
    with loop.batch_size_in_memory_errors(args.batch_size or "of its default"):
        BENCHES[args.what](args)


if __name__ == "__main__":
    sys.exit(loop.exit_code(main))
