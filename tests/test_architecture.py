"""Who may import whom. Reads every import with `ast`, lazy and TYPE_CHECKING ones too, and knows no exceptions."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxengine", "pallas_kernels", "converters")
MAX_LINES = 500

EVERYBODY = {"config", "errors"}  # open to all of jaxengine
TABLE: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "converters": set(),
    "errors": set(),
    "config": {"errors"},
    "request": EVERYBODY,
    "step": EVERYBODY,
    "sharding": EVERYBODY,
    "kv_cache": EVERYBODY | {"pallas_kernels", "step", "sharding"},
    "sampling": EVERYBODY | {"pallas_kernels", "step", "sharding"},
    "layers": EVERYBODY | {"pallas_kernels", "step", "kv_cache", "sharding"},
    "models": EVERYBODY | {"layers", "step", "kv_cache", "sharding"},
    "chat_template": EVERYBODY,
    "tokenizer": EVERYBODY | {"converters", "chat_template"},
    "text": EVERYBODY | {"tokenizer"},
    "weights": EVERYBODY | {"converters", "models", "sharding"},
    "scoring": EVERYBODY | {"request"},
    "reranking": EVERYBODY | {"scoring"},
    "embedding": EVERYBODY | {"request"},
    "text_methods": EVERYBODY | {"scoring", "reranking", "embedding", "request", "tokenizer"},
    "engine": EVERYBODY | {"request", "step", "models", "layers", "sampling", "kv_cache", "sharding"},
    "processes": EVERYBODY,
    "progress": EVERYBODY | {"request"},
    "memory": EVERYBODY | {"kv_cache"},
    "live_weights": EVERYBODY | {"engine", "weights", "request"},
    "frontend": EVERYBODY | {"engine", "request", "tokenizer"},
    "assembly": EVERYBODY
    | {"engine", "weights", "live_weights", "tokenizer", "text", "frontend", "memory", "progress", "kv_cache"}
    | {"layers", "models", "processes", "sharding"},
    "beam_search": EVERYBODY | {"frontend", "progress", "request"},
    "llm": EVERYBODY
    | {"assembly", "frontend", "beam_search", "progress", "engine", "tokenizer", "request", "evaluate"}
    | {"text_methods"},
    "async_llm": EVERYBODY | {"llm", "request", "scoring", "reranking", "tokenizer"},
    "handoff": EVERYBODY | {"llm", "async_llm", "request", "scoring", "tokenizer"},
    "evaluate": EVERYBODY | {"llm", "async_llm", "request", "scoring", "embedding", "tokenizer", "progress"},
    "serve": EVERYBODY | {"llm", "async_llm", "request", "scoring", "tokenizer"},
    "benchmark": EVERYBODY | {"request", "pallas_kernels", "weights", "sharding"},
    "jaxengine": EVERYBODY | {"llm", "async_llm", "request", "handoff"},
}
TABLE["cli"] = set(TABLE)

# Packages that may import only these beside the standard library.
THIRD_PARTY = {
    "pallas_kernels": {"jax", "jaxlib", "numpy"},
    "converters": {"numpy", "ml_dtypes", "safetensors", "gguf"},
}
# The host side: plain Python and NumPy.
NO_JAX = ("jaxengine.request", "jaxengine.errors", "jaxengine.engine")
RUNNER_PARTS = ("runner", "compilations", "program_store", "flight", "device_slots", "device_steps", "device_weights")
JAX_ALLOWED = tuple(f"jaxengine.engine.{name}" for name in RUNNER_PARTS)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Every module that `source` names in an import, absolute, wherever the import stands.

    `from a import b` gives `a.b`: whether b is a module or a name in a is for the caller to find out.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + is_package] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def resolve(name: str) -> str:
    """The longest prefix of a dotted name that is a module of ours; the name itself if none is."""
    parts = name.split(".")
    return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in MODULES), name)


def group(module: str) -> str:
    """The table's row for a module: `jaxengine.layers.norm` is in layers, `converters.llama` in converters."""
    parts = module.split(".")
    return parts[1] if parts[0] == "jaxengine" and len(parts) > 1 else parts[0]


def is_ours(name: str) -> bool:
    return name.split(".")[0] in PACKAGES


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    row = group(module)
    if row not in TABLE:
        return [f"{module}: no row of the table is for {row!r}"]
    found = []
    for name in imports(source, module, is_package):
        top, target = name.split(".")[0], resolve(name)
        if is_ours(name):
            if group(target) != row and group(target) not in TABLE[row]:
                found.append(f"{module} imports {target}: no arrow from {row} to {group(target)}")
        elif row in THIRD_PARTY and top not in THIRD_PARTY[row] | sys.stdlib_module_names:
            found.append(f"{module} imports {name}: {row} is a leaf and may import {sorted(THIRD_PARTY[row])} only")
        if top in ("jax", "jaxlib") and within(module, NO_JAX) and not within(module, JAX_ALLOWED):
            found.append(f"{module} imports {name}: the host side does without jax")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module):
    path = MODULES[module]
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("jaxengine.layers.norm", "from jaxengine.models import llama", "no arrow from layers to models"),
        ("jaxengine.request", "def f():\n    import jaxengine.llm", "no arrow from request to llm"),
        ("jaxengine.step", "if TYPE_CHECKING:\n    from jaxengine.engine.engine import Engine", "from step to engine"),
        ("jaxengine.models.llama", "from ..engine import scheduler", "no arrow from models to engine"),
        ("jaxengine.tokenizer", "importlib.import_module('jaxengine.weights')", "no arrow from tokenizer to weights"),
        ("converters.llama", "from jaxengine.errors import CheckpointError", "no arrow from converters to errors"),
        ("converters.llama", "import transformers", "converters is a leaf"),
        ("pallas_kernels.decode", "from flax import nnx", "pallas_kernels is a leaf"),
        ("jaxengine.engine.scheduler", "import jax.numpy as jnp", "does without jax"),
        ("jaxengine.newcomer", "", "no row of the table"),
    ],
)
def test_a_broken_arrow_is_found(module, source, complaint):
    assert complaint in "\n".join(violations(module, source))


def test_no_import_cycle():
    graph = {
        module: {resolve(name) for name in imports(path.read_text(), module, path.name == "__init__.py")} - {module}
        for module, path in MODULES.items()
    }
    TopologicalSorter({m: {n for n in names if n in MODULES} for m, names in graph.items()}).prepare()


def python_files() -> list[Path]:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "benchmarks", "scripts")]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_no_private_jax():
    users = [
        path.relative_to(ROOT)
        for path in python_files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("jax._src")
    ]
    users += [
        path.relative_to(ROOT)
        for path in python_files()
        if any(name.startswith("jax._src") for name in imports(path.read_text(), "x"))
    ]
    assert users == []


def test_torch_only_writes_references():
    users = [
        path.relative_to(ROOT)
        for path in python_files()
        if not path.is_relative_to(ROOT / "tests" / "references")
        and any(name.split(".")[0] == "torch" for name in imports(path.read_text(), "x"))
    ]
    assert users == []


def test_one_subject_a_file():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_the_document_has_the_same_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    start = rows.index(["package", "may import"])
    documented = {}
    for name, names in rows[start + 2 :]:
        documented[name] = {part.strip(" `") for part in names.split(",")} - {"nothing", "-"}
    assert documented.pop("cli") == {"everything"}
    stated = {name: targets if name == "config" else targets - EVERYBODY for name, targets in TABLE.items()}
    assert documented == {name: targets for name, targets in stated.items() if name != "cli"}
