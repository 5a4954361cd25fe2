"""The command that error messages give to install missing packages, and want of memory."""

from __future__ import annotations

import errno
import importlib.metadata
import shlex

import pytest

from edgeformer.errors import BundleError, OutOfMemory, pip_install, typed_out_of_memory

REQUIRED = [
    "numpy>=1.26",
    'onnxruntime>=1.25; extra == "cpu"',
    'onnxruntime-gpu[cuda,cudnn]>=1.25; extra == "cuda"',
    'torch==2.13.*; extra == "export"',
    'transformers<6,>=5.20; extra == "export"',
]


@pytest.mark.parametrize(
    ("package", "requirement"),
    [
        ("numpy", "numpy>=1.26"),
        ("onnxruntime", "onnxruntime>=1.25"),
        ("onnxruntime-gpu", "onnxruntime-gpu[cuda,cudnn]>=1.25"),
        ("torch", "torch==2.13.*"),
        ("transformers", "transformers<6,>=5.20"),
        ("elsewhere", "elsewhere"),
    ],
)
def test_the_command_to_install_asks_for_the_versions_of_the_metadata(package, requirement, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRED)
    command = pip_install(package, "numpy")
    assert shlex.split(command) == ["pip", "install", requirement, "numpy>=1.26"]  # the shell sees no > or *


def test_without_metadata_the_command_names_the_packages(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert pip_install("soundfile", "soxr") == "pip install soundfile soxr"


@pytest.mark.parametrize("error", [MemoryError("no room"), OSError(errno.ENOMEM, "Cannot allocate memory", "file")])
def test_want_of_memory_has_its_type(error):
    match = r"while loading it.*(no room|Cannot allocate)"
    with pytest.raises(OutOfMemory, match=match) as caught, typed_out_of_memory("loading it"):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), BundleError("damaged"), OutOfMemory("said")]
)
def test_other_errors_and_typed_ones_stay(error):
    with pytest.raises(type(error)) as caught, typed_out_of_memory("loading it"):
        raise error
    assert caught.value is error
