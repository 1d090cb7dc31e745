"""Imports point one way: six floors, no circle, and kernels that know only torch and triton."""

import ast
import re
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
FLOORS = (
    {
        "kernels", "data", "cases", "devices", "distributed", "macs", "cost", "metrics", "surfaces",
        "recipe", "schedules", "bounds", "activation", "frame", "machine", "version", "finished",
        "weight_files", "doubts", "heap",
    },
    {"layers", "losses", "choice"},
    {"networks", "routing", "med_danet", "med_danet_v2", "engine", "predictor"},
    {"build", "report", "preview"},
    {
        "bench", "training", "run_checks", "run_folder", "objectives_v1", "phase", "objectives",
        "batches", "checkpoint", "monitor", "dataset", "cache", "weights", "cohort", "evaluation",
        "pairs",
    },
    {"arguments", "messages", "commands", "cli"},
    {"meddanet", "__main__"},  # the public list and the launcher stand above everything
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def module_files() -> dict[str, Path]:
    """Every module of the package by its installed name, the kernels by their real files."""
    files = {}
    folders = {"meddanet": ROOT / "meddanet", "meddanet.kernels": ROOT / "kernels"}
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[0] != "kernels":  # reached through the link by some Pythons
                files[".".join((package, *parts)).removesuffix(".__init__")] = path
    return files


FILES = module_files()


def imported(module: str) -> set[str]:
    """The modules that `module` imports anywhere in its file, under their full names."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else base for name in found}
    return names


def room(module: str) -> str:
    """The part of the package that has a floor: `data` for `meddanet.data.nifti`."""
    return (module.split(".") + ["meddanet"])[1]


INTERNAL = {name: {other for other in imported(name) if other in FILES} for name in FILES}


def test_every_module_has_a_floor():
    rooms = {room(name) for name in FILES}
    assert {"kernels", "data", "layers", "networks"} <= rooms, "the tree was not found"
    assert rooms <= FLOOR.keys(), "give the new module a floor"


def test_imports_never_point_up():
    upward = [
        f"{name} imports {other}"
        for name, others in INTERNAL.items()
        for other in others
        if FLOOR[room(other)] > FLOOR[room(name)]
    ]
    assert not upward


def test_imports_have_no_circle():
    rooms: dict[str, set[str]] = {}
    for name, others in INTERNAL.items():
        rooms.setdefault(room(name), set()).update({room(other) for other in others} - {room(name)})
    for graph in (rooms, {name: others - {name} for name, others in INTERNAL.items()}):
        TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def test_kernels_import_only_torch_triton_and_numpy():
    allowed = {"torch", "triton", "numpy"} | sys.stdlib_module_names
    for name in FILES:
        if room(name) == "kernels":
            outside = {n for n in imported(name) if not n.startswith("meddanet.kernels")}
            assert {n.split(".")[0] for n in outside} <= allowed, name


def test_nothing_imports_kernels_by_its_folder_name():
    offenders = {name for name in FILES if "kernels" in {n.split(".")[0] for n in imported(name)}}
    assert not offenders


def test_d11_every_foreign_import_is_declared():
    """No module that a user lacks: all is Python's own or named in pyproject.toml."""
    declared = re.findall(r'"([a-z0-9-]+)(?:\[\w+\])?(?:>=|;)', PROJECT)
    declared = {name.replace("-", "_") for name in declared}
    distribution = {"PIL": "pillow", "yaml": "pyyaml"}
    roots = {n.split(".")[0] for name in FILES for n in imported(name)}
    foreign = {distribution.get(n, n) for n in roots - sys.stdlib_module_names} - {"meddanet"}
    assert {"torch", "numpy", "nibabel"} <= foreign <= declared
