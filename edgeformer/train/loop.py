"""The training loop. It reads from top to bottom once."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm

from edgeformer.errors import TrainingError
from edgeformer.train.checkpoint import (
    STATE_FILE,
    SavedRun,
    load_run,
    restore,
    save_checkpoint,
    save_model,
    write_atomically,
)
from edgeformer.train.forecast import ForecastTask
from edgeformer.train.options import RunOptions
from edgeformer.train.picture import loss_picture
from edgeformer.train.recipe import Recipe, SeriesData, TrainOptions, differences
from edgeformer.train.task import TrainingTask, picks
from edgeformer.train.text import TextTask

CHECKPOINT_FILES = (
    *(STATE_FILE, "model.safetensors", "config.json", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "loss.csv", "loss.png", "sample.txt", "forecast.png"),
)


@dataclass(frozen=True)
class TrainingReport:
    """The result of a run. Losses are NaN where nothing was measured; `shown` is the result of the task's `finish`."""

    folder: Path
    step: int
    steps: int
    training_loss: float
    validation_loss: float
    baseline: tuple[str, float]
    parameters: int
    seconds: float
    shown: dict[str, Any] = field(default_factory=dict)


def train(
    recipe: Recipe,
    folder: str | Path,
    run: RunOptions = RunOptions(),  # noqa: B008 (frozen)
) -> TrainingReport:
    """Train the model of `recipe` and write a checkpoint to `folder`; `edgeformer.train.checkpoint` lists the files.

    With `run.resume`, on the same machine and with the same numbers of threads and processes, the result has the same
    bits as that of an uninterrupted run. Under torchrun each process calls this.

    Raises:
        TrainingError: the recipe, the data and `folder` do not fit each other, or the loss is no longer a number.
    """
    options, folder = recipe.train, Path(folder)
    saved, tensors = load_run(folder) if run.resume else (None, {})
    if saved and (changed := differences(saved.recipe, recipe.to_dict())):
        raise TrainingError(
            f"cannot resume {folder} with another recipe ({'; '.join(changed)}); use --overwrite to start again"
        )
    if not run.resume and not run.overwrite and any((folder / name).exists() for name in (STATE_FILE, "config.json")):
        raise TrainingError(
            f"{folder} already holds a model; continue it with --resume, or start again with --overwrite"
        )
    if run.stop_at is not None and run.stop_at < 1:
        raise TrainingError(f"stop_at is {run.stop_at}, expected at least 1")

    # Devices and processes. Accelerate keeps its state until the process ends; reset it for a second run.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(cpu=run.cpu, mixed_precision=mixed_precision(options.precision, run.cpu))
    processes, rank, is_main = accelerator.num_processes, accelerator.process_index, accelerator.is_main_process
    local_batch, rest = divmod(options.batch_size, processes * options.gradient_accumulation_steps)
    if rest:
        raise TrainingError(
            f"train.batch_size {options.batch_size} is not a multiple of {processes} processes "
            f"times {options.gradient_accumulation_steps} gradient_accumulation_steps"
        )

    # Data, model, optimizer.
    task = make_task(recipe, read_tokenizer(folder) if run.resume else None)
    require_same_data(task, accelerator)
    if saved and saved.fingerprint != task.fingerprint:
        raise TrainingError(f"cannot resume {folder}: the data is not what it was; restore it, or use --overwrite")
    torch.manual_seed(options.seed)
    module = task.model()
    optimizer = make_optimizer(module, options)
    model, optimizer = accelerator.prepare(module, optimizer)
    step, history = 0, np.zeros((0, 4))
    if saved:
        restore(module, optimizer, tensors, folder)
        step, history = saved.step, saved.history
    if is_main:
        prepare_folder(folder, task, fresh=saved is None)
        if saved:
            save_model(folder, module, saved)

    # The loop.
    started, last = time.perf_counter(), min(options.steps, run.stop_at or options.steps)
    validation_loss = next((loss for loss in history[::-1, 2] if not np.isnan(loss)), math.nan)
    bar = tqdm(
        total=options.steps,
        initial=step,
        desc=folder.resolve().name,
        unit="step",
        disable=not (run.progress_bar and is_main),
    )
    rows: list[tuple[float, float, float, float]] = []
    if step == 0:
        validation_loss = validate(task, module, accelerator, options)
        rows.append((0, math.nan, validation_loss, math.nan))
    stopped = False
    with bar:
        while step < last and not stopped:
            # Random numbers depend only on (seed, step, rank): resuming needs no generator state.
            torch.manual_seed(step_seed(options.seed, step, rank))
            rate = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = torch.zeros((), device=accelerator.device)
            for part in range(options.gradient_accumulation_steps):
                first = step * options.batch_size + (part * processes + rank) * local_batch
                batch = task.batch(picks(options.seed, first, local_batch, task.windows))
                inputs = {name: value.to(accelerator.device) for name, value in batch.inputs.items()}
                wait = part + 1 < options.gradient_accumulation_steps  # reduce gradients once a step
                with accelerator.no_sync(model) if wait else nullcontext():
                    part_loss = task.loss(model(**inputs), batch.targets.to(accelerator.device))
                    accelerator.backward(part_loss / options.gradient_accumulation_steps)
                loss += part_loss.detach() / options.gradient_accumulation_steps
            accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            training_loss, checked = float(accelerator.reduce(loss, "mean")), math.nan
            if not math.isfinite(training_loss):
                raise TrainingError(
                    f"the loss is {training_loss} at step {step}: try a lower train.learning_rate than "
                    f"{options.learning_rate}; the last checkpoint in {folder} is untouched"
                )
            if run.should_stop():
                accelerator.set_trigger()
            stopped = accelerator.check_trigger()  # if one process stops, all do
            if step % options.eval_every == 0 or step == options.steps:
                validation_loss = checked = validate(task, module, accelerator, options)
            rows.append((step, training_loss, checked, rate))
            if step % options.save_every == 0 or step == last or stopped:
                history, rows = np.concatenate([history, np.array(rows)]), []
                if is_main:
                    state = SavedRun(step, history, recipe.to_dict(), task.fingerprint)
                    save_checkpoint(folder, module, optimizer, state)
            bar.set_postfix(loss=f"{training_loss:.3f}", validation=f"{validation_loss:.3f}", refresh=False)
            bar.update()

    # Pictures and samples.
    shown: dict[str, Any] = {}
    if is_main and len(history):
        loss_picture(folder / "loss.png", history, task.loss_name, task.baseline)
        shown = task.finish(module.eval(), folder)
    accelerator.wait_for_everyone()
    return TrainingReport(
        folder=folder,
        step=step,
        steps=options.steps,
        training_loss=float(history[-1, 1]) if len(history) else math.nan,
        validation_loss=validation_loss,
        baseline=task.baseline,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        seconds=time.perf_counter() - started,
        shown=shown,
    )


def mixed_precision(precision: str, cpu: bool) -> str:
    """Accelerate's mixed_precision: "auto" is bfloat16 on a GPU that has it. Weights and moments are float32."""
    on_gpu = torch.cuda.is_available() and not cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if precision == "bfloat16" or (precision == "auto" and on_gpu) else "no"


def make_task(recipe: Recipe, tokenizer_json: str | None) -> TrainingTask:
    """The task of a recipe; `tokenizer_json` is the tokenizer of the run to resume, if it has one."""
    if isinstance(recipe.data, SeriesData):
        return ForecastTask(recipe.data, recipe.model, recipe.train.seed)
    return TextTask(recipe.data, recipe.model, recipe.train.seed, tokenizer_json)


def read_tokenizer(folder: Path) -> str | None:
    """The text of tokenizer.json in `folder`; None if there is none."""
    path = folder / "tokenizer.json"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def require_same_data(task: TrainingTask, accelerator: Accelerator) -> None:
    """Raises TrainingError: the processes read different texts or trained different tokenizers on them."""
    mine = torch.tensor([int(task.fingerprint[:15], 16)], device=accelerator.device)
    if len(set(accelerator.gather(mine).tolist())) > 1:
        raise TrainingError("the processes do not see the same data: give every machine the same files")


def make_optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) with weight decay for matrices only, not for biases and norms."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.beta1, options.beta2), fused=True)


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then half a cosine from `learning_rate` down to `final_learning_rate` at the last step."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - 1 - options.warmup_steps)
    drop = options.learning_rate - options.final_learning_rate
    return options.final_learning_rate + drop * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step on one process."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


@torch.no_grad()
def validate(task: TrainingTask, module: nn.Module, accelerator: Accelerator, options: TrainOptions) -> float:
    """The mean loss over the validation windows. Every process computes all of them, as they are few."""
    module.eval()
    total, count = 0.0, 0
    for batch in task.validation(options.batch_size, options.eval_batches):
        with accelerator.autocast():
            outputs = module(**{name: value.to(accelerator.device) for name, value in batch.inputs.items()})
        size = len(batch.targets)
        total += float(task.loss(outputs.float(), batch.targets.to(accelerator.device))) * size
        count += size
    module.train()
    return total / count


def prepare_folder(folder: Path, task: TrainingTask, *, fresh: bool) -> None:
    """Write the files that stay the same during a run; a fresh run first removes the files of an earlier one.

    What a run that was killed left half written is removed: one run at a time owns the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in CHECKPOINT_FILES:
            for partial in folder.glob(f".{name}.partial-*"):
                partial.unlink(missing_ok=True)
        for name in CHECKPOINT_FILES if fresh else ():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {error.strerror}; choose another --out") from error
    for name, text in task.files().items():
        write_atomically(folder / name, text.encode())
