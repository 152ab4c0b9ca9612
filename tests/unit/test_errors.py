"""Errors say what, where and what to do next, also where they come from another process."""

import pickle

import pytest

from edgephi import errors
from edgephi.errors import DeviceError, EdgephiError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EdgephiError) and kind is not DeviceError
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_between_processes(kind: type[EdgephiError]) -> None:
    error = pickle.loads(pickle.dumps(kind("the file ends early", where="model.gguf", remedy="Download it again")))
    assert type(error) is kind
    assert str(error) == "the file ends early (model.gguf). Download it again."
    assert (error.what, error.where, error.remedy) == ("the file ends early", "model.gguf", "Download it again")


def test_a_device_error_keeps_its_step() -> None:
    error = pickle.loads(pickle.dumps(DeviceError("no NPU", remedy="Use --device cpu", step="device")))
    assert (error.what, error.where, error.step) == ("no NPU", None, "device")


def test_a_strangers_name_does_not_fill_the_screen() -> None:
    error = EdgephiError(f"tensor {'n' * 70_000} is unknown", where="w" * 70_000, remedy="Look at the file")
    assert len(str(error)) < 2_100 and str(error).startswith("tensor nnn") and "…" in str(error)
    assert str(error).endswith("Look at the file.")
