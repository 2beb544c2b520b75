"""Fill the tables of README.md from benchmarks/results, after rows have been added there.

    python tools/readme_tables.py            # rewrites README.md
    python tools/readme_tables.py --check    # exit code 1 if a table is not what the rows say

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``. Of rows that answer
the same question the last one is shown, one from a GPU before any from a CPU. Columns in which
nothing was measured are left out. Standard library only.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, str]
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def rows_of(
    name: str,
    question: Sequence[str],
    beside: Callable[[Row], object] = lambda row: None,
    *,
    one_queue: bool = False,
) -> list[Row]:
    """The row to show for each distinct content of the columns ``question``, in file order.

    Args:
        name: of the file.
        question: columns.
        beside: what else tells questions apart.
        one_queue: with rows that were measured while all streams shared a hardware queue.
    """
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if one_queue or not _one_queue(row)]
    chosen: dict[object, Row] = {}
    for row in sorted(rows, key=lambda row: row["gpu"] != "none"):  # stable: the last one wins
        chosen[tuple(row[column] for column in question), beside(row)] = row
    return [row for row in rows if any(row is shown for shown in chosen.values())]


def _one_queue(row: Row) -> bool:
    return row["command"].startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 ")


def markdown(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """A table with the first column to the left and the others to the right."""
    cells = {heading: [cell(row) for row in rows] for heading, cell in columns.items()}
    shown = {heading: column for heading, column in cells.items() if any(column)}
    lines = [list(shown), ["---", *["---:"] * (len(shown) - 1)]]
    lines += [[cell or "-" for cell in line] for line in zip(*shown.values(), strict=True)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(rows: Sequence[Row]) -> str:
    """Where, when and by which commands the rows were measured."""
    on = dict.fromkeys(
        f"{'a CPU' if row['gpu'] == 'none' else row['gpu']} ({row['cpu_cores']} cores), "
        f"{row['date']}, commit {row['commit']}"
        for row in rows
    )
    commands = dict.fromkeys(row["command"] for row in rows)
    return f"{'; '.join(on)}: {', '.join(f'`{command}`' for command in commands)}."


def microseconds(column: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if not row[column]:
            return ""
        us = float(row[column])
        return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.1f} ms"

    return cell


def balance(column: str) -> Callable[[Row], str]:
    return lambda row: f"{float(row[column]):.4f}" if row[column] else ""


def eplb() -> str:
    rows = rows_of("eplb", ("layers", "experts", "slots", "nodes", "gpus"))

    def case(row: Row) -> str:
        hosts = f" in {row['nodes']} hosts" if row["policy"] == "hierarchical" else ""
        return f"{row['layers']} x {row['experts']} to {row['slots']} on {row['gpus']}{hosts}"

    times = {
        "layers x experts to slots on GPUs": case,
        "kernel, in a graph": microseconds("kernel_us_p50"),
        "kernel, eager": microseconds("eager_us_p50"),
        "torch, CPU": microseconds("torch_us_p50"),
        "NumPy": microseconds("numpy_us_p50"),
        "plain loops": microseconds("loops_us_p50"),
        "NumPy / kernel": lambda r: r["numpy_over_kernel"] and f"{r['numpy_over_kernel']}x",
    }
    balances = {
        "mean / maximum GPU load": case,
        "DeepSeek's plan": balance("balance_reference"),
        "same, split unevenly": balance("balance_reference_split"),
        "balanced": balance("balance_balanced"),
        "bound": balance("balance_bound"),
        "without hosts": balance("balance_global"),
        "bound without hosts": balance("balance_global_bound"),
    }
    return (
        f"{markdown(rows, times)}\n{markdown(rows, balances)}\n"
        f"*Medians, loads and maps where the planner runs; lognormal loads. On {source(rows)}*\n"
    )


def drift() -> str:
    rows = rows_of("eplb_drift", ("rebalances", "layers", "memory", "tolerance"))

    def figures(planner: str) -> Callable[[Row], str]:
        return lambda row: (
            f"{float(row[f'{planner}_moves']):.1f} ({float(row[f'{planner}_balance']):.4f})"
        )

    columns = {
        "loads forget in": lambda row: f"{float(row['memory']):g} re-balancings",
        "DeepSeek's plan": figures("reference"),
        "same, renumbered": figures("reference_renumbered"),
        "balanced": figures("balanced"),
        "share of moves": lambda row: f"{float(row['share_of_moves']):.1%}",
    }
    return (
        f"{markdown(rows, columns)}\n"
        "*Experts that move, per layer and re-balancing, and the balance that they leave, over "
        f"{rows[0]['rebalances']} re-balancings. On {source(rows)}*\n"
    )


_EP_CASES = {
    "dispatch-bf16-buffer": "dispatch BF16, left in the buffer",
    "dispatch-bf16-token": "dispatch BF16, by token",
    "dispatch-bf16-expert": "dispatch BF16, by expert",
    "dispatch-fp8-buffer": "dispatch to FP8, left in the buffer",
    "dispatch-fp8-token": "dispatch to FP8, by token",
    "dispatch-fp8-expert": "dispatch to FP8, by expert",
    "dispatch-quantised-token": "dispatch of FP8, by token",
    "combine-token": "combine BF16, by token",
    "combine-expert": "combine BF16, by expert",
}


def ep() -> str:
    """Whole calls by case, for each number of SMs and each other way to move rows; by ranks."""
    shape = ("ranks", "virtual", "tokens", "hidden", "experts", "top_k")
    rows = rows_of("ep", (*shape, "case", "transport", "num_sms"))
    rows = [row for row in rows if row["status"] == "ok" and row["virtual"] == "False"]
    # Small calls are in docs/LOG.md.
    rows = [row for row in rows if row["tokens"] == "4096"]
    ranks = sorted({row["ranks"] for row in rows}, key=int)
    return "\n".join(_ep_of([row for row in rows if row["ranks"] == number]) for number in ranks)


def _ep_of(rows: Sequence[Row]) -> str:
    found = {(row["case"], row["transport"], row["num_sms"]): row for row in rows}
    cases = [row for row in rows if row["case"] in _EP_CASES]
    cases = list({row["case"]: row for row in cases}.values())

    def time(transport: str, sms: str = "") -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            one = found.get((row["case"], transport, sms))
            return f"{float(one['us_p50']):.0f}" if one else ""

        return cell

    def sm_time(row: Row) -> str:
        one = found.get((row["case"], "nvlink", "24"))
        return f"{float(one['sm_us']) / 1000:.1f}" if one and one["sm_us"] else ""

    def share(column: str, transport: str, sms: str = "") -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            one = found.get((row["case"], transport, sms))
            return f"{float(one[column]):.1%}" if one and one[column] else ""

        return cell

    first = rows[0]
    sms = sorted({int(row["num_sms"]) for row in rows if row["num_sms"]})
    columns = {
        f"us a call, {first['ranks']} GPUs": lambda row: _EP_CASES[row["case"]],
        **{f"{n} SMs": time("nvlink", str(n)) for n in sms},
        "of a plain push, 24 SMs": share("of_push", "nvlink", "24"),
        "SM ms, 24 SMs": sm_time,
        "copy engines": time("copy_engine"),
        "of a plain copy": share("of_peer_copy", "copy_engine"),
        "NCCL": time("nccl-per-rank"),
        "NCCL, row per expert": time("nccl-per-expert"),
    }
    return (
        f"{markdown(cases, columns)}\n"
        f"*{first['ranks']} ranks of {first['tokens']} tokens x {first['hidden']}, "
        f"{first['experts']} experts, top-{first['top_k']}, random routing that is known; whole "
        "calls from Python, routing weights and quantisation included, median of "
        f"{first['rounds']} rounds of {first['calls']} calls behind one that is not counted, "
        f"slowest rank. On {source(rows)}*\n"
    )


def number(column: str, form: str = ".1f") -> Callable[[Row], str]:
    return lambda row: f"{float(row[column]):{form}}" if row[column] else ""


def percent(column: str) -> Callable[[Row], str]:
    return number(column, ".1%")


def _by(rows: Sequence[Row], *names: str) -> list[list[Row]]:
    """The rows in groups of equal values, which are numbers, smallest first."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(int(row[name]) for name in names), []).append(row)
    return [groups[key] for key in sorted(groups)]


# Older rows are of code that took longer for the same compute and would mislead beside newer ones.
_PAIRS_SINCE = "2026-11-29"


def pairs() -> str:
    """The overlapped pair, on the link as it is and throttled; by sizes.

    Other means to tell compute, graphs, and one rank, which only packs, are in docs/LOG.md.
    """
    sizes = ("ep", "experts", "layers", "tokens", "hidden", "expert_hidden", "top_k")
    shape = (*sizes, "transport", "num_sms", "sm_means", "graphs")
    rows = rows_of(
        "pipeline",
        (*shape, "part"),
        lambda row: (row["slow_link"], _one_queue(row)),
        one_queue=True,
    )
    rows = [row for row in rows if row["part"] == "pair" and row["status"] == "ok"]
    usual = {"sm_means": "yielding", "graphs": "False"}
    rows = [row for row in rows if all(row[name] == value for name, value in usual.items())]
    rows = [row for row in rows if row["ep"] != "1" and row["date"] >= _PAIRS_SINCE]
    rows.sort(
        key=lambda row: (
            _one_queue(row),
            row["transport"],
            int(row["num_sms"] or 0),
            row["slow_link"],
        )
    )
    return "\n".join(_pairs_of(group) for group in _by(rows, *sizes))


def _pairs_of(rows: Sequence[Row]) -> str:
    def transport(row: Row) -> str:
        packs = "packing on " if row["transport"] == "copy_engine" else ""
        sms = f", {packs}{row['num_sms']} SMs" if row["num_sms"] else ""
        slow = _SLOW_LINKS[row["slow_link"]].format(float(row["repeats"]))
        queue = ", one hardware queue" if _one_queue(row) else ""
        return f"{row['transport']}{sms}{slow}{queue}"

    first = rows[0]
    columns = {
        f"ms; {first['ep']} ranks, {first['experts']} experts, {first['layers']} layers": transport,
        "compute alone": number("compute_ms"),
        "communication alone": number("comm_ms"),
        "serial": number("serial_ms_p50"),
        "pair": number("pair_ms_p50"),
        "serial / pair": number("speed_up", ".2f"),
        "pair / longer one": number("pair_over_longer", ".3f"),
        "hidden": percent("hidden_share"),
        "busy / span": number("busy_over_span", ".2f"),
    }
    return (
        f"{markdown(rows, columns)}\n"
        f"*{first['tokens']} tokens a rank x {first['hidden']}, experts of width "
        f"{first['expert_hidden']}, top-{first['top_k']}; medians, slowest rank. On "
        f"{source(rows)}*\n"
    )


def steps() -> str:
    """Whole steps under each schedule, as stages of one host send by default; by ranks."""
    sizes = ("pp", "ep", "layers", "num_chunks", "tokens", "hidden", "experts")
    rows = rows_of("pipeline", (*sizes, "stage_transport", "part", "schedule"))
    rows = [row for row in rows if row["part"] == "step" and row["status"] == "ok"]
    rows = [row for row in rows if row["stage_transport"] == "copy_engine"]
    return "\n".join(_steps_of(group) for group in _by(rows, *sizes))


def _steps_of(rows: Sequence[Row]) -> str:
    first = rows[0]
    columns = {
        f"schedule, {first['pp']} x {first['ep']} ranks": lambda row: row["schedule"],
        "ms a step": number("step_ms_p50"),
        "tokens/s": number("tokens_per_s", ",.0f"),
        "MFU": percent("mfu"),
        "bubble": percent("bubble"),
        "bubble simulated": percent("predicted_bubble"),
        "ms simulated": number("predicted_span_ms"),
        "ms to its last action": number("span_ms"),
    }
    return (
        f"{markdown(rows, columns)}\n"
        f"*{first['pp']} pipeline x {first['ep']} expert-parallel ranks of {first['layers']} "
        f"layers, from stage to stage by copy engine, {first['num_chunks']} micro-batches of "
        f"{first['tokens']} tokens x {first['hidden']}, {first['experts']} experts; the simulator "
        f"is given the medians of the actions' times. On {source(rows)}*\n"
    )


def memory() -> str:
    """What each memory level saves and costs; by ranks."""
    sizes = ("ranks", "layers", "tokens", "hidden", "experts")
    rows = rows_of("memory", (*sizes, "memory_level"))
    return "\n".join(_memory_of(group) for group in _by(rows, *sizes))


def _memory_of(rows: Sequence[Row]) -> str:
    first = rows[0]
    gpus = "one GPU" if first["ranks"] == "1" else f"{first['ranks']} GPUs"
    columns = {
        f"memory level, {gpus}": lambda row: row["memory_level"],
        "MiB kept": number("kept_mib", ",.0f"),
        "of level 0": percent("kept_over_level_0"),
        "MiB at the peak": number("peak_mib", ",.0f"),
        "peak of level 0": percent("peak_over_level_0"),
        "ms": number("step_ms_p50"),
        "time of level 0": percent("step_over_level_0"),
        "largest error of a gradient": percent("gradient_error_max"),
    }
    return (
        f"{markdown(rows, columns)}\n"
        f"*Of a micro-batch of {first['tokens']} tokens through {first['layers']} layers with "
        f"{first['experts']} experts on {gpus}, {first['in_flight']} in flight. On "
        f"{source(rows)}*\n"
    )


def megatron() -> str:
    """Megatron's dispatchers; by ranks."""
    sizes = ("ranks", "tokens", "hidden", "experts", "top_k")
    rows = rows_of("megatron", (*sizes, "dispatcher", "transport", "num_sms"))
    return "\n".join(_megatron_of(group) for group in _by(rows, *sizes))


def _megatron_of(rows: Sequence[Row]) -> str:
    first = rows[0]

    def dispatcher(row: Row) -> str:
        if not row["transport"]:
            return f"{row['dispatcher']}, NCCL"
        sms = "copy engines" if row["num_sms"] == "0" else f"{row['num_sms']} SMs"
        return f"{row['dispatcher']}, {row['transport']}: {sms}"

    columns = {
        f"Megatron's dispatcher, {first['ranks']} GPUs": dispatcher,
        "us forward": number("forward_us_p50", ",.0f"),
        "us forward and backward": number("both_us_p50", ",.0f"),
        "MiB at the peak": number("peak_mib", ",.0f"),
    }
    return (
        f"{markdown(rows, columns)}\n"
        f"*All that a layer does around its experts; {first['tokens']} tokens a rank x "
        f"{first['hidden']}, {first['experts']} experts, top-{first['top_k']}, BF16, Megatron-Core "
        f"{first['megatron_core']} without Transformer Engine; medians, slowest rank; "
        "communication memory is not in the peak. On "
        f"{source(rows)}*\n"
    )


def decode() -> str:
    """Steps of a decoder; by ranks."""
    sizes = ("ranks", "hidden", "experts", "top_k")
    rows = rows_of("decode", (*sizes, "tokens", "layout", "transport", "num_sms"))
    return "\n".join(_decode_of(group) for group in _by(rows, *sizes))


def _decode_of(rows: Sequence[Row]) -> str:
    """With as many SMs as there are rows of; a step and, in brackets, its two parts."""
    first = rows[0]
    most = max((row["num_sms"] for row in rows), key=int)
    steps = {
        (row["tokens"], row["layout"], row["transport"]): row
        for row in rows
        if row["num_sms"] == most
    }

    def times(transport: str) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            found = steps.get((row["tokens"], row["layout"], transport))
            if found is None:
                return ""
            parts = [f"{float(found[f'{part}_us_p50']):.1f}" for part in ("dispatch", "combine")]
            return f"{float(found['step_us_p50']):.1f} ({' + '.join(parts)})"

        return cell

    layouts = {"groups": "in groups, weights late"}
    columns = {
        f"us a step, {first['ranks']} GPUs": lambda row: (
            f"{row['tokens']} tokens, {layouts.get(row['layout'], 'by ' + row['layout'])}"
        ),
        **{name: times(name) for name in dict.fromkeys(row["transport"] for row in rows)},
    }
    leading = [row for row in steps.values() if row["transport"] == first["transport"]]
    return (
        f"{markdown(leading, columns)}\n"
        f"*A step in a CUDA graph (routing and dispatch to FP8 + combine BF16), on {most} SMs; "
        f"tokens of a rank x {first['hidden']}, {first['experts']} experts, "
        f"top-{first['top_k']}, random routing; {first['calls']} steps in a graph, medians, "
        f"slowest rank. On {source(rows)}*\n"
    )


_SLOW_LINKS = {
    "": "",
    "calls": ", every call {:.0f} times",
    "peer": ", slow link: {:.0f} copies over it",
    "host": ", slow link: {:.0f} copies, all but one to the host",
}
TABLES = {
    "ep": ep,
    "eplb": eplb,
    "drift": drift,
    "pairs": pairs,
    "steps": steps,
    "memory": memory,
    "megatron": megatron,
    "decode": decode,
}


def filled(readme: str) -> str:
    """``readme`` with every table made anew."""
    return _MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}{m[3]}", readme)


def main(arguments: Sequence[str]) -> int:
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if list(arguments) == ["--check"]:
        if after != before:
            print("README.md: run python tools/readme_tables.py", file=sys.stderr)
        return int(after != before)
    if arguments:
        print(f"expected --check or nothing, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
