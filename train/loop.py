"""The training loop: features, noised latents, velocity loss, DeepSpeed step; validation, checkpoints, the end."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from sr_model import DiT
from sr_model.flops import forward as forward_flops
from sr_model.flow import interpolate, logit_normal_times, velocity
from train import checkpoint
from train.assemble import Parts, assemble
from train.config import Config, ConfigError
from train.data import lost_worker
from train.disk import alone, replace_text
from train.distributed import Ranks, peak_flops, start
from train.draws import draw
from train.evaluate import Evaluator, fusion_row, score_table
from train.guards import PREEMPTED, Guard, NonFiniteSteps, Watchdog, skip_step
from train.latents import latent_shape, to_latents
from train.pictures import loss_curve, sample_grid
from train.runlog import PARTS, Clock, RunLog

PATIENCE = 1800.0  # seconds a collective call waits at least: the others may draw, score or export meanwhile


@dataclass(frozen=True)
class Step:
    """One optimiser step: the mean loss over all ranks; text tokens and FLOPs of this rank.

    flops: of DiT and conditioner, forward and backward without recomputation, real tokens only.
    applied: whether the weights changed; a step that is not finite on some rank changes nothing on any.
    """

    loss: float
    tokens: int
    flops: int
    applied: bool = True


def training_step(parts: Parts, step: int, batches: Any, clock: Clock, guard: Guard) -> Step:
    """One optimiser step over its micro-batches.

    Raises: NonFiniteSteps on all ranks together.
    """
    config, ranks, engine = parts.config, parts.ranks, parts.engine
    micro_steps = engine.gradient_accumulation_steps()
    losses, tokens, flops, applied, dit = [], 0, 0, True, engine.module
    for micro_step in range(micro_steps):
        with clock.part("data"):
            images, columns = next(batches)
        first = micro_step * ranks.world * len(columns)  # a global batch deals its samples to the ranks in turn
        with clock.part("vae"):
            draws = draw(
                config.seed,
                step,
                range(first + ranks.rank, first + ranks.world * len(columns), ranks.world),
                latent_shape(parts.codec, images),
                posterior=parts.codec.stochastic,
            )
            data = to_latents(parts.codec, images.to(ranks.device, non_blocking=True), draws.posterior)
        with clock.part("llm"):
            captions = draws.captions(columns, list(config.data.captions.values()))
            drop = draws.dropped(config.flow.prompt_drop)
            text = parts.encoder.encode(["" if d else c for d, c in zip(drop, captions, strict=True)])
            tokens += text.cu_seqlens_host[-1]
        with clock.part("forward"):
            noise = draws.noise.to(ranks.device)
            t = logit_normal_times(draws.normal, config.flow.shift, config.flow.logit_mean, config.flow.logit_std)
            t = t.to(ranks.device)
            v = engine(interpolate(data, noise, t).to(parts.dtype), t, text)
            loss = (v.float() - velocity(data, noise)).square().mean()
            image_tokens = data[0, 0].numel() // dit.config.patch_size**2
            flops += 3 * forward_flops(dit, image_tokens, text.lengths).total
            losses.append(loss.detach())
            guard.look_at(losses[-1])
        with clock.part("backward"):
            engine.backward(loss)
        with clock.part("optimizer"):
            if micro_step < micro_steps - 1:
                engine.step()  # only counts the micro-step
            elif applied := guard.verdict(step + 1):
                engine.step()
                parts.ema.update()
            else:
                skip_step(engine)
    mean = torch.stack(losses).mean()
    if ranks.world > 1:
        torch.distributed.all_reduce(mean)
        mean /= ranks.world
    return Step(mean.item(), tokens, flops, applied)


def train(config: Config) -> int:
    """Run the training program; 0 when it finished or was stopped where asked, PREEMPTED when a signal stopped it.

    Raises: ConfigError for a setting that cannot be used, NonFiniteSteps, CheckpointError; DataError on some rank.
    """
    stall = config.guard.stall_seconds
    ranks = start(max(2 * stall, PATIENCE) if stall else 0)  # the watchdog speaks first: it knows more
    with Watchdog(config.guard.stall_seconds, ranks) as watchdog:
        try:
            return run(config, ranks, watchdog)
        except RuntimeError as error:
            raise lost_worker(error) or error from error.__cause__


def run(config: Config, ranks: Ranks, watchdog: Watchdog) -> int:
    """`train` on the ranks that were started."""
    folder = config.folder
    found = checkpoint.find(folder / "checkpoints", ranks)
    if found is not None and not config.resume:
        raise ConfigError(
            f"out: {folder} holds a run already; give another --out, or drop --resume false to continue it"
        )
    summary = folder / "summary.json"
    if summary.is_file() and found is not None and same_run(config, folder):
        if ranks.first:
            print(f"This run finished before; reusing {folder}. Give another --out, or delete it, to train again.")
            print_summary(json.loads(summary.read_text()))
        return 0

    if found is not None:
        check_same_model(config, found)
    parts, evaluator = assemble(config, ranks)
    lock = alone(folder / ".lock", ConfigError(f"out: another process trains in {folder}; give another --out"))
    with contextlib.ExitStack() as held:
        ranks.together(lambda: held.enter_context(lock) if ranks.first else None)
        return run_steps(config, parts, evaluator, watchdog, found)


def run_steps(config: Config, parts: Parts, evaluator: Evaluator, watchdog: Watchdog, found: Path | None) -> int:
    """The steps after the checkpoint `found`, or all, and what is done between and after them; an exit code."""
    ranks, folder, checkpoints = parts.ranks, config.folder, config.folder / "checkpoints"
    target = min(config.steps, config.stop_at or config.steps)

    step = 0
    first_losses: dict[str, float] = {}
    if found is not None:
        state = checkpoint.load(found, parts.engine, parts.ema)
        step, first_losses = state["step"], state["first"]
        parts.loader.load_state_dict(state["loader"])
        ranks.say(f"resume     {found}, step {step}")
    if ranks.first:
        replace_text(folder / "config.yaml", config.to_yaml())
    log = RunLog(folder, ranks.first, config.steps, step)
    guard = Guard(config.guard, parts.engine, ranks)
    guard.skipped = 0 if found is None else state.get("skipped", 0)
    guard.listen()
    clock = Clock(ranks.device, watchdog.at)
    batches = iter(parts.loader)
    if step == 0:
        losses = evaluator.validate(evaluator.model(parts.ema))
        first_losses = {"val_loss": losses["val_loss"]}
        log.write({"step": 0, **losses})
        log.say(f"step 0     validation loss {losses['val_loss']:.4f}")
    since, window, began, trained = step, [], time.perf_counter(), step
    spent = dict.fromkeys(PARTS, 0.0)
    seconds, paused = 0.0, 0.0  # of training; of validations and checkpoints since `began`
    saving: checkpoint.BackgroundSave | None = None

    def finish_saving() -> None:
        nonlocal saving
        if saving is not None:
            watchdog.at("checkpoint")
            log.say(f"step {saving.step}  checkpoint {saving.finish()}")
            saving = None

    while step < target and not guard.stopping:
        watchdog.at("data", step + 1)
        guard.saving = saving is not None and saving.busy
        try:
            taken = training_step(parts, step, batches, clock, guard)
        except NonFiniteSteps:  # on all ranks: what they were writing can still become whole
            finish_saving()
            raise
        step += 1
        window.append(taken)
        watch(log, step, taken, guard)
        if taken.applied:
            first_losses.setdefault("loss", taken.loss)
        log.advance(step)
        target = step if guard.stopping else target  # a signal: what is done at the end is done now
        if step % config.log_every == 0 or step == target:
            elapsed = time.perf_counter() - began - paused
            split = clock.read()
            seconds += elapsed
            spent = {part: spent[part] + split[part] for part in PARTS}
            report(log, parts, step, window, elapsed, split, config.batch_size * (step - since), guard.skipped)
            since, window, paused = step, [], 0.0
            began = time.perf_counter()
        at_end, pause = step == target, time.perf_counter()
        if ((config.eval.every and step % config.eval.every == 0) or at_end) and not guard.stopping:
            watchdog.at("")
            model = evaluator.model(parts.ema)
            losses = evaluator.validate(model)
            log.write({"step": step, **losses, **fusion_row(model)})
            log.say(f"step {step}  validation loss {losses['val_loss']:.4f} (with averaged weights)")
            if ranks.first and not at_end:
                draw_grid(evaluator, model, folder / "samples" / f"step-{step:07d}.png", log, step)
            del model  # training needs its memory
            ranks.barrier()
        save_now = step % config.checkpoint_every == 0 or at_end
        if save_now or not guard.saving:
            finish_saving()
        if save_now:
            watchdog.at("checkpoint")
            extra = {"config": asdict(config), "loader": parts.loader.state_dict(), "first": first_losses,
                     "skipped": guard.skipped}  # fmt: skip
            what = (checkpoints, step, parts.engine, parts.ema, ranks, extra)
            if config.async_save and not at_end:
                saving = checkpoint.BackgroundSave(*what, config.keep_checkpoints, config.keep_every)
            else:
                path = checkpoint.save(*what, config.keep_checkpoints, config.keep_every)
                log.say(f"step {step}  checkpoint {path}")
        paused += time.perf_counter() - pause
    watchdog.at("")
    if guard.stopping:
        ranks.say(
            f"stopped by a signal at step {step} of {config.steps}; the same command continues (exit code {PREEMPTED})"
        )
    elif target < config.steps:
        ranks.say(f"stopped at step {step} of {config.steps}; the same command without --stop_at continues")
    else:
        finish(evaluator, parts, log, step - trained, seconds, spent, first_losses)
    guard.close()
    log.close()
    parts.loader.close()
    ranks.barrier()  # a rank that leaves early would look like one that died
    return PREEMPTED if guard.stopping else 0


def watch(log: RunLog, step: int, taken: Step, guard: Guard) -> None:
    """Say what is odd about a step."""
    if not taken.applied:
        log.write({"step": step, "skipped": guard.skipped})
        log.say(
            f"step {step}  skipped: loss or gradient is not finite ({guard.in_a_row} in a row, {guard.skipped} in all)"
        )
    elif (height := guard.spike(taken.loss)) is not None:
        log.write({"step": step, "spike": height})
        log.say(f"step {step}  loss {taken.loss:.4f} is {height:.0f} deviations above the median of the last 100")


def report(
    log: RunLog, parts: Parts, step: int, window: list[Step], elapsed: float, split: dict[str, float],
    samples: int, skipped: int,
) -> None:  # fmt: skip
    """The progress line and the row of the last `window` steps; the loss is of those that were applied."""
    config = parts.config
    applied = [taken.loss for taken in window if taken.applied]
    if not applied:
        return
    loss = math.fsum(applied) / len(applied)
    rate = samples / elapsed
    left = (config.steps - step) * elapsed / len(window)
    norm = parts.engine.get_global_grad_norm()
    achieved, peak = sum(taken.flops for taken in window) / elapsed, peak_flops(parts.ranks.device)
    own = split["forward"] + split["backward"]  # the DiT's time
    row = {
        "step": step,
        "loss": loss,
        "lr": parts.engine.get_lr()[0],
        "grad_norm": float(norm) if norm is not None else None,
        "images_per_s": rate,
        "text_tokens_per_image": sum(taken.tokens for taken in window) * parts.ranks.world / samples,
        "skipped_steps": skipped,
        "truncated_captions": parts.encoder.truncated,
        "encoded_captions": parts.encoder.encoded,
        **{f"seconds_{part}": seconds / len(window) for part, seconds in split.items()},
        "tflop_per_s": achieved / 1e12,  # of this rank; DiT and conditioner
        "llm_tflop_total": parts.encoder.flops / 1e12,
        **({} if peak is None else {"mfu": achieved / peak, "mfu_dit": achieved / peak * elapsed / own}),
    }
    log.write(row)
    cut = f", {parts.encoder.truncated} captions cut" if parts.encoder.truncated else ""
    cut += f", {skipped} steps skipped" if skipped else ""
    mfu = "" if peak is None else f"MFU {100 * achieved / peak:.1f}%  "
    log.say(
        f"step {step}/{config.steps}  loss {loss:.4f}  {rate:.1f} images/s  {mfu}ETA {left / 60:.1f} min  "
        f"data wait {100 * split['data'] / elapsed:.1f}%  llm {100 * split['llm'] / elapsed:.0f}%{cut}"
    )


def draw_grid(evaluator: Evaluator, model: DiT, path: Path, log: RunLog, step: int) -> None:
    """The same prompts, drawn from the same noise, as a PNG."""
    from train.evaluate import interleave

    captions = [p.caption for p in interleave(evaluator.prompts)[: evaluator.config.eval.grid]]
    path.parent.mkdir(parents=True, exist_ok=True)
    sample_grid(evaluator.sample(model, captions), captions, path)
    log.picture(path, step)
    log.say(f"step {step}  pictures {path}")


def finish(
    evaluator: Evaluator, parts: Parts, log: RunLog, steps: int, seconds: float, spent: dict[str, float],
    first: dict[str, float],
) -> None:  # fmt: skip
    """Pictures, score, pipeline and summary of a finished run."""
    config, folder = parts.config, parts.config.folder
    model = evaluator.model(parts.ema)
    if not parts.ranks.first:
        parts.ranks.barrier()
        return
    draw_grid(evaluator, model, folder / "samples.png", log, config.steps)
    rows = log.rows()
    loss_curve(rows, folder / "loss.png")
    score = evaluator.score(model)
    if config.export:
        evaluator.pipeline(model).save_pretrained(folder / "pipeline")
    last = {key: next((row[key] for row in reversed(rows) if key in row), math.nan) for key in ("loss", "val_loss")}
    summary = {
        "strategy": config.strategy,
        "steps": config.steps,
        "loss": [first.get("loss", math.nan), last["loss"]],
        "val_loss": [first["val_loss"], last["val_loss"]],
        "images_per_s": steps * config.batch_size / seconds if steps else None,
        "training_seconds": seconds,
        "seconds_by_part": spent,
        "captions_encoded": parts.encoder.encoded,
        "captions_cut": parts.encoder.truncated,
        "score": score,
        "files": {
            "pictures": str(folder / "samples.png"),
            "loss curve": str(folder / "loss.png"),
            "metrics": str(folder / "metrics.jsonl"),
            "checkpoints": str(folder / "checkpoints"),
            **({"pipeline": str(folder / "pipeline")} if config.export else {}),
        },
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print_summary(summary)
    parts.ranks.barrier()


def same_run(config: Config, folder: Path) -> bool:
    """Whether the folder's saved configuration is this one, wherever either was told to stop."""
    saved = folder / "config.yaml"
    if not saved.is_file():
        return False
    then, now = (yaml.safe_load(text) for text in (saved.read_text(), config.to_yaml()))
    return {**then, "stop_at": None} == {**now, "stop_at": None}


def check_same_model(config: Config, found: Path) -> None:
    """Raises: ConfigError when the checkpoint is of another model, LLM or latent space than this configuration."""
    saved, mine = json.loads((found / checkpoint.STATE).read_text())["config"], asdict(config)
    for section, name in (("", "strategy"), ("", "model"), ("text", "llm"), ("data", "vae")):
        then, now = ((plain[section] if section else plain)[name] for plain in (saved, mine))
        if then != now:
            label = f"{section}.{name}".lstrip(".")
            raise ConfigError(f"{label}: the run in {config.folder} has {then}, got {now}; give another --out")


def print_summary(summary: dict[str, Any]) -> None:
    """The closing lines."""
    total = sum(summary["seconds_by_part"].values()) or 1.0
    print(f"\n{summary['strategy']}: {summary['steps']} steps")
    print(f"  training loss    {summary['loss'][0]:.4f} -> {summary['loss'][1]:.4f}")
    ratio = summary["val_loss"][1] / summary["val_loss"][0]
    print(f"  validation loss  {summary['val_loss'][0]:.4f} -> {summary['val_loss'][1]:.4f} (x {ratio:.3f})")
    if summary["images_per_s"]:
        parts = ", ".join(f"{part} {100 * s / total:.1f}%" for part, s in summary["seconds_by_part"].items())
        print(
            f"  training         {summary['training_seconds']:.0f} s, {summary['images_per_s']:.1f} images/s ({parts})"
        )
    if summary["score"]:
        print("\n".join("  " + line for line in score_table(summary["score"])))
    for name, path in summary["files"].items():
        print(f"  {name:<16} {path}")
    if "pipeline" in summary["files"]:
        print(f'  draw your own    python -m sr_model.sample {summary["files"]["pipeline"]} "a red circle"')
