"""run.py: one training under way: everything around a loop that is the same in every stage. The loop itself is in the script.

    with run.open(resumed, vars(args), __file__):   # folder, lock, log, Ctrl-C; what --resume finds
        for epoch in run.epochs(args.patience):
            run.wrapped.train()
            for step in run.steps(epoch):             # sets the learning rate; ends after a signal
                for batch in step:                    # this process's micro-batches; seeds dropout
                    with step.forward():              # mixed precision
                        parts = run.wrapped(**batch)
                    step.backward(parts["loss"])      # of the mean over the whole step; a loss that is no number names its rows
                step.update()                         # clip, AdamW, log
            if run.end_epoch(evaluate(...)):          # training_log.csv, last.pt, curves.png; is it the best?
                run.save_best()

Order, dropout and learning rate are functions of (seed, epoch, step, micro-batch). So a run that was stopped, killed or resumed ends in
the same weights, and several processes train as one with as many micro-batches does.
"""

import contextlib
import math
import pathlib
import re

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from engine import checkpoints, environment, files, loaders, loop, runfolder, seen
from engine.errors import DEAD_LOADER, DataError, dead_loader
from engine.profiling import Profile

LOG_EVERY = 10  # optimizer steps between two rows of training_log.csv
CLIP = 1.0  # gradient norm
COLUMNS = ("kind", "step", "epoch", "lr", "loss", "grad_norm")  # of training_log.csv; more come with the terms that are logged
PANELS = (("loss", [("step", "loss", "training"), ("epoch", "loss", "validation")]),)


def versions():
    """{package: version} that best.pt remembers."""
    return {name: environment.installed(name).split("+")[0] for name in ("torch", "transformers", "timm")}


class Stopped(Exception):
    """A signal has come and the step under way is done."""


def first_decides(accelerator, decide):
    """What decide() gives on the first process, on all of them: its value, or its DataError. The run folder is on its disk alone."""
    if accelerator.num_processes == 1:
        return decide()
    found = [None]
    if accelerator.is_main_process:
        try:
            found = [(decide(), None)]
        except DataError as error:
            found = [(None, str(error))]
    value, fault = broadcast_object_list(found)[0]
    if fault is not None:
        raise DataError(fault)
    return value


def resumes(accelerator, out, resume):
    """Does the run go on from OUT/last.pt? DataError: the folder holds results that a new run would overwrite."""
    def decide():
        resumed = resume and (pathlib.Path(out) / "last.pt").exists()
        runfolder.refuse_overwrite(out, resumed)
        return resumed
    return first_decides(accelerator, decide)


class Run:
    """A training of one model.

    stage: its name in checkpoints. model: what is trained; wrapped, optimizer: the same as accelerate.prepare gives them.
    rows: of the training set, for messages. plan: epoch -> its steps as loop.epoch_plan makes them; a key is a number of `rows` or a
    tuple that begins with one. batches: (epoch, the steps that are left) -> this process's batches of these, in their order.
    lr: (step, all steps) -> learning rate; "scale" of a parameter group multiplies it. weigh: keys -> their weight in the mean
    of a step. metric: the number of an epoch that best.pt is chosen by; lowest: a low one is good.
    settings: {name: value}, what must be the same on --resume; frozen: fingerprint of what is not trained (None: everything is).
    best: () -> what best.pt holds beside stage, progress and versions. state, load_state: () -> dict of what is trained, for last.pt,
    and how it is put back. base: what must be the same frozen model, in words, and the flags that name it. pictures: paths of those
    that are trained on, and of those of the validation; best.pt has the digests of the first under "pictures". workers: threads that
    read them. profile: measure the phases of the steps, see profiling.Profile.
    """

    def __init__(self, stage, out, accelerator, model, wrapped, optimizer, *, rows, plan, batches, epochs, lr, seed, metric, settings,
                 best, lowest=False, frozen=None, base=("base model", "--blip2"), state=None, load_state=None, weigh=len, clip=CLIP,
                 columns=COLUMNS, panels=PANELS, title="", unit="rows", format_metrics=loop.format_metrics, save_last=False, disk=None,
                 pictures=None, workers=2, profile=False):
        self.stage, self.out, self.accelerator = stage, pathlib.Path(out), accelerator
        self.model, self.wrapped, self.optimizer = model, wrapped, optimizer
        self.rows, self.plan, self.batches, self.weigh, self.clip = rows, plan, batches, weigh, clip
        self.seed, self.metric, self.lowest, self.settings, self.frozen, self.base = seed, metric, lowest, settings, frozen, base
        self.best, self.state, self.load_state = best, state or self._trained, load_state or self._put_back
        self.pictures, self.workers, self.digests = pictures, workers, None
        self.columns, self.panels, self.title, self.format_metrics, self.keeps_last = columns, panels, title, format_metrics, save_last
        self.disk = disk or sum(t.nbytes for t in checkpoints.trainable_state(model).values()) * (8 if save_last else 2)
        self.per_epoch = len(plan(0))
        self.last_epoch, self.total = epochs, epochs * self.per_epoch
        self._lr = lr
        self.pace, self.profile = loop.Pace(self, unit), Profile(profile)
        self.progress = {"metric": metric, "value": None, "epoch": None, "stale": 0, "done": 0}  # done: epochs validated
        self.step, self.log, self.stop, self.group = 0, None, loop.StopSignal(), ()
        self.feed = (batch for batch in ())  # the batches of an epoch; a generator, since that can be closed

    def lr(self, step):
        """Learning rate of an optimizer step of this run."""
        return self._lr(step, self.total)

    # -- the run folder

    @contextlib.contextmanager
    def open(self, resumed, flags, script):
        """The run folder for the time of the training. flags: {name: value} of the command line; script: __file__ of the one that
        runs: both for args.yaml."""
        log = self.accelerator.print
        with contextlib.ExitStack() as stack, self.stop:
            def take():
                stack.enter_context(runfolder.folder_lock(self.out))
                runfolder.refuse_overwrite(self.out, resumed)  # once more: another run may have ended meanwhile
            first_decides(self.accelerator, take)
            self._begin(resumed, flags, script)
            # cleared later, among other garbage, loaders no longer hear that they are to end, and each is waited for
            stack.callback(lambda: self.feed.close())
            try:
                yield self
            except Stopped:
                self.save_last()
                log(f"stopped after step {self.step}; {self.out / 'last.pt'} is there for --resume")
            except loaders.LoaderError:
                self._save_what_is_done()
                raise
            except RuntimeError as error:
                if not re.search(DEAD_LOADER, str(error)):  # torch reports a dead one in the midst of anything
                    raise
                self._save_what_is_done()
                raise loaders.LoaderError(f"{dead_loader(error)}; it was at {loaders.list_rows(self.rows_of(self.group))}") from None
            self.profile.finish(self.out, self.accelerator)
        self.accelerator.end_training()

    def _begin(self, resumed, flags, script):
        if resumed:
            self._restore(first_decides(self.accelerator, lambda: checkpoints.load_checkpoint(
                self.out / "last.pt", ("optimizer", "step", "marks", "settings"))))
            self.accelerator.print(f"resuming after step {self.step} of {self.total}")
        self._look_at_pictures()
        if self.accelerator.is_main_process:
            files.refuse_full_disk(self.out, self.disk)
            runfolder.start_run(self.out, flags, script)
            self.log = runfolder.RunLog(self.out, self.columns, self.step if resumed else None)
            if resumed and self.progress["epoch"] and self.step == self.progress["epoch"] * self.per_epoch:
                self.save_best()  # last.pt is written first: a kill between the two leaves no best.pt of its epoch
            if resumed:
                self.draw()

    def _look_at_pictures(self):
        """Digests of the training pictures, once; says where the validation has some of them."""
        if self.pictures is not None and self.digests is None:
            train, val = map(list, self.pictures)
            found = seen.digests(self.accelerator, [*train, *val], self.workers)
            self.digests = sorted({found[path] for path in train})
            shared = seen.format_shared(set(self.digests), {found[path] for path in val})
            if shared:
                self.accelerator.print(shared)

    def _restore(self, last):
        """Put last.pt back. DataError where anything differs that would change the result."""
        path = self.out / "last.pt"
        if last.get("stage", self.stage) != self.stage:
            raise DataError(f"{path}: a checkpoint of another stage ({last['stage']}) and not of this one")
        was, now = (settings.get("--epochs") for settings in (last["settings"], self.settings))
        longer = was is not None and now is not None and now > was
        runfolder.refuse_other_settings(self.settings, {**last["settings"], **({"--epochs": now} if longer else {})}, path)
        others = checkpoints.other_parts(self.frozen, last["frozen"]) if self.frozen is not None else []
        if others:
            raise DataError(f"{path} was trained on another {self.base[0]} than the one given now (other: {', '.join(others)}): pass "
                            f"the same {self.base[1]}, or another --out")
        self.load_state(last)
        self.optimizer.load_state_dict(last["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(last["scaler"])
        self.step, self.progress = last["step"], {**self.progress, **last["marks"]}
        if longer:
            self.progress["longer"] = [*self.progress.get("longer", ()), {"after step": self.step, "epochs": now, "before": was}]
            rate, short = self.lr(self.step), self._lr(min(self.step, was * self.per_epoch), was * self.per_epoch)
            self.accelerator.print(f"{now} epochs where {path} was to have {was}: from here on the learning rate is that of step "
                                   f"{self.step} of {self.total}, {rate:.3g} (it would have been {short:.3g}); a run of {now} epochs "
                                   "from the start ends otherwise; best.pt says so under \"longer\"")

    def _trained(self):
        return {"state": checkpoints.trainable_state(self.model)}

    def _put_back(self, last):
        checkpoints.load_trainable(self.model, last["state"], self.out / "last.pt")

    def save_last(self):
        """last.pt: everything that --resume needs; a step count is enough for order and randomness."""
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoints.save_checkpoint(self.out / "last.pt", {
                "stage": self.stage, "frozen": self.frozen, **self.state(), "settings": self.settings,
                "optimizer": self.optimizer.state_dict(), "scaler": None if scaler is None else scaler.state_dict(), "step": self.step,
                "marks": self.progress})

    def _save_what_is_done(self):
        if self.step:
            self.save_last()

    def save_best(self):
        """best.pt: what is trained and plain values only."""
        self._look_at_pictures()  # of a model that is saved as it is, without a run
        if self.accelerator.is_main_process:
            path, content = self.out / "best.pt", self.best()
            known = {} if self.digests is None else {"pictures": self.digests}
            checkpoints.save_checkpoint(path, {"stage": self.stage, **content, **known, **self.progress, **versions()})
            if "state" in content:
                checkpoints.verify_saved(path, self.model)

    def draw(self):
        """curves.png of the log so far; terms that no panel knows have one of their own."""
        further = [(kind, name, f"{name}, {kind}s") for name in self.log.added for kind in ("step", "epoch")]
        panels = [*self.panels, *([("further terms", further)] if further else [])]
        runfolder.draw_curves(self.log.path, self.out / "curves.png", panels, self.title)

    def result(self, what, script, argv):
        """The end of a stage's main(): its exit code where a signal ended the run, else its result and a line to cite. DataError: there
        is no result. what: the metric, in words; script: __file__; argv: the flags, None = the process's."""
        if self.stop.number:
            return 128 + self.stop.number
        if self.progress["value"] is None:
            raise DataError(f"the validation {what} was never finite: there is no best.pt; lower --lr")
        result = f"best {what} {self.progress['value']:.4g} in epoch {self.progress['epoch']}"
        self.accelerator.print(f"{result}: {self.out}/best.pt")
        self.accelerator.print(runfolder.citation(script, argv, self.seed, result))
        return None

    # -- the loop

    def epochs(self, patience=0):
        """The epochs that are left; with patience up to as many without a better value. Raises Stopped where a signal came in a
        validation."""
        for epoch in range(self.progress["done"], self.last_epoch):
            if patience and self.progress["stale"] >= patience:
                self.accelerator.print(f"no better {self.metric} for {patience} epochs: stopping")
                return
            yield epoch
            if loop.stop_requested(self.accelerator, self.stop):  # a signal in the validation
                raise Stopped

    def steps(self, epoch):
        """The optimizer steps of an epoch that are left, each a Step. Raises Stopped after the step in which a signal came."""
        left = self.plan(epoch)[self.step - epoch * self.per_epoch:]
        self.feed = batches = (batch for batch in self.batches(epoch, left))
        bar = tqdm(left, desc=f"steps from {self.step}", mininterval=1, disable=None if self.log else True)  # None: on a terminal
        for group, share in bar:
            rate = self.lr(self.step)
            for part in self.optimizer.param_groups:
                part["lr"] = rate * part.get("scale", 1.0)
            step = Step(self, epoch, group, share, batches)
            with self.profile.step():
                yield step
                with self.profile.phase("logging"):
                    bar.set_postfix(**{name: f"{value:.3f}" for name, value in step.means().items()}, lr=f"{rate:.1e}")
            if loop.stop_requested(self.accelerator, self.stop):
                raise Stopped
        next(batches, None)  # its loaders end here: the script still holds the last step, and the validation's loaders would inherit them

    def rows_of(self, keys):
        """The training rows of some keys, for messages."""
        return [self.rows[key[0] if isinstance(key, tuple) else key] for key in dict.fromkeys(keys or ())]

    def rehearsal(self, batch, keys):
        """A Step on one batch that changes nothing: for the longest batch, before anything is trained."""
        return Step(self, 0, keys, [(0, keys)], iter([batch]), real=False)

    def skip_validation(self):
        """The end of an epoch after which nothing is validated: nothing is logged or saved."""
        self.progress |= {"done": self.progress["done"] + 1}

    def end_epoch(self, numbers, **extra):
        """Log the numbers of an epoch's validation, write last.pt where it is kept -> is it the best so far?

        numbers: {name: value}, self.metric among them, the same on every process. extra: what else best.pt and last.pt remember of
        a best epoch."""
        epoch, better = self.progress["done"] + 1, loop.is_better(numbers[self.metric], self.progress, self.lowest)
        self.progress |= {"done": epoch, "stale": self.progress["stale"] + 1}
        if better:
            self.progress |= {"value": numbers[self.metric], "epoch": epoch, "stale": 0, **extra}
        self.accelerator.print(f"epoch {epoch}: {self.format_metrics(numbers)}" + (" *" if better else ""))
        if self.log:
            self.log.write("epoch", self.step, epoch=epoch, lr=self.lr(self.step - 1), **numbers)
            if self.keeps_last:  # before best.pt: _begin makes up a best.pt that a kill between the two has left out
                self.save_last()
            self.draw()
        return better


class Step:
    """One optimizer step: its micro-batches, their gradient, the update. rows: those of the step for messages, where only its batch
    knows them (tar files)."""

    def __init__(self, run, epoch, group, share, batches, real=True):
        self.run, self.epoch, self.group, self.share, self.batches, self.real = run, epoch, group, share, batches, real
        self.sums, self.keys, self.is_last, self.rows = {}, (), True, None
        run.group = group

    def __iter__(self):
        """This process's micro-batches, on its device. Dropout is seeded by (seed, step, micro-batch): exact resume and equal
        processes depend on it. Not before the batch is there: with --workers 0 the loader may seed this very process."""
        for i, (number, keys) in enumerate(self.share):
            with self.run.profile.phase("waiting for data"):
                batch = loaders.next_batch(self.batches, self.run.accelerator.device)
            loop.seed_everything(self.run.seed, self.run.step, number)
            self.keys, self.is_last = keys, i == len(self.share) - 1
            yield batch

    @contextlib.contextmanager
    def forward(self):
        """Mixed precision; the processes exchange their gradients after the last micro-batch alone."""
        accelerator = self.run.accelerator
        sync = contextlib.nullcontext() if self.is_last else accelerator.no_sync(self.run.wrapped)
        with self.run.profile.phase("forward"), sync, accelerator.autocast():
            yield

    def backward(self, loss, **terms):
        """The gradient of the mean over the whole step, however it is split into micro-batches and processes.

        loss: scalar, the mean over the micro-batch's rows. terms: further numbers for the log, a scalar or one a row each."""
        run = self.run
        if not torch.isfinite(loss):
            raise DataError(loop.bad_loss(f"loss is {loss.item()}", run.step, self.rows or run.rows_of(self.keys)))
        weight = run.weigh(self.keys)
        with run.profile.phase("backward"):
            run.accelerator.backward(loss * (weight * run.accelerator.num_processes / run.weigh(self.group)))
        with run.profile.phase("logging"):
            for name, value in {"loss": loss, **terms}.items():
                summed, total = self.sums.get(name, (0.0, 0))
                self.sums[name] = summed + value.detach().float().mean().item() * weight, total + weight

    def means(self):
        """{"loss" and the terms: mean over this process's rows}."""
        return {name: summed / total for name, (summed, total) in self.sums.items()}

    def update(self, **log):
        """Clip, AdamW, and every LOG_EVERY steps a row of training_log.csv. log: more numbers for it (tensors are read only then)."""
        run, accelerator = self.run, self.run.accelerator
        if not self.real:
            run.optimizer.zero_grad()
            return
        rate, trained = run.lr(run.step), [p for p in run.model.parameters() if p.requires_grad]
        with run.profile.phase("optimizer"):
            norm = float(accelerator.clip_grad_norm_(trained, run.clip))
            if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
                raise DataError(loop.bad_loss(f"gradient is {norm}", run.step, self.rows or run.rows_of(self.group)))
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.step += 1
        run.pace.step(len(self.group))
        if run.step % LOG_EVERY == 0:
            with run.profile.phase("logging"):
                self._write_row(rate, norm, log)

    def _write_row(self, rate, norm, log):
        run, accelerator = self.run, self.run.accelerator
        sums = accelerator.reduce(torch.tensor(list(self.sums.values()), dtype=torch.float64, device=accelerator.device), "sum")
        if run.log:
            means = dict(zip(self.sums, (sums[:, 0] / sums[:, 1]).tolist()))
            run.log.write("step", run.step, epoch=self.epoch + 1, lr=rate, grad_norm=norm, **means, **{
                name: value.item() if isinstance(value, torch.Tensor) else value for name, value in log.items()})
