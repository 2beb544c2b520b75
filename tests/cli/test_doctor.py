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
    assert found["transports"][0]["name"] == "collective"
    assert found["environment"]["DUALPIPE_TRACEBACK"] == "0"


@pytest.mark.usefixtures("no_core", "no_toolkit")
def test_bare_machine(monkeypatch):
    monkeypatch.setattr(doctor.nvml, "query", lambda: None)
    found = doctor.collect()
    assert found["gpus"] == []
    assert [t["usable"] for t in found["transports"]] == [True, False, False]
    text = rendered(found)
    assert "missing: it was not built" in text
    assert "no GPU found" in text
    assert "install a CUDA toolkit (12.5 or newer)" in text


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
    assert not found["transports"][0]["usable"]
    assert found["advice"][0].startswith("torch is missing")
    rendered(found)
