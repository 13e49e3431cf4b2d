"""The public names: complete, in order, and cheap to import."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import gradwatch
from gradwatch import bounds, errors, interfaces, monitors, presets, records, rules, sinks

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
FRAMEWORKS = (
    "accelerate",
    "lightning",
    "matplotlib",
    "pandas",
    "plotly",
    "pytorch_lightning",
    "sklearn",
    "tensorboard",
    "tqdm",
    "transformers",
    "wandb",
)


def ruff_order(name: str) -> tuple[bool, bool, str]:
    """SCREAMING_CASE first, then CamelCase, then the rest."""
    return not name.isupper(), not name[0].isupper(), name


def public(module: ModuleType) -> set[str]:
    """What somebody sees who types the module's name and a dot, without its submodules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@pytest.mark.parametrize(
    "module", [gradwatch, records, monitors, bounds, rules, sinks], ids=lambda item: item.__name__
)
def test_all_is_sorted_and_complete(module: ModuleType) -> None:
    names: list[str] = module.__all__
    assert names == sorted(names, key=ruff_order)
    assert len(set(names)) == len(names)
    submodules = {name for name in names if inspect.ismodule(getattr(module, name))}
    assert set(names) - submodules == public(module)


def test_all_that_a_user_needs_is_at_the_top() -> None:
    for module in (errors, interfaces):
        own = {
            name
            for name, value in vars(module).items()
            if inspect.isclass(value) and value.__module__ == module.__name__
        }
        assert own <= set(gradwatch.__all__)
    assert gradwatch.presets is presets


@pytest.mark.parametrize("name", gradwatch.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(gradwatch, name))


@pytest.mark.parametrize("name", monitors.__all__)
def test_every_monitor_has_a_page_that_names_its_metrics(name: str) -> None:
    monitor = getattr(monitors, name)
    page = ROOT / "docs" / "monitors" / f"{monitor.__module__.rpartition('.')[2]}.md"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for text in (page.read_text(encoding="utf-8"), readme):
        assert f"`{name}`" in text
        assert all(f"`{metric}`" in text for metric in monitor.metrics)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        assert "://" in target or (page.parent / target).exists(), target


def test_the_package_is_typed() -> None:
    assert (Path(gradwatch.__file__).parent / "py.typed").exists()


def test_import_needs_no_framework() -> None:
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({FRAMEWORKS!r}))\n"  # None makes an import fail
        "import gradwatch\n"
        f"assert not any(sys.modules.get(name) for name in {FRAMEWORKS!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_import_loads_no_adapter() -> None:
    code = (
        "import sys, gradwatch\n"
        "loaded = [name for name in sys.modules if name.startswith('gradwatch_')]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
