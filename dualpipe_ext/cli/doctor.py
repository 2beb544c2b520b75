"""``dualpipe doctor``: what this machine can do, which transports would be used, what to install.

Works everywhere: without a GPU, a driver, the compiled core, a CUDA build of torch, or torch.
:func:`collect` gathers plain data (what ``--json`` prints), :func:`render` shows it.
"""

from __future__ import annotations

import importlib
import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualpipe_ext import __version__, core, env, hardware_queue, nvml, toolkit

_GIB = 2**30
_HOPPER = (9, 0)

# Best first; for the report where torch, and with it the registry of transports, is missing.
_TRANSPORTS = ("nvlink", "copy_engine", "low_latency", "collective")
_MOVED_BY = {
    "nvlink": "kernels on some of the SMs",
    "copy_engine": "copy engines (num_sms=0 asks for them)",
    "low_latency": "kernels for some hundred tokens; to be asked for by name",
}


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say what this machine can do, which transports would be used, and what to install."""
    findings = collect()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        render(findings, Console())


def collect() -> dict[str, Any]:
    """Everything the report says, as JSON-ready data."""
    machine = nvml.query()
    gpus, links = _gpus_and_links(machine)
    found = {
        "versions": _versions(machine),
        "toolkit": _toolkit(),
        "core": {"available": core.available(), "reason": core.why_unavailable()},
        "gpus": gpus,
        "links": links,
        "environment": env.in_force(),
    }
    found["transports"] = _transports(found)
    found["advice"] = _advice(found)
    return found


def _versions(machine: nvml.Machine | None) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "dualpipe_ext": __version__,
        "python": platform.python_version(),
        "driver": machine.driver if machine else None,
    }
    for name in ("torch", "triton", "numpy"):
        versions[name] = _version_of(name)
    if versions["torch"]:
        import torch

        versions["torch_cuda"] = torch.version.cuda
    if core.available():
        versions["core_cuda"] = _cuda_version(core.module().runtime_version())
        versions["driver_cuda"] = _cuda_version(core.module().driver_version())
    return versions


def _version_of(name: str) -> str | None:
    """Imports the package: one that is there but broken counts as missing."""
    try:
        return importlib.import_module(name).__version__
    except (ImportError, OSError):  # OSError: a shared library of torch that does not load
        return None


def _cuda_version(number: int) -> str | None:
    """13000 is 13.0; 0 is no driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _toolkit() -> dict[str, Any]:
    try:
        found = toolkit.find_toolkit()
    except toolkit.ToolkitError as error:
        return {"found": False, "reason": str(error)}
    return {
        "found": True,
        "home": str(found.home),
        "version": ".".join(map(str, found.version)),
        "found_by": found.found_by,
    }


def _gpus_and_links(
    machine: nvml.Machine | None,
) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """GPUs, and for each ordered pair how one reaches the other's memory.

    The core sees what CUDA sees (``CUDA_VISIBLE_DEVICES`` applied); without it, NVML's view of the
    whole machine is shown.
    """
    if core.available() and (devices := core.module().devices()):
        gpus = [
            {
                "index": d.index,
                "name": d.name,
                "capability": list(d.capability),
                "memory_gib": round(d.memory_bytes / _GIB, 1),
                "num_sms": d.num_sms,
                "pci_bus_id": d.pci_bus_id,
            }
            for d in devices
        ]
        # NVML numbers the GPUs in its own order, which does not matter where they are all alike.
        if machine and [g.name for g in machine.gpus] == [gpu["name"] for gpu in gpus]:
            for gpu, seen in zip(gpus, machine.gpus, strict=True):
                gpu["nvlinks"] = seen.active_nvlinks
        return gpus, [[_link(a, b) for b in range(len(gpus))] for a in range(len(gpus))]
    if machine is None:
        return [], []
    gpus = [
        {
            "index": gpu.index,
            "name": gpu.name,
            "capability": list(gpu.capability),
            "memory_gib": round(gpu.memory_bytes / _GIB, 1),
            "nvlinks": gpu.active_nvlinks,
        }
        for gpu in machine.gpus
    ]
    return gpus, [
        ["self" if a == b else "nvlink" if linked else "none" for b, linked in enumerate(row)]
        for a, row in enumerate(machine.nvlink)
    ]


def _link(device: int, peer: int) -> str:
    if device == peer:
        return "self"
    link = core.module().peer_link(device, peer)
    if not link.access:
        return "none"
    # Atomics across PCIe are emulated or missing; across NVLink they run in hardware.
    return "nvlink" if link.native_atomics else "pcie"


def _transports(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Best first: ``auto`` takes the first that its process group can use."""
    if found["versions"]["torch"] is None:
        names, reasons = _TRANSPORTS, dict.fromkeys(_TRANSPORTS, "torch is not installed")
    else:
        reasons = _reasons_against()
        names = tuple(reasons)
    return [_transport(name, reasons[name], found) for name in names]


def _reasons_against() -> dict[str, str | None]:
    """Why a process by itself cannot use a transport, None where it can; best first."""
    # Here, not at the top: they need torch.
    from dualpipe_ext.ep.registry import transport_status
    from dualpipe_ext.ep.transport import TransportConfig

    alone = TransportConfig(
        group=None,
        rank=0,
        num_ranks=1,
        hidden=128,
        num_experts=1,
        top_k=1,
        max_tokens=1,
        num_sms=None,
        timeout_s=1.0,
    )
    try:
        return transport_status(alone)
    except RuntimeError as error:  # torch found a GPU, but cannot use it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return {name: None if name == "collective" else reason for name in _TRANSPORTS}


def _transport(name: str, reason: str | None, found: dict[str, Any]) -> dict[str, Any]:
    """One row of the report: what the transport says of itself, and what the links add."""
    if reason is not None:
        return {"name": name, "usable": False, "why": reason}
    if name == "collective":
        over_nccl = found["gpus"] and found["versions"].get("torch_cuda")
        over = "NCCL (gloo for CPU tensors)" if over_nccl else "gloo"
        return {"name": name, "usable": True, "why": f"torch.distributed over {over}"}
    usable, where = _reach(found["links"])
    return {"name": name, "usable": usable, "why": f"{_MOVED_BY[name]}, {where}"}


def _reach(links: list[list[str]]) -> tuple[bool, str]:
    """Whether GPUs can write into each other's memory as kernels need it, and which of them."""
    num_gpus = len(links)
    if num_gpus < 2:
        return True, "virtual ranks on one GPU (LocalRanks)"
    apart = [
        f"{a}-{b}"
        for a in range(num_gpus)
        for b in range(a + 1, num_gpus)
        if not links[a][b] == links[b][a] == "nvlink"
    ]
    if not apart:
        return True, f"over NVLink between {num_gpus} GPUs"
    if len(apart) == num_gpus * (num_gpus - 1) // 2:
        return False, "but no NVLink joins the GPUs: only virtual ranks on one of them (LocalRanks)"
    return True, f"over NVLink, but not between GPUs {', '.join(apart)}"


def _advice(found: dict[str, Any]) -> list[str]:
    """What to install or change to get more, most important first."""
    advice = []
    versions, gpus = found["versions"], found["gpus"]
    if versions["torch"] is None:
        advice.append('torch is missing: pip install "torch>=2.11,<2.14"')
    elif gpus and not versions.get("torch_cuda"):
        advice.append("torch is a CPU build and will not use the GPUs: see https://pytorch.org")
    if not gpus:
        advice.append(
            "no GPU found: training, schedules and tests run on the CPU; the kernels need a Hopper "
            "GPU (H100, H200) and its driver"
        )
    elif not any(tuple(gpu["capability"]) == _HOPPER for gpu in gpus):
        advice.append("no Hopper GPU found: the CUDA core is compiled for compute capability 9.0")
    if not found["core"]["available"]:
        if not found["toolkit"]["found"]:
            advice.append(
                "to compile the CUDA core, install a CUDA toolkit "
                f"({'.'.join(map(str, toolkit.MIN_VERSION))} or newer), set CUDA_HOME, reinstall"
            )
        else:
            advice.append(
                "a CUDA toolkit is there: DUALPIPE_CUDA=1 pip install . compiles the CUDA core"
            )
    if versions["triton"] is None and platform.system() == "Linux":
        advice.append("triton is missing, kernels fall back to torch: pip install triton")
    if len(gpus) > 1 and not any("nvlink" in row for row in found["links"]):
        advice.append("the GPUs are not joined by NVLink: expert parallelism goes through NCCL")
    if gpus and hardware_queue.is_shared():
        advice.append(
            f"{hardware_queue.VARIABLE}=1 has all streams share one hardware queue: less "
            "communication is hidden, and little of copy engines. Unset it, unless tensor "
            "parallelism needs it; then let kernels move the tokens (nvlink)"
        )
    return advice


def render(found: dict[str, Any], console: Console) -> None:
    """Print the findings of :func:`collect`."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, version in found["versions"].items():
        facts.add_row(name, version or "[dim]none[/dim]")
    kit = found["toolkit"]
    facts.add_row(
        "CUDA toolkit",
        f"{kit['version']} in {kit['home']} (by {kit['found_by']})"
        if kit["found"]
        else f"[yellow]{kit['reason']}[/yellow]",
    )
    compiled = found["core"]
    facts.add_row(
        "CUDA core",
        "[green]compiled[/green]"
        if compiled["available"]
        else f"[yellow]missing: {compiled['reason']}[/yellow]",
    )
    for name, value in found["environment"].items():
        facts.add_row(name, value)
    console.print(facts)
    if found["gpus"]:
        console.print(_gpu_table(found["gpus"], found["links"]))
    transports = Table("transport", "usable", "", title="Expert-parallel transports")
    for transport in found["transports"]:
        usable = "[green]yes[/green]" if transport["usable"] else "no"
        transports.add_row(transport["name"], usable, transport["why"])
    console.print(transports)
    advice = Table(show_header=False, box=None, pad_edge=False)
    for line in found["advice"]:
        advice.add_row("-", line)
    console.print(advice)


def _gpu_table(gpus: list[dict[str, Any]], links: list[list[str]]) -> Table:
    numbers = [str(gpu["index"]) for gpu in gpus]
    table = Table(
        "",
        "GPU",
        "capability",
        "memory",
        "SMs",
        "NVLinks",
        *(f"to {number}" for number in numbers),
        title="GPUs",
    )
    for gpu, row in zip(gpus, links, strict=True):
        table.add_row(
            str(gpu["index"]),
            gpu["name"],
            ".".join(map(str, gpu["capability"])),
            f"{gpu['memory_gib']} GiB",
            str(gpu.get("num_sms", "?")),
            str(gpu.get("nvlinks", "?")),
            *row,
        )
    return table
