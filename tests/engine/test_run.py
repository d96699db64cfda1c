"""pytest tests/engine/test_run.py: the frame that all trainings share, on a model of a few weights.

Checked by hand: clipping, learning rate, weight decay, means over micro-batches, what best.pt and last.pt hold. A fault in here would
strike every stage, so each promise of engine/run.py has a test named for it.
"""

import ast
import contextlib
import csv
import hashlib
import math
import os
import pathlib
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import efficientnet_pretrain
import pretrain_qformer
import pretrain_stage2
import train_blip_caption
import train_cir
import train_gated
from engine import checkpoints, loaders, loop, profiling, run, runfolder
from engine.errors import DataError


class Toy(nn.Module):
    """Linear, norm and dropout; the loss is the mean over the batch."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.dropout = nn.Linear(3, 2), nn.LayerNorm(2), nn.Dropout(dropout)

    def forward(self, x):
        """x [B,3] -> {"loss": scalar, "size": [B]}."""
        error = (self.dropout(self.norm(self.linear(x))) - x[:, :2]).square().sum(1)  # [B]
        return {"loss": error.mean(), "size": error.detach()}


ROWS = [SimpleNamespace(name=f"p{n}", file="train.csv", line=n + 2) for n in range(12)]
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def make(tmp_path, no_curves):
    """Function: settings of a Run -> a Run of 12 rows in steps of 4, micro-batches of 2."""
    def make_run(out="run", model=None, optimizer=None, batches=None, rate=0.1, **more):
        model = model or Toy()
        settings = {"epochs": 3, "lr": lambda step, total: rate, "seed": 0, "metric": "loss", "lowest": True, "settings": {"a": 1},
                    "best": lambda: {"state": checkpoints.trainable_state(model), "model_args": {}, "frozen": {}, "args": {}}, **more}
        return run.Run("toy", tmp_path / out, Accelerator(cpu=True), model, model, optimizer or torch.optim.SGD(model.parameters(), 0.1),
                       rows=ROWS, plan=lambda epoch: loop.epoch_plan(12, 2, 2, 0, epoch),
                       batches=batches or (lambda epoch, left: ({"x": X[keys]} for keys in loop.keys_of(left))), **settings)
    return make_run


def train(toy, numbers=(3.0, 2.0, 1.0), resumed=False, saves=True, on_step=None):
    """The loop of a stage -> the weights after each epoch."""
    after = []
    with toy.open(resumed, {"flag": 1}, __file__):
        for epoch in toy.epochs(patience=0):
            toy.wrapped.train()
            for step in toy.steps(epoch):
                for batch in step:
                    with step.forward():
                        parts = toy.wrapped(**batch)
                    step.backward(**parts)
                if on_step:
                    on_step(step)
                step.update()
            if toy.end_epoch({"loss": numbers[epoch]}) and saves:
                toy.save_best()
            after.append(checkpoints.trainable_state(toy.model))
    return after


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def moved(before, after):
    """Length of the way from one state to another."""
    return math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in before))


# --- pictures ------------

def test_best_pt_knows_the_training_pictures_and_a_validation_with_some_of_them_is_said(make, tmp_path, capsys):
    for number, text in enumerate(("a", "b", "c", "b")):
        (tmp_path / f"{number}.jpg").write_bytes(text.encode() * 9)
    paths = [str(tmp_path / f"{number}.jpg") for number in range(4)]
    digest = [hashlib.sha256(b"9 " + text * 9 + text * 9).hexdigest()[:16] for text in (b"a", b"b", b"c")]  # both ends of 9 bytes
    train(make("own", epochs=1, pictures=(paths[:2] * 3, paths[2:3])))
    assert "validation pictures" not in capsys.readouterr().out
    assert checkpoints.load_checkpoint(tmp_path / "own/best.pt")["pictures"] == sorted(digest[:2])
    train(make("shared", epochs=2, save_last=True, pictures=(paths[:2], paths)))  # two of them as they are; 3 is a copy of 1
    line = "2 of 3 validation pictures are trained on too, as the same file or a copy of it"
    assert capsys.readouterr().out.count(line) == 1
    train(make("shared", epochs=2, pictures=(paths[:2], paths)), resumed=True)
    assert capsys.readouterr().out.count(line) == 1
    assert "pictures" not in checkpoints.load_checkpoint(tmp_path / "shared/last.pt")
    make("as it is", pictures=(paths[:1], [])).save_best()  # what is compared with, untrained
    assert checkpoints.load_checkpoint(tmp_path / "as it is/best.pt")["pictures"] == digest[:1]
    make("unknown").save_best()
    assert "pictures" not in checkpoints.load_checkpoint(tmp_path / "unknown/best.pt")


@pytest.mark.parametrize("script", [efficientnet_pretrain, pretrain_qformer, pretrain_stage2, train_blip_caption, train_cir, train_gated])
def test_every_stage_tells_its_run_which_pictures_it_has(script):
    calls = [node for node in ast.walk(ast.parse(pathlib.Path(script.__file__).read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Run"]
    assert [{"pictures", "workers"} <= {word.arg for word in call.keywords} for call in calls] == [True]


# --- a step ------------

@pytest.mark.parametrize("clip", [1.0, 0.01])
def test_the_gradient_is_clipped_at_the_stated_norm(make, clip):
    """With plain SGD at a rate of 1 a step goes as far as the clipped gradient is long, which was longer."""
    model = Toy()
    toy = make(model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), rate=1.0, epochs=1, clip=clip)
    before, norms = [checkpoints.trainable_state(model)], []

    def look(step):
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters())))
    with toy.open(False, {}, __file__):
        for step in toy.steps(0):
            for batch in step:
                step.backward(model(**batch)["loss"])
            look(step)
            step.update()
            before.append(checkpoints.trainable_state(model))
    ways = [moved(a, b) for a, b in zip(before, before[1:])]
    assert max(norms) > 1.0 and ways == [pytest.approx(min(norm, clip), rel=1e-4) for norm in norms]


def test_the_rate_of_each_step_is_the_one_of_lr_times_the_scale_of_the_group(make):
    model = Toy()
    groups = [{"params": [model.linear.weight], "scale": 0.5}, {"params": [model.linear.bias, *model.norm.parameters()]}]
    toy, seen = make(model=model, optimizer=torch.optim.SGD(groups, 9.0), lr=lambda step, total: (step + 1) / total), []
    train(toy, on_step=lambda step: seen.append([group["lr"] for group in toy.optimizer.param_groups]))
    assert toy.total == 9 and seen == [[pytest.approx(0.5 * (n + 1) / 9), pytest.approx((n + 1) / 9)] for n in range(9)]


def test_weight_decay_is_on_matrices_and_on_nothing_else():
    model = Toy()
    model.frozen = nn.Linear(2, 2).requires_grad_(False)
    optimizer = loop.make_optimizer(model, 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name: torch.allclose(p, before[name] * (1 - 0.1 * 0.5)) and not torch.equal(p, before[name])
              for name, p in model.named_parameters() if before[name].any()}
    assert shrunk == {"linear.weight": True, "linear.bias": False, "norm.weight": False, "frozen.weight": False, "frozen.bias": False}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("weigh", [len, lambda keys: sum(n + 1 for n in keys)])
def test_the_gradient_is_that_of_the_mean_over_the_whole_step(make, weigh):
    """weigh: rows that count differently, as captions of different length do; the loss of a micro-batch is then their weighted mean."""
    def gradient(share):
        toy = make(weigh=weigh)

        def loss(keys):
            each = torch.stack([toy.model(X[[n]])["loss"] for n in keys])
            weights = torch.tensor([float(weigh([n])) for n in keys])
            return (each * weights).sum() / weights.sum()
        step = run.Step(toy, 0, list(range(5)), list(enumerate(share)), iter([{"x": X[keys]} for keys in share]))
        for _ in step:
            step.backward(loss(step.keys))
        return [p.grad.clone() for p in toy.model.parameters()], step.means()["loss"]

    (whole, mean), (split, split_mean) = gradient([[0, 1, 2, 3, 4]]), gradient([[0, 1], [2, 3], [4]])
    assert split_mean == pytest.approx(mean, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, split))


def test_dropout_is_a_function_of_seed_step_and_micro_batch(make):
    toy = make(model=Toy(dropout=0.5))

    def loss(number, micro_batch):
        toy.step, step = number, run.Step(toy, 0, list(range(12)), [(micro_batch, list(range(12)))], iter([{"x": X}]))
        return [toy.model(**batch)["loss"].item() for batch in step]
    assert loss(0, 0) == loss(0, 0) and len({loss(s, m)[0] for s in (0, 1) for m in (0, 1)}) == 4


def test_a_loss_or_gradient_that_is_no_number_names_its_rows(make):
    toy = make(batches=lambda epoch, left: ({"x": X[keys] * (math.nan if 5 in keys else 1)} for keys in loop.keys_of(left)))
    with pytest.raises(DataError, match=r"loss is nan at step \d.*p5 \(line 7\)"):
        train(toy)
    toy = make(out="other")
    step = run.Step(toy, 0, [0, 1], [(0, [0, 1])], iter([{"x": X[:2]}]))
    for batch in step:
        step.backward(toy.model(**batch)["loss"])
    toy.model.linear.weight.grad[0, 0] = math.inf
    with pytest.raises(DataError, match=r"gradient is inf at step 0.*p0 \(line 2\), p1"):
        step.update()


def test_the_loaders_of_an_epoch_end_before_its_validation(make):
    """The script still holds the last step, and with it their iterator: processes that the validation forks would inherit it."""
    ended = []

    def batches(epoch, left):
        yield from ({"x": X[keys]} for keys in loop.keys_of(left))
        ended.append(epoch)

    toy, held = make(batches=batches), []
    with toy.open(False, {}, __file__):
        for epoch in toy.epochs():
            for step in toy.steps(epoch):
                held += [step, *step]
            assert ended[-1:] == [epoch]
            toy.skip_validation()


@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_the_loaders_of_a_run_that_does_not_finish_end_with_it(make, ends):
    """Though the script, or the traceback, still holds the last step."""
    class Batches:
        def __iter__(self):
            return self

        def __next__(self):
            return {"x": X[:2]}

        def __del__(self):
            ended.append(True)

    def on_step(step):
        held.append(step)
        os.kill(os.getpid(), signal.SIGINT) if ends == "stopped" else spoilt.pop()

    toy, held, ended, spoilt = make(batches=lambda epoch, left: Batches()), [], [], []
    with contextlib.nullcontext() if ends == "stopped" else pytest.raises(IndexError):
        train(toy, on_step=on_step)
    assert len(held) == 1 and ended == [True]


def test_a_rehearsal_leaves_nothing(make):
    toy = make()
    before = checkpoints.trainable_state(toy.model)
    step = toy.rehearsal({"x": X[:3]}, [0, 1, 2])
    for batch in step:
        step.backward(toy.model(**batch)["loss"])
    assert any(p.grad is not None and p.grad.any() for p in toy.model.parameters())
    step.update()
    assert same(checkpoints.trainable_state(toy.model), before) and toy.step == 0
    assert not any(p.grad is not None and p.grad.any() for p in toy.model.parameters())


# --- epochs ------------

@pytest.mark.parametrize("lowest, numbers, best", [(True, (3.0, 1.0, 2.0), 2), (False, (3.0, 1.0, 2.0), 1),
                                                   (True, (math.nan, 2.0, 2.0), 2), (False, (1.0, math.nan, 1.5), 3)])
def test_best_pt_holds_the_weights_of_the_best_epoch(make, lowest, numbers, best):
    toy = make(lowest=lowest)
    after = train(toy, numbers)
    held = checkpoints.load_checkpoint(toy.out / "best.pt")
    assert held["epoch"] == best and held["value"] == numbers[best - 1] and held["stage"] == "toy" and "torch" in held
    assert same(held["state"], after[best - 1]) and not same(after[0], after[1])


def test_patience_ends_a_run_that_gets_no_better(make, capsys):
    toy = make(epochs=9)
    with toy.open(False, {}, __file__):
        done = [toy.end_epoch({"loss": number}) for _, number in zip(toy.epochs(patience=2), (3.0, 2.0, 2.5, 2.1, 1.0))]
    assert done == [True, True, False, False] and "no better loss for 2 epochs: stopping" in capsys.readouterr().out


def test_where_no_epoch_has_a_number_there_is_no_result(make):
    toy = make()
    train(toy, (math.nan,) * 3)
    assert not (toy.out / "best.pt").exists()
    with pytest.raises(DataError, match="never finite"):
        toy.result("loss", "train.py", [])


# --- what is logged ------------

def test_the_log_has_the_mean_over_a_step_and_terms_that_nobody_announced(make, monkeypatch, no_curves):
    monkeypatch.setattr(run, "LOG_EVERY", 1)
    monkeypatch.setattr(runfolder, "draw_curves", no_curves)
    toy = make(columns=("kind", "step", "epoch", "lr", "loss", "grad_norm"), epochs=1)
    groups = [group for group, _ in toy.plan(0)]
    with toy.open(False, {}, __file__):
        wanted = []
        for step in toy.steps(0):
            wanted.append(toy.model(X[step.group])["size"].mean().item())
            for batch in step:
                step.backward(**toy.model(**batch))
            step.update(extra=torch.tensor(7.0))
        toy.end_epoch({"loss": 0.5})
    read = runfolder.read_log(toy.out / "training_log.csv")
    steps = [row for row in read if row["kind"] == "step"]
    assert len(groups) == 3 and list(read[0]) == ["kind", "step", "epoch", "lr", "loss", "grad_norm", "size", "extra"]
    for name in ("loss", "size"):
        assert [float(row[name]) for row in steps] == [pytest.approx(value, rel=1e-4) for value in wanted]
    assert {row["extra"] for row in steps} == {"7"} and read[-1]["kind"] == "epoch" and read[-1]["size"] == ""
    assert toy.log.added == ["size", "extra"] and (toy.out / "curves.png").stat().st_size > 5000


# --- stopping and going on ------------

def stop_at(number):
    """on_step: Ctrl-C within this step."""
    calls = []

    def look(step):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
    return look


@pytest.mark.parametrize("number", [2, 3, 7])
def test_a_stopped_and_resumed_run_ends_in_the_same_bits(make, number, capsys):
    adam = {out: Toy(dropout=0.3) for out in ("whole", "cut", "again")}
    runs = {out: make(out, model, loop.make_optimizer(model, 0.1, 0.01), save_last=True) for out, model in adam.items()}
    train(runs["whole"])
    train(runs["cut"], on_step=stop_at(number))
    assert runs["cut"].stop.number == signal.SIGINT and runs["cut"].step == number
    assert runs["cut"].result("loss", "train.py", []) == 130
    runs["again"].out = runs["cut"].out
    train(runs["again"], resumed=True)
    assert f"resuming after step {number} of 9" in capsys.readouterr().out
    for name in ("best.pt", "last.pt"):
        whole, again = (checkpoints.load_checkpoint(runs[out].out / name) for out in ("whole", "again"))
        assert same(whole["state"], again["state"]) and whole.get("marks") == again.get("marks")
    logs = [(runs[out].out / "training_log.csv").read_bytes() for out in ("whole", "again")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("patience", [0, 1])
def test_a_signal_in_the_last_validation_leaves_what_comes_after_it_to_resume(make, patience):
    """Whether the epochs or the patience end the run: a last.pt, and nothing after the loop is done."""
    toy, after = make(epochs=9 if patience else 2), []
    with toy.open(False, {}, __file__):
        for epoch in toy.epochs(patience):
            for step in toy.steps(epoch):
                for batch in step:
                    step.backward(toy.model(**batch)["loss"])
                step.update()
            if epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            toy.end_epoch({"loss": 1.0})
        after.append("the test split")
    assert after == [] and toy.result("loss", "train.py", []) == 143
    assert checkpoints.load_checkpoint(toy.out / "last.pt")["marks"]["done"] == 2
    resumed = make(epochs=9 if patience else 2)
    with resumed.open(True, {}, __file__):
        after += resumed.epochs(patience)
        after.append("the test split")
    assert after == ["the test split"]


def test_a_stage_may_give_a_fingerprint_of_its_own_with_its_state(make):
    """Where what is frozen changes by epoch it is no constant of the run."""
    toy = make(save_last=True, epochs=1, state=lambda: {"state": {}, "frozen": {"tower": "open"}}, load_state=lambda last: None)
    train(toy)
    assert checkpoints.load_checkpoint(toy.out / "last.pt")["frozen"] == {"tower": "open"}


def test_a_kill_between_last_pt_and_best_pt_is_made_up_for(make):
    train(make(save_last=True, epochs=1), saves=False)
    toy = make(save_last=True)
    with toy.open(True, {}, __file__):
        assert checkpoints.load_checkpoint(toy.out / "best.pt")["epoch"] == 1


def test_a_broken_picture_keeps_what_is_done(make):
    def batches(epoch, left):
        for number, keys in enumerate(loop.keys_of(left)):
            yield {"fault": "train.csv, line 9: broken"} if number == 3 else {"x": X[keys]}
    toy = make(batches=batches)
    with pytest.raises(loaders.LoaderError, match="line 9: broken"):
        train(toy)
    assert checkpoints.load_checkpoint(toy.out / "last.pt")["step"] == 1


def test_a_loader_process_that_dies_in_the_midst_of_a_step_is_told_with_its_rows(make):
    def die(step):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(loaders.LoaderError, match="loader process failed.*it was at p"):
        train(make(), on_step=die)


@pytest.mark.parametrize("change, message", [({"settings": {"a": 2}}, "a is 2, was 1"), ({"frozen": {"tower": "y"}}, "another base model")])
def test_resume_refuses_what_would_end_otherwise(make, change, message):
    train(make(save_last=True, frozen={"tower": "x"}))
    toy = make(**{"frozen": {"tower": "x"}, **change})
    with pytest.raises(DataError, match=message), toy.open(True, {}, __file__):
        pass


def test_a_run_may_be_made_longer_and_says_what_changes(make, capsys):
    """Two epochs were trained; --resume with three goes on along the longer schedule, and best.pt remembers it."""
    def rate(step, total):
        return 1 - step / total
    train(make(epochs=2, lr=rate, save_last=True, settings={"--epochs": 2}), numbers=(3.0, 2.0))
    seen, toy = [], make(epochs=3, lr=rate, save_last=True, settings={"--epochs": 3})
    train(toy, resumed=True, on_step=lambda step: seen.append(toy.optimizer.param_groups[0]["lr"]))
    assert seen == [pytest.approx(1 - step / 9) for step in (6, 7, 8)]
    assert "3 epochs where" in (printed := capsys.readouterr().out) and "of 9, 0.333 (it would have been 0)" in printed
    assert checkpoints.load_checkpoint(toy.out / "best.pt")["longer"] == [{"after step": 6, "epochs": 3, "before": 2}]
    with pytest.raises(DataError, match="--epochs is 2, was 3"):
        train(make(epochs=2, settings={"--epochs": 2}), resumed=True)


def test_a_finished_run_is_not_overwritten(make, tmp_path):
    train(make())
    accelerator = SimpleNamespace(num_processes=1)
    with pytest.raises(DataError, match="already holds best.pt"):
        run.resumes(accelerator, tmp_path / "run", False)
    assert run.resumes(accelerator, tmp_path / "none", True) is False


# --- several processes ------------

def test_what_the_first_process_decides_holds_for_all(monkeypatch):
    """Without a shared disk the others have no last.pt: they take the first one's word, and its error."""
    sent = []
    monkeypatch.setattr(run, "broadcast_object_list", lambda found: sent.append(found[0]) or (found if found[0] else [sent[0]]))
    first, other = (SimpleNamespace(num_processes=2, is_main_process=leads) for leads in (True, False))

    def never():
        raise AssertionError("the second process looked for itself")
    assert run.first_decides(first, lambda: "resume") == "resume" == run.first_decides(other, never)
    sent.clear()

    def refuse():
        raise DataError("already holds best.pt")
    for accelerator, decide in ((first, refuse), (other, never)):
        with pytest.raises(DataError, match="already holds"):
            run.first_decides(accelerator, decide)


# --- where the time goes ------------

def test_a_profile_tells_the_phases_of_all_steps_but_the_first(make, tmp_path, monkeypatch, no_curves, capsys):
    """On a clock that only this test moves; a rehearsal, the first step and what lies between two steps are not counted."""
    now = [0.0]

    def takes(seconds, function=None):
        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs) if function else None
        return slow

    monkeypatch.setattr(profiling, "_now", lambda: now[0])
    model = Toy()
    toy = make(model=model, epochs=2, profile=True)
    monkeypatch.setattr(loaders, "next_batch", takes(1.0, loaders.next_batch))
    monkeypatch.setattr(model, "forward", takes(2.0, model.forward))
    monkeypatch.setattr(toy.accelerator, "backward", takes(3.0, toy.accelerator.backward))
    monkeypatch.setattr(toy.optimizer, "step", takes(5.0, toy.optimizer.step))
    monkeypatch.setattr(loop, "is_better", takes(100.0, loop.is_better))
    rehearsed = toy.rehearsal({"x": X[:2]}, [0, 1])
    for batch in rehearsed:
        with rehearsed.forward():
            parts = model(**batch)
        rehearsed.backward(**parts)
    train(toy, on_step=lambda step: takes(1000.0 if toy.step == 0 else 0.5)())
    printed = capsys.readouterr().out.splitlines()
    table = {row["phase"]: row for row in csv.DictReader((tmp_path / "run/profile.csv").open())}
    assert {name: float(row["ms a step"]) for name, row in table.items()} == {  # two micro-batches each
        "waiting for data": 2000, "forward": 4000, "backward": 6000, "optimizer": 5000, "logging": 0, "the rest of the step": 500,
        "a step": 17500}
    assert float(table["forward"]["seconds"]) == 5 * 4 and float(table["forward"]["share"]) == pytest.approx(4 / 17.5, abs=1e-4)
    at = printed.index(next(line for line in printed if line.startswith("of 6 steps, but the first")))
    assert [line.rsplit(maxsplit=2)[0] for line in printed[at + 1:at + 8]] == list(table) and "22.9%" in printed[at + 2]


def test_without_profile_nothing_is_measured_or_written(make, tmp_path, monkeypatch, no_curves):
    monkeypatch.setattr(profiling, "_now", lambda: pytest.fail("measured"))
    train(make())
    assert not (tmp_path / "run/profile.csv").exists()


@pytest.mark.parametrize("script", [efficientnet_pretrain, pretrain_qformer, pretrain_stage2, train_blip_caption, train_cir, train_gated])
def test_every_training_script_can_be_profiled_and_resumed_with_or_without(script):
    source = pathlib.Path(script.__file__).read_text(encoding="utf-8")
    assert script.get_args(["--data", "a=b", "--profile"]).profile and source.count("profile=args.profile") == 1
    assert re.search(r'(?i)free = [(\[]"out", "resume", "save_last", "profile"', source)
