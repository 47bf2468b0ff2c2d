"""quantkit env: what a bug report needs and no more. Values of environment variables, user and host are left out."""

import getpass
import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quantkit.cli.app import Json, print_json

PACKAGES = (
    *("quantkit", "torch", "transformers", "safetensors", "huggingface-hub", "tokenizers", "compressed-tensors"),
    *("accelerate", "datasets", "triton", "numpy", "pydantic", "ruamel.yaml", "typer", "rich", "psutil", "vllm"),
)
# Those that kernels ask for, and what says how fast a CPU is at low precision.
CPU_FEATURES = re.compile(r"avx2|f16c|fma|avx512\w*|avx_vnni|amx_\w+|asimd\w*|sve\w*|bf16|i8mm")
COMPILERS = ("c++", "g++", "clang++", "nvcc")


@dataclass(frozen=True, slots=True)
class Environment:
    """This machine as far as it matters to a run. ram_gib: of the machine; gpus: name and memory of each."""

    versions: dict[str, str | None]
    python: str
    executable: str
    os: str
    cpu: str
    cores: int | None
    cpu_features: tuple[str, ...]
    ram_gib: float
    cuda: str | None
    gpus: tuple[str, ...]
    compilers: dict[str, str | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def env(as_json: Json = False) -> None:
    """What a bug report needs: versions, machine, GPUs and compilers. No names of users, no environment variables.

    Example: quantkit env --json
    """
    found = environment()
    if as_json:
        print_json(found.to_json())
    else:
        _print(found)


def environment() -> Environment:
    """What is installed and what the machine is; of the heavy packages torch alone is imported, to ask for GPUs."""
    import psutil

    model, features = _cpu()
    cuda, gpus = _gpus()
    return Environment(
        versions={name: _version(name) for name in PACKAGES},
        python=platform.python_version(),
        executable=without_home(sys.executable),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=model,
        cores=os.cpu_count(),
        cpu_features=features,
        ram_gib=round(psutil.virtual_memory().total / 2**30, 1),
        cuda=cuda,
        gpus=gpus,
        compilers={name: without_home(path) if (path := shutil.which(name)) else None for name in COMPILERS},
    )


def without_home(path: str) -> str:
    """A path with the home folder, which holds the user's name, written `~`."""
    homes = {str(Path.home()), str(Path.home().resolve()), os.path.expanduser("~")} - {"/", ""}
    for home in sorted(homes, key=len, reverse=True):
        if path == home or path.startswith(home + os.sep):
            return "~" + path[len(home) :]
    path = re.sub(r"^/(home|Users)/[^/]+", r"/\1/...", path)  # another user's
    return re.sub(rf"(?<=/){re.escape(_user())}(?=/|$)", "...", path)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an id without a name
        return "\0"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return "checkout" if name == "quantkit" else None


def _cpu() -> tuple[str, tuple[str, ...]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or "?", ()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    found = sorted({flag for flag in (flags[1].split() if flags else ()) if CPU_FEATURES.fullmatch(flag)})
    return model[1] if model else platform.processor() or "?", tuple(found)


def _gpus() -> tuple[str | None, tuple[str, ...]]:
    """torch's CUDA (or ROCm) version and the GPUs it sees; nothing where torch does not load."""
    try:
        import torch
    except (ImportError, OSError):
        return None, ()
    built = torch.version.cuda or getattr(torch.version, "hip", None)
    if not torch.cuda.is_available():
        return built, ()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return built, tuple(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm{gpu.major}{gpu.minor}" for gpu in gpus)


def _print(found: Environment) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "quantkit": found.versions["quantkit"],
        "python": f"{found.python}, {found.executable}",
        "os": found.os,
        "cpu": f"{found.cpu}, {found.cores} cores",
        "": " ".join(found.cpu_features) or "no features known",
        "memory": f"{found.ram_gib} GiB",
        "gpus": "; ".join(found.gpus) or "none that torch sees",
        "cuda of torch": found.cuda or "none",
        "compilers": ", ".join(f"{name} {path}" for name, path in found.compilers.items() if path) or "none",
        **{name: text or "not installed" for name, text in found.versions.items() if name != "quantkit"},
    }
    for label, value in rows.items():
        table.add_row(label, value)
    Console().print(table, highlight=False)
