"""The READMEs' tables, each from one benchmark's result."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

PLAIN = ("eager", "compile", "layernorm")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(result: dict[str, Any]) -> str:
    """Where a table's numbers come from, in one line."""
    return f"{result['device']}; torch {result['torch']}; commit {result['commit']}; `{result['command']}`"


def percent(rate: float | None) -> str:
    """A rate in [0, 1] as a percentage."""
    return "-" if rate is None else f"{100 * rate:.0f}%"


def demo_table(result: dict[str, Any]) -> str:
    """What the embedded demo learned and how long it took."""
    total = sum(result["seconds_by_part"].values())
    split = ", ".join(f"{part} {100 * s / total:.1f}%" for part, s in result["seconds_by_part"].items())
    loss, score = result["val_loss"], result["score"]
    facts = table(
        ("measured", "value"),
        (
            ("training", f"{result['steps']} steps in {result['training_seconds']:.0f} s"),
            ("speed", f"{result['images_per_s']:.0f} images/s"),
            ("where the time goes", split),
            ("validation loss", f"{loss[0]:.4f} to {loss[1]:.4f} ({loss[1] / loss[0]:.3f} of the first)"),
        ),
    )
    splits = list(score)
    head = ("pictures that show what was asked", *(s.replace("-", " ") for s in splits))
    rows = [
        [
            f"single object: {key}",
            *(f"{percent(score[s]['single'][key])} of {score[s]['single']['count']}" for s in splits),
        ]
        for key in ("color", "shape")
    ]
    for skill in dict.fromkeys(skill for s in splits for skill in score[s]["skills"]):
        cells = (score[s]["skills"].get(skill, {"count": 0}) for s in splits)
        rows.append([skill, *(f"{percent(c['passed'])} of {c['count']}" if c["count"] else "-" for c in cells)])
    return f"{facts}\n\n{table(head, rows)}\n\n{source(result)}"


def by_shape(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Rows grouped: (op, shape) -> contender -> figures."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in result["results"]:
        if match := re.search(r"\[(.*)\]", row["name"]):
            shape = "-".join(part for part in match[1].split("-") if part not in {row["contender"], ""})
            groups[row["op"], shape][row["contender"]] = row
    return groups


def kernel_table(result: dict[str, Any]) -> str:
    """Our time, rate and share of the copy bandwidth beside plain torch's time.

    "ahead of the best" is over those that start from hidden as ours does; the gradient from a normalised copy of hidden
    that plain torch kept from its forward pass (`saved`) has a column of its own.
    """
    rows = []
    for (op, shape), contenders in by_shape(result).items():
        ours = [name for name in ("triton", "native") if name in contenders]  # both on Hopper
        ours = ours or [name for name in ("flash", "torch", "sdpa") if name in contenders][:1]
        others = {name: contenders[name]["ms"] for name in PLAIN if name in contenders}
        best = min(others, key=others.__getitem__, default=None)
        for name in ours:
            mine = contenders[name]
            over = mine.get("peak_percent")
            rows.append(
                (
                    op.replace("_", " "),
                    shape,
                    f"{mine['ms']:.2f} ({name})",
                    f"{mine['gb_per_s']:.1f}",
                    f"{mine['percent_of_copy']:.0f}%",
                    " / ".join(f"{others[name]:.1f}" if name in others else "-" for name in PLAIN),
                    f"{contenders['saved']['ms']:.1f}" if "saved" in contenders else "-",
                    f"{others[best] / mine['ms']:.1f} x ({best})" if best else "-",
                    "-" if over is None else f"{over:.2f}%",
                )
            )
    head = (
        "op",
        "shape",
        "ours, ms",
        "GB/s",
        "of copy",
        " / ".join(PLAIN) + ", ms",
        "plain, xhat kept, ms",
        "ahead of the best from hidden",
        "peak memory",
    )
    dispatch = [
        (f"`route` of a {row['contender']}", f"{row['us']:.1f}", f"{row['bare_us']:.1f}", f"{row['over_us']:.1f}")
        for row in result["results"]
        if row["op"] == "dispatch"
    ]
    tables = [table(head, rows)]
    if dispatch:
        tables.append(table(("a call on a tiny input", "us", "bare kernel, us", "over it, us"), dispatch))
    return "\n\n".join([*tables, source(result)])


def over(row: dict[str, Any]) -> str:
    """A ratio as a difference in percent, with its quartiles."""
    low, high = (100 * (q - 1) for q in row["over_base_quartiles"])
    return f"{100 * (row['over_base'] - 1):+.1f}% ({low:+.1f} to {high:+.1f})"


def counted_table(result: dict[str, Any]) -> str:
    """Table 4's counts at full size: the paper's numbers, ours by its accounting, and what our code computes."""
    rows = []
    for strategy, (parameters, tflop, _) in result["paper"].items():
        mine = result["full_size"].get(strategy)
        if mine is None:
            continue
        ours = {int(n): sum(parts) / 1e12 for n, parts in mine["flops"].items()}
        base = {int(n): sum(parts) / 1e12 for n, parts in result["full_size"]["b1"]["flops"].items()}
        rows.append(
            (
                strategy,
                f"{parameters} / {mine['parameters'] / 1e6:.1f}",
                f"{tflop} / {mine['paper_flops'] / 1e12:.1f}",
                *(f"{ours[n]:.1f} ({100 * (ours[n] / base[n] - 1):+.2f}%)" for n in ours),
            )
        )
    lengths = result["full_size"]["b1"]["flops"]
    ours = (f"TFLOP, our code, {n}-token prompt (over b1)" for n in lengths)
    return table(("strategy", "parameters, M: paper / ours", "TFLOP, its accounting: paper / ours", *ours), rows)


def overhead_table(result: dict[str, Any]) -> str:
    """Measured latency of every strategy over b1."""
    lengths = list(dict.fromkeys(row["tokens"] for row in result["rows"]))
    by = {(row["strategy"], row["tokens"]): row for row in result["rows"]}
    rows = []
    for strategy in dict.fromkeys(row["strategy"] for row in result["rows"]):
        paper = result["paper"][strategy][2] / result["paper"]["b1"][2]
        cells = []
        for n in lengths:
            row, base = by[strategy, n], by.get(("b1", n))
            counted = f"; {100 * (row['flops'] / base['flops'] - 1):+.1f}%" if base else ""
            cells.append(f"{row['seconds'] * 1e3:.0f} ms, {over(row)}{counted}")
        peaks = [by[strategy, n]["peak_bytes"] for n in lengths]
        cells += ["-" if peaks[-1] is None else f"{peaks[-1] / 2**20:.0f} MiB"]
        rows.append((strategy, *cells, f"{100 * (paper - 1):+.1f}%"))
    head = (
        "strategy",
        *(f"{n}-token prompt, over b1 (quartiles); by the FLOPs" for n in lengths),
        "peak memory",
        "the paper, over b1",
    )
    return f"{table(head, rows)}\n\n{overhead_note(result)}"


def factor_table(result: dict[str, Any]) -> str:
    """How much faster than the plain path, factor by factor, with what the FLOPs say."""
    rows = []
    for strategy in dict.fromkeys(row["strategy"] for row in result["factors"]):
        mine = [row for row in result["factors"] if row["strategy"] == strategy]
        plain = mine[0]
        cells = (f"{1 / r['over_base']:.2f} ({plain['flops'] / r['flops']:.2f})" for r in mine[1:])
        rows.append((strategy, f"{plain['seconds'] * 1e3:.0f} ms", *cells))
    names = [f"+ {row['factor']}" for row in result["factors"] if row["strategy"] == rows[0][0]][1:] if rows else []
    first = result["factors"][0]
    lead = (
        f"Times as fast as the plain path, each factor added to those before it, measured and (by the FLOPs); "
        f"{first['tokens']}-token prompt, padded to {first['padded_to']} there:"
    )
    return f"{lead}\n\n{table(('strategy', 'plain', *names), rows)}"


def overhead_note(result: dict[str, Any]) -> str:
    """What was drawn, on what."""
    compiled = ", compiled blocks" if result.get("compiled") else ""
    size = f"{result['setting']} size"
    if result["setting"] == "reduced":
        size += " (a quarter of the widths, the depth and both kinds of tokens: image to text stays 1024 to 128 or 512)"
    return f"{size}, {result['image_tokens']} image tokens, {result['steps']} steps{compiled}; {source(result)}"


def throughput_table(result: dict[str, Any]) -> str:
    """A training step of every strategy, and by the plain path."""
    base = next((row["seconds"] for row in result["rows"] if row["strategy"] == "b1" and row["path"] == "ours"), None)
    rows = []
    for row in result["rows"]:
        split = row["seconds_by_part"]
        ratio = "-" if base is None else f"{row['seconds'] / base:.2f}"
        mfu = "-" if row["mfu"] is None else f"{percent(row['mfu'])} / {percent(row['mfu_dit'])}"
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        rows.append(
            (
                row["strategy"],
                row["path"],
                f"{row['seconds'] * 1e3:.0f} ({ratio})",
                f"{row['images_per_s']:.2f}",
                f"{row['text_tokens_per_s']:.0f}",
                " / ".join(f"{split[part] * 1e3:.0f}" for part in split),
                f"{row['tflop_per_s']:.2f}",
                mfu,
                peak,
            )
        )
    parts = " / ".join(result["rows"][0]["seconds_by_part"])
    head = (
        "strategy", "path", "step, ms (over b1)", "images/s", "text tokens/s", f"{parts}, ms", "TFLOP/s",
        "MFU: step / DiT", "peak memory",
    )  # fmt: skip
    note = (
        f"{result['setting']} size, {result['world']} rank(s) x {result['micro_batch']} pictures, "
        f"{result['tokens']}-token captions (plain pads to {result['padded_to']}), ZeRO {result['zero']}"
    )
    return f"{table(head, rows)}\n\n{note}; {source(result)}"


def projection_table(result: dict[str, Any]) -> str:
    """What a GPU should need, and how it was reckoned."""
    rows, base = result["rows"], result["rows"][0]

    def cell(value: float, one: float) -> str:
        return f"{value * 1e3:.0f} ms ({100 * (value / one - 1):+.1f}%)"

    cells = [
        (
            row["strategy"],
            *(cell(seconds, base["picture"][n]) for n, seconds in row["picture"].items()),
            "-"
            if row["picture_plain"] is None
            else f"{row['picture_plain'] / next(iter(row['picture'].values())):.2f}",
            cell(row["step"], base["step"]),
            "-" if row["step_plain"] is None else f"{row['step_plain'] / row['step']:.2f}",
        )
        for row in rows
    ]
    training = result["training"]
    head = (
        "strategy", *(f"picture, {n}-token prompt (over b1)" for n in base["picture"]), "plain path, times as long",
        "training step (over b1)", "plain path, times as long",
    )  # fmt: skip
    note = (
        f"Not measured: FLOPs over {percent(result['shares'][0])} of {result['peak'] / 1e12:.1f} TFLOP/s, and "
        f"routing's bytes over {percent(result['shares'][1])} of {result['copy'] / 1e12:.1f} TB/s. A picture: 512x512, "
        f"50 steps, guided; the plain path pads to 512 tokens and is set against the 128-token prompt. A training "
        f"step: {training['micro_batch']} pictures of 256x256, {training['caption']}-token captions, the LLM included; "
        f"`{result['command']}`"
    )
    return f"{table(head, cells)}\n\n{note}"


def checkpoint_table(result: dict[str, Any]) -> str:
    """Seconds a gigabyte of saving and loading, beside a plain copy."""
    cost = result["seconds_per_gb"]
    parts = " / ".join(f"{cost[part]:.2f}" for part in ("gather", "write", "flush", "hash"))
    low, high = result["save_over_copy_quartiles"]
    cells = (
        f"{cost['copy']:.2f}",
        f"{cost['save']:.2f} ({result['save_over_copy']:.2f} of the copy, {low:.2f} to {high:.2f})",
        parts,
        f"{cost['held']:.2f}",
        f"{cost['verify']:.2f} + {cost['load']:.2f}",
    )
    head = (
        "plain copy, flushed: s/GB",
        "save: s/GB (quartiles)",
        "gather / write / flush / hash",
        "of it with `--async_save true`",
        "verify + load: s/GB",
    )
    note = f"{result['bytes'] / 1e9:.2f} GB, ZeRO {result['zero']}, medians of {result['rounds']} rounds"
    if demo := result["demo"]:
        note += (
            f"; hashing the demo's {demo['checkpoints']} checkpoints takes {demo['hash_seconds']:.2f} s, "
            f"{100 * demo['share']:.2f}% of its training"
        )
    return f"{table(head, [cells])}\n\n{note}; {source(result)}"


def prepare_table(result: dict[str, Any]) -> str:
    """What came out of preparing a corpus under kills, how fast, and the memory at two sizes."""
    rows = []
    for row in result["rows"]:
        kills = ", ".join(map(str, row["killed_at_units"]))
        rows.append(
            (
                f"{row['samples']:,}",
                f"after {kills} of {row['tars']} tars" if kills else "none",
                " + ".join(f"{count:,} {folder}" for folder, count in row["kept"].items()),
                ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in row["skipped"].items()),
                f"{row['samples_per_s']:.0f}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
                f"{row['last_third_peak_bytes'] / 2**20:.0f} MiB",
            )
        )
    head = ("samples", "kill -9", "kept, each read back", "left out, as planned", "samples/s", "peak memory",
            "in the last third")  # fmt: skip
    note = (
        f"{result['side']}x{result['side']} JPEG in tars to {result['size']}x{result['size']}, {result['workers']}"
        " workers; memory of all processes, shared pages once"
    )
    return f"{table(head, rows)}\n\n{note}; {source(result)}"
