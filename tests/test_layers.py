"""Who may import whom; the table of the design, enforced on the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hybrid_lora_plugin"
VERL = {"verl", "ray", "vllm"}
VERL_LAYERS = ("verl_backend", "cli", "conf")
# layer -> (importable anywhere, importable inside functions only), beside the standard library and this package
PURE = {
    "candidates.py": ({"numpy", "torch"}, {"transformers"}),
    "scoring": ({"numpy", "torch"}, set()),
    # safetensors and Matplotlib write the artifact; whoever only reads allocation.json needs neither.
    "allocation": ({"numpy", "torch"}, {"matplotlib", "safetensors"}),
}
# What a layer may use of this package: data flow one way.
INTERNAL = {
    "candidates.py": {"errors"},
    "scoring": {"errors", "config", "candidates", "scoring"},
    "allocation": {"errors", "config", "candidates", "scoring", "allocation", "report"},
    "report": {"errors", "candidates", "allocation", "report"},
    "probing": {
        "errors",
        "config",
        "config_validation",
        "candidates",
        "scoring",
        "allocation",
        "probing",
        "__version__",
    },
    "sync": {"errors", "allocation", "sync", "training", "report"},
    "training": {"errors", "candidates", "allocation", "training", "report", "__version__"},
}


def files(layer):
    path = PACKAGE / layer
    return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def imports(file):
    """(module, is inside a function) of every import of a file, type-checking ones left out."""
    found = []

    def visit(node, inside):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import; write the full name"
            if node.module == "hybrid_lora_plugin":
                found.extend((f"hybrid_lora_plugin.{alias.name}", inside) for alias in node.names)
            else:
                found.append((node.module, inside))
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(file.read_text()), False)
    return found


@pytest.mark.parametrize("layer", PURE)
def test_pure_layers_import_only_the_standard_library_numpy_and_torch(layer):
    anywhere, in_functions = PURE[layer]
    assert files(layer)
    for file in files(layer):
        for module, inside in imports(file):
            top = module.partition(".")[0]
            allowed = top in sys.stdlib_module_names or top == "hybrid_lora_plugin" or top in anywhere
            assert allowed or (inside and top in in_functions), f"{file.relative_to(ROOT)} imports {module}"


def test_only_the_backend_the_commands_and_the_configuration_group_know_verl():
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] in VERL_LAYERS:
            continue
        for module, _ in imports(file):
            assert module.partition(".")[0] not in VERL, f"{file.relative_to(ROOT)} imports {module}"
            assert module.split(".")[:2] != ["hybrid_lora_plugin", "verl_backend"], (
                f"{file.relative_to(ROOT)} imports {module}"
            )


@pytest.mark.parametrize("layer", INTERNAL)
def test_data_flow_one_way_between_layers(layer):
    for file in files(layer):
        for module, _ in imports(file):
            parts = module.split(".")
            if parts[0] == "hybrid_lora_plugin" and len(parts) > 1:
                assert parts[1] in INTERNAL[layer], f"{file.relative_to(ROOT)} imports {module}"


def test_importing_the_package_loads_nothing_and_its_names_need_no_verl():
    code = (
        "import sys, hybrid_lora_plugin as h\n"
        "assert 'torch' not in sys.modules\n"
        "h.find_candidates, h.hybrid_score, h.allocate, h.load_allocation\n"
        "assert not {'verl', 'ray', 'vllm', 'transformers', 'matplotlib', 'peft'} & set(sys.modules)\n"
        "assert set(dir(h)) >= {'find_candidates', 'apply_allocation'}\n"
        "try: h.nonsense\n"
        "except AttributeError as error: assert 'nonsense' in str(error)\n"
        "else: raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
