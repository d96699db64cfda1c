"""pytest tests/test_instruct.py: --instruct, the Q-Former that reads the question too.

Reference-checked: transformers' InstructBlipQFormerModel on the same weights. Behaviour-checked: pads and batches, what closes it, what
is trained, best.pt, what is refused.
"""

import csv
import shutil

import pytest
import torch
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

import core
import eval_gated
import train_gated
from engine import checkpoints, published
from engine.errors import DataError

BLIP2, STAGE1 = published.tiny("blip2"), published.tiny("blip2-itm")  # behind one vision tower
QUESTIONS = ["Which style is this painting?", "How many boats?", "What is shown here, in which colour, and how was the paint put on?"]


@pytest.fixture(scope="module")
def made():
    """Function: settings -> a model that reads the question, in eval mode."""
    def build(**settings):
        torch.manual_seed(1)
        asked = {"gating": "none", "qformer": STAGE1, "instruct": True, "log": lambda line: None, **settings}
        return core.Blip2OPTGated.build(BLIP2, published.tiny("efficientnet-28.pt"), [], **asked).eval()
    return build


def pictures(model, count):
    return torch.randn(count, 7, model.qformer.config.encoder_hidden_size, generator=torch.Generator().manual_seed(3))


def seen(model, questions, contexts=None, left=True, rows=slice(None), **asked):
    """What the language model sees of as many pictures; prompts with pads on the left as for answers, or the right as in training."""
    batch = core.encode_prompts(model.tokenizer, questions, contexts, left)
    return model.visual_prompt(pictures(model, len(QUESTIONS))[rows], torch.zeros(len(questions), model.efficientnet.width)
                               if model.efficientnet else None, batch["input_ids"], batch["attention_mask"], **asked)


@torch.no_grad()
def test_the_q_former_is_transformers_own(made):
    model = made()
    config = model.qformer.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
             "layer_norm_eps", "pad_token_id", "cross_attention_frequency", "encoder_hidden_size")
    theirs = InstructBlipQFormerModel(InstructBlipQFormerConfig(**{name: getattr(config, name) for name in names})).eval()
    norm = {"embeddings.layernorm." + name: tensor for name, tensor in model.qformer.layernorm.state_dict().items()}
    state = {name: tensor for name, tensor in model.qformer.state_dict().items() if not name.startswith("layernorm.")}
    words = {"embeddings." + name: tensor for name, tensor in model.instruction.embeddings.state_dict().items()}
    checkpoints.load_strictly(theirs, {**state, **norm, **words}, "ours")
    read = core.text_ids(published.load_tokenizer(STAGE1), QUESTIONS, config.max_position_embeddings)
    embeds = pictures(model, len(QUESTIONS))
    Q = model.query_tokens.shape[1]
    mask = torch.cat([torch.ones(len(QUESTIONS), Q, dtype=torch.long), read["attention_mask"]], 1)
    out = theirs(read["input_ids"], mask, query_embeds=model.query_tokens.expand(len(QUESTIONS), -1, -1),
                 encoder_hidden_states=embeds).last_hidden_state[:, :Q]
    assert torch.allclose(seen(model, QUESTIONS), model.language_projection(out), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pads_and_batch_change_nothing(made):
    model = made()
    together = seen(model, QUESTIONS)
    assert torch.allclose(seen(model, QUESTIONS, left=False), together, atol=1e-6)
    for n, question in enumerate(QUESTIONS):
        assert torch.allclose(seen(model, [question], rows=slice(n, n + 1)), together[n:n + 1], atol=1e-6)


@torch.no_grad()
def test_the_question_counts_and_nothing_else(made):
    model, deaf = made(), made(instruct=False)
    other = [QUESTIONS[1], *QUESTIONS[1:]]
    same = (seen(model, other) == seen(model, QUESTIONS)).flatten(1).all(1)
    assert same.tolist() == [False, True, True]
    assert torch.equal(seen(deaf, other), seen(deaf, QUESTIONS))
    told = ["A boat. Question: who? Answer: me.", "", "By the sea."]
    assert torch.equal(seen(model, QUESTIONS, told), seen(model, QUESTIONS))  # a context is the language model's alone
    assert not seen(model, QUESTIONS, blind=True).numel()
    gated = made(gating="film")
    assert torch.equal(seen(gated, QUESTIONS), seen(model, QUESTIONS))  # a fresh gate does nothing, to the bit
    assert torch.equal(seen(gated, QUESTIONS, gated=False), seen(model, QUESTIONS))  # closed gates still leave the question


def test_what_is_trained(made):
    def trained(**settings):
        return {name.partition(".")[0] for name, p in made(**settings).named_parameters() if p.requires_grad}
    assert trained() == {"language_projection"}
    model = made(train_qformer=True).train()
    assert trained(train_qformer=True) == {"language_projection", "qformer", "query_tokens", "instruction"}
    seen(model, QUESTIONS).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # several processes would hang at a part without one


@pytest.mark.parametrize("more", [[], ["--train-qformer", "--gating", "none"]], ids=["frozen", "trained"])
def test_best_pt_alone_brings_it_back(few, tmp_path, no_curves, more):
    run = train_gated.train(train_gated.get_args([
        "--data", str(few), "--blip2", "tiny", "--qformer", STAGE1, "--instruct", "--epochs", "1", "--batch-size", "8", "--lr", "1e-3",
        "--accumulation", "1", "--workers", "0", "--precision", "no", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run"),
        *more]))
    held = checkpoints.load_checkpoint(run.out / "best.pt")
    assert held["model_args"]["instruct"] is True and ("instruction" in held["frozen"]) == (not more)
    assert ("instruction.embeddings.word_embeddings.weight" in held["state"]) == bool(more)
    model, _ = core.load_gated(run.out)
    run.model.eval()
    assert torch.equal(seen(model, QUESTIONS), seen(run.model, QUESTIONS))
    assert eval_gated.main(["--checkpoint", str(run.out), "--split", "test", "--workers", "0", "--beams", "1"]) in (None, 0)


@pytest.mark.parametrize("source, said", [
    (None, "no --qformer: --instruct needs a --qformer that reads text"), (BLIP2, "its Q-Former has no text path"),
    ("file", "best.pt: --instruct needs")])
def test_what_reads_no_text_is_refused(made, tmp_path, source, said):
    if source == "file":
        source = str(tmp_path / "best.pt")
        torch.save(published.read_weights(STAGE1), source)
    with pytest.raises(DataError, match=said):
        made(qformer=source)


def test_no_q_former_to_read_with(few, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_gated.get_args(["--data", str(few), "--blip2", "tiny", "--instruct"])
    assert stopped.value.code == 2 and "--instruct needs a --qformer of stage 1" in capsys.readouterr().err


def test_questions_in_a_language_that_it_cannot_read(few, tmp_path):
    data = shutil.copytree(few, tmp_path / "data")
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    with (data / "train.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows({**row, "question": "\u8fd9\u662f\u4ec0\u4e48\u98ce\u683c"} for row in table)  # BLIP-2's tokenizer knows bytes
    with pytest.raises(DataError, match="blip2-itm: its tokenizer reads .* words as unknown"):
        train_gated.train(train_gated.get_args(["--data", str(data), "--blip2", "tiny", "--qformer", STAGE1, "--instruct", "--out",
                                                str(tmp_path / "run")]))
