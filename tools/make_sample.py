"""Draw a small data set of paintings with questions, in ArtQuest's files; with --cirr one for composed image retrieval, with --mixed
one in which style must change what is seen.

    python tools/make_sample.py
    python tools/make_sample.py --out data/artquest --seed 0 --pictures 480
    python tools/make_sample.py --sheet data/manners.jpg       # the same scenes in all eight manners
    python tools/make_sample.py --cirr                         # data/cirr for train_cir.py instead (sample_cirr.py)
    python tools/make_sample.py --mixed                        # data/mixed: "What is painted in small dots?" (sample_mixed.py)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

from engine import errors
from tools import drawing, sample_cirr, sample_mixed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path,
                        help="folder to write to (default: data/artquest, with --cirr data/cirr, with --mixed data/mixed)")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed gives another set (default: %(default)s)")
    parser.add_argument("--pictures", type=int,
                        help="number of pictures, at least 64, with --cirr those of training (default: 480, with --mixed 960)")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--cirr", action="store_true", help="draw a set for composed image retrieval in CIRR's files")
    other.add_argument("--mixed", action="store_true", help="draw two things in two manners, and questions in which the manner decides "
                                                            "what the answer is about")
    parser.add_argument("--sheet", metavar="FILE.jpg",
                        help="only draw one picture that shows the same scenes in all manners")
    args = parser.parse_args(argv)
    if args.sheet:
        drawing.draw_sheet(args.sheet, args.seed)
        return
    args.pictures = args.pictures if args.pictures is not None else 960 if args.mixed else 480
    if args.pictures < 64 or args.seed < 0:
        parser.error("--pictures must be at least 64 and --seed at least 0")
    args.out = args.out or Path("data/cirr" if args.cirr else "data/mixed" if args.mixed else "data/artquest")
    if args.cirr or args.mixed:
        (sample_cirr if args.cirr else sample_mixed).make(args.out, args.seed, args.pictures, parser.error)
        return
    stamp = {"version": drawing.VERSION, "seed": args.seed, "pictures": args.pictures}
    sizes = drawing.make_once(args.out, stamp, drawing.is_complete, drawing.holds_other_data,
                              lambda: drawing.make_set(args.out, args.seed, args.pictures), parser.error)
    if sizes is None:
        return
    counts = ", ".join(f"{split} {sizes[split]}" for split in drawing.SPLITS)
    print(f"{args.pictures} pictures ({counts}), {len(drawing.WORDINGS)} questions each, "
          f"{len(drawing.STYLES)} styles.\nPictures: {args.out / 'images'}\n"
          f"Tables for each split in {args.out}: {', '.join(name.format('train') for name in drawing.TABLES)}")


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
