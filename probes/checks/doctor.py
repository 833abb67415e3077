"""What is installed: versions, devices, extras and shipped models, with a remedy for everything that is missing."""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.resources import files
from importlib.util import find_spec

import psutil
from packaging.requirements import Requirement

_PROJECT = "reasonscope"
_MODELS = ("organism", "organism-base")


@dataclass(frozen=True, kw_only=True)
class _Package:
    """A required package: its `installed` version (None if it is missing), and whether that is one of the versions `needed`."""

    name: str
    installed: str | None
    needed: str
    satisfied: bool


@dataclass(frozen=True, kw_only=True)
class EnvironmentCheck:
    """The core or an extra. `remedy` is the command that installs what is missing; None if it is complete."""

    name: str
    packages: tuple[_Package, ...]
    remedy: str | None


@dataclass(frozen=True, kw_only=True)
class _Device:
    """A device for models: its name in torch, what it is, and its memory in GiB (None if it shares that of the CPU)."""

    name: str
    description: str
    memory: float | None


@dataclass(frozen=True, kw_only=True)
class ShippedModel:
    """A model that comes with the package. `path` is its folder, or None if its configuration or its weights are missing."""

    name: str
    path: str | None
    remedy: str | None


@dataclass(frozen=True, kw_only=True)
class Examination:
    """Everything that `reasonscope doctor` reports."""

    version: str
    python: str
    platform: str
    core: EnvironmentCheck
    devices: tuple[_Device, ...]
    extras: tuple[EnvironmentCheck, ...]
    models: tuple[ShippedModel, ...]

    @property
    def sound(self) -> bool:
        """Whether everything except the extras is there."""
        return self.core.remedy is None and all(model.path for model in self.models)


def examine() -> Examination:
    """Look at this interpreter, its packages and its devices, without a change and without the network."""
    return Examination(
        version=version(_PROJECT),
        python=platform.python_version(),
        platform=platform.platform(),
        core=_part("core", _packages(extra=""), f"pip install --upgrade {_PROJECT}"),
        devices=_devices(),
        extras=_extras(),
        models=tuple(_model(name) for name in _MODELS),
    )


def _packages(*, extra: str) -> tuple[_Package, ...]:
    """The requirements of `extra`, or of the core if it is empty."""
    found = []
    for requirement in map(Requirement, requires(_PROJECT) or ()):
        marker = requirement.marker
        in_core = marker is None or marker.evaluate({"extra": ""})
        asked = in_core if not extra else not in_core and marker is not None and marker.evaluate({"extra": extra})
        # An extra that consists of other extras names the project itself; those extras have their own rows.
        if asked and requirement.name != _PROJECT:
            found.append(_package(requirement))
    return tuple(found)


def _package(requirement: Requirement) -> _Package:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    return _Package(
        name=requirement.name,
        installed=installed,
        needed=str(requirement.specifier),
        satisfied=installed is not None and requirement.specifier.contains(installed, prereleases=True),
    )


def _part(name: str, packages: tuple[_Package, ...], remedy: str) -> EnvironmentCheck:
    return EnvironmentCheck(name=name, packages=packages, remedy=None if all(p.satisfied for p in packages) else remedy)


def _extras() -> tuple[EnvironmentCheck, ...]:
    names = metadata(_PROJECT).get_all("Provides-Extra") or ()
    parts = (_part(name, _packages(extra=name), f"pip install '{_PROJECT}[{name}]'") for name in names)
    return tuple(part for part in parts if part.packages)


def _devices() -> tuple[_Device, ...]:
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    found = [_Device(name="cpu", description=f"{cores} cores", memory=_gib(psutil.virtual_memory().total))]
    # Without torch no other device helps; its absence is listed among the packages.
    if find_spec("torch") is not None:
        import torch

        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            found.append(_Device(name=f"cuda:{i}", description=gpu.name, memory=_gib(gpu.total_memory)))
        if torch.backends.mps.is_available():
            found.append(_Device(name="mps", description="Apple GPU, shares the memory of the CPU", memory=None))
    return tuple(found)


def _gib(n_bytes: int) -> float:
    return round(n_bytes / 2**30, 1)


def _model(name: str) -> ShippedModel:
    folder = files("reasonscope.data.organism").joinpath(name)
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if "config.json" in names and any(file.endswith(".safetensors") for file in names):
        return ShippedModel(name=name, path=str(folder), remedy=None)
    return ShippedModel(name=name, path=None, remedy=f"pip install --force-reinstall --no-deps {_PROJECT}")
