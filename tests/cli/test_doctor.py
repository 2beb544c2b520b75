"""`dualpipe doctor` on machines of every kind, most of them pretended."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from dualpipe_ext import nvml, toolkit
from dualpipe_ext.cli import doctor
from dualpipe_ext.cli.main import main
from dualpipe_ext.ep import registry

HOPPER = nvml.Gpu(
    index=0, name="H200", capability=(9, 0), memory_bytes=141 * 2**30, active_nvlinks=18
)
TWO_HOPPERS = nvml.Machine(
    driver="580.1",
    gpus=(HOPPER, HOPPER),
    nvlink=((False, True), (True, False)),
)


def rendered(findings):
    text = io.StringIO()
    doctor.render(findings, Console(file=text, width=200))
    return text.getvalue()


@pytest.fixture
def no_core(monkeypatch):
    monkeypatch.setattr(doctor.core, "available", lambda: False)
    monkeypatch.setattr(doctor.core, "why_unavailable", lambda: "it was not built")


@pytest.fixture
def no_toolkit(monkeypatch):
    def find():
        raise toolkit.ToolkitError("expected a CUDA toolkit, got none")

    monkeypatch.setattr(doctor.toolkit, "find_toolkit", find)


def test_on_this_machine(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "collective" in out
    assert "python" in out


def test_json(capsys, monkeypatch):
    monkeypatch.setenv("DUALPIPE_TRACEBACK", "0")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [t["name"] for t in found["transports"]]
    assert names == ["nvlink", "copy_engine", "low_latency", "collective"]
    assert found["environment"]["DUALPIPE_TRACEBACK"] == "0"


@pytest.mark.usefixtures("no_core", "no_toolkit")
def test_bare_machine(monkeypatch):
    monkeypatch.setattr(doctor.nvml, "query", lambda: None)
    found = doctor.collect()
    assert found["gpus"] == []
    assert [t["usable"] for t in found["transports"]] == [False, False, False, True]
    text = rendered(found)
    assert "no compiled CUDA core (it was not built)" in text
    assert "missing: it was not built" in text
    assert "no GPU found" in text
    assert "install a CUDA toolkit (12.5 or newer)" in text


@pytest.mark.usefixtures("no_core")
def test_one_hardware_queue_is_advised_against(monkeypatch):
    monkeypatch.setattr(doctor.nvml, "query", lambda: TWO_HOPPERS)
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rendered(doctor.collect())
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1 has all streams share" in rendered(doctor.collect())
    monkeypatch.setattr(doctor.nvml, "query", lambda: None)  # nothing to advise without a GPU
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in rendered(doctor.collect())


@pytest.mark.usefixtures("no_core")
def test_gpus_without_the_core_come_from_nvml(monkeypatch):
    monkeypatch.setattr(doctor.nvml, "query", lambda: TWO_HOPPERS)
    found = doctor.collect()
    assert found["versions"]["driver"] == "580.1"
    assert found["links"] == [["self", "nvlink"], ["nvlink", "self"]]
    text = rendered(found)
    assert "H200" in text
    assert "141.0 GiB" in text
    assert " 18 " in text
    assert "not joined by NVLink" not in text


def test_gpus_and_links_as_the_core_sees_them(monkeypatch):
    devices = [
        SimpleNamespace(
            index=i,
            name="H100",
            capability=(9, 0),
            memory_bytes=80 * 2**30,
            num_sms=132,
            pci_bus_id=f"0000:0{i}:00.0",
        )
        for i in range(2)
    ]
    fake = SimpleNamespace(
        devices=lambda: devices,
        runtime_version=lambda: 13000,
        driver_version=lambda: 12080,
        peer_link=lambda a, b: SimpleNamespace(access=a == 0, native_atomics=False),
    )
    monkeypatch.setattr(doctor.core, "available", lambda: True)
    monkeypatch.setattr(doctor.core, "module", lambda: fake)
    found = doctor.collect()
    assert found["links"] == [["self", "pcie"], ["none", "self"]]
    assert found["versions"]["driver_cuda"] == "12.8"
    assert any("not joined by NVLink" in line for line in found["advice"])
    assert "132" in rendered(found)


def test_without_torch(monkeypatch):
    monkeypatch.setattr(doctor, "_version_of", lambda name: None)
    found = doctor.collect()
    assert {t["why"] for t in found["transports"]} == {"torch is not installed"}
    assert not any(t["usable"] for t in found["transports"])
    assert found["advice"][0].startswith("torch is missing")
    rendered(found)


def test_lists_every_transport():
    assert registry.transport_names()[1:] == doctor._TRANSPORTS


def test_why_a_transport_cannot_be_used_is_what_it_says_itself(monkeypatch):
    class Pretended:
        def __init__(self, name):
            self.name = name

        def unavailable(self, config):
            assert config.num_ranks == 1
            return f"{self.name} is tired" if self.name == "nvlink" else None

    pretended = tuple(Pretended(name) for name in doctor._TRANSPORTS)
    monkeypatch.setattr(registry, "_TRANSPORTS", pretended)
    monkeypatch.setattr(doctor, "_gpus_and_links", lambda machine: ([], []))
    rows = {row["name"]: row for row in doctor.collect()["transports"]}
    assert rows["nvlink"] == {"name": "nvlink", "usable": False, "why": "nvlink is tired"}
    assert rows["copy_engine"]["usable"]
    assert "virtual ranks on one GPU" in rows["copy_engine"]["why"]


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    def fail(config):
        raise RuntimeError("CUDA error: uncorrectable ECC error\nand a page of advice")

    monkeypatch.setattr(registry, "transport_status", fail)
    rows = {row["name"]: row for row in doctor.collect()["transports"]}
    assert rows["nvlink"]["why"] == "CUDA error: uncorrectable ECC error"
    assert rows["collective"]["usable"]


@pytest.mark.parametrize(
    ("links", "usable", "why"),
    [
        ([], True, "virtual ranks on one GPU (LocalRanks)"),
        ([["self"]], True, "virtual ranks on one GPU (LocalRanks)"),
        ([["self", "nvlink"], ["nvlink", "self"]], True, "over NVLink between 2 GPUs"),
        ([["self", "pcie"], ["pcie", "self"]], False, "but no NVLink joins the GPUs"),
        ([["self", "nvlink"], ["none", "self"]], False, "but no NVLink joins the GPUs"),
        (
            [["self", "nvlink", "pcie"], ["nvlink", "self", "none"], ["pcie", "none", "self"]],
            True,
            "over NVLink, but not between GPUs 0-2, 1-2",
        ),
    ],
)
def test_links_decide_between_which_gpus(links, usable, why):
    found = {"links": links, "gpus": [], "versions": {}}
    for name in ("nvlink", "copy_engine"):
        row = doctor._transport(name, None, found)
        assert row["usable"] is usable
        assert why in row["why"]
