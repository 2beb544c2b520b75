"""Finding a CUDA toolkit, on machines made of a few shell scripts."""

from __future__ import annotations

import pytest

from dualpipe_ext import toolkit


def make_nvcc(folder, release="13.0", body=""):
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    program = folder / "bin" / "nvcc"
    program.write_text(f"#!/bin/sh\n{body}\necho 'Cuda compilation tools, release {release}, V'\n")
    program.chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def _no_standard_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(toolkit, "_STANDARD_HOME", tmp_path / "standard")


def test_cuda_home_comes_first(tmp_path):
    make_nvcc(tmp_path / "standard", "12.8")
    home = make_nvcc(tmp_path / "mine", "13.0")
    found = toolkit.find_toolkit({"CUDA_HOME": str(home), "PATH": ""})
    assert (found.home, found.version, found.found_by) == (home, (13, 0), "CUDA_HOME")


def test_standard_folder_without_cuda_home(tmp_path):
    make_nvcc(tmp_path / "standard", "12.8")
    found = toolkit.find_toolkit({"PATH": ""})
    assert (found.home, found.version) == (tmp_path / "standard", (12, 8))


def test_a_broken_cuda_home_does_not_hide_the_others(tmp_path):
    make_nvcc(tmp_path / "standard")
    found = toolkit.find_toolkit({"CUDA_HOME": str(tmp_path / "empty"), "PATH": ""})
    assert found.home == tmp_path / "standard"


def test_a_wrapper_on_path_names_the_real_toolkit(tmp_path):
    real = make_nvcc(tmp_path / "real")
    wrapper = make_nvcc(tmp_path / "wrapper", body=f"echo '#$ TOP={real}/bin/..'")
    found = toolkit.find_toolkit({"PATH": str(wrapper / "bin")})
    assert (found.home, found.found_by) == (real, "nvcc --dryrun")


def test_too_old(tmp_path):
    home = make_nvcc(tmp_path / "old", "11.8")
    with pytest.raises(toolkit.ToolkitError, match=r"12\.5 or newer.*is 11\.8"):
        toolkit.find_toolkit({"CUDA_HOME": str(home), "PATH": ""})


def test_none():
    with pytest.raises(toolkit.ToolkitError, match=r"CUDA_HOME is not set.*no nvcc on PATH"):
        toolkit.find_toolkit({"PATH": ""})
