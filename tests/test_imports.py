"""The architecture as a test: imports point downward only, files stay small, nothing shadows another package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lowest first; a module may import from its own layer's package and from lower layers.
LAYERS = [
    {"errors", "types", "confined", "distributed", "jaxopd_kernels"},
    {"tasks", "models"},
    {"rollouts", "scoring", "responses", "tree", "gradients"},
    {"alignment", "analysis", "runs", "claims"},
    {"diagnose", "lab", "truth", "train", "toy", "report", "plan"},
    {"verbs"},
    {"cli"},
]
FILES = sorted([*(ROOT / "jaxopd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def part_of(module: str) -> str | None:
    """The layer member a dotted module name belongs to."""
    head, *rest = module.split(".")
    if head == "jaxopd_kernels":
        return head
    return rest[0] if head == "jaxopd" and rest else None


def level(part: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: a relative import hides its layer"
            found.add(node.module)
            if node.module == "jaxopd":
                found |= {f"jaxopd.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    relative = path.relative_to(ROOT).with_suffix("").parts
    if relative == ("jaxopd", "__init__"):
        return
    own = "jaxopd_kernels" if relative[0] == "kernels" else relative[1]
    for module in imported(path):
        part = part_of(module)
        if part is not None and part != own:
            assert level(part) <= level(own), f"{path}: {own} imports {part} from a higher layer"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small_and_named(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "util", "helpers", "misc", "common"}


def test_kernels_is_a_folder_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names() -> None:
    import jaxopd

    names = "load_model logits load_tokenizer rollout logit_gradient FORMS success_estimates alignment grade"
    for name in names.split():
        assert callable(getattr(jaxopd, name)) or name == "FORMS"
    assert callable(jaxopd.FORMS["reverse_kl"])
