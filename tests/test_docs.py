"""Examples run, pages name what is exported, relative links lead somewhere."""

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

import pyperf_dl
from pyperf_dl import env

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED_PAGES = sorted({*PAGES, *ROOT.glob("*.md")})
STEMS = env.families()
INTEGRATIONS = sorted(
    module.name
    for module in pkgutil.iter_modules([str(ROOT / "pyperf_dl" / "integrations")])
    if not module.name.startswith("_")
)


def public_modules():
    """All modules but those that need triton."""
    found = ["pyperf_dl"]
    for module in pkgutil.walk_packages([str(ROOT / "pyperf_dl")], "pyperf_dl."):
        hidden = module.name.split(".")[1] in ("_launch", "_triton", "_C", "_host") or module.name.endswith("__main__")
        if not hidden:
            found.append(module.name)
    return found


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in public_modules():
        for test in finder.find(importlib.import_module(name), name):
            if test.examples:
                yield test


def run(test):
    test.globs = {"torch": torch, "pyperf_dl": pyperf_dl, "__name__": "example"}
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


@pytest.mark.parametrize("test", list(examples()), ids=lambda test: test.name)
def test_docstring(test):
    peer = getattr(sys.modules[test.globs["__name__"]], "_peer", None)  # of an integration
    if peer:
        pytest.importorskip(peer.distribution.replace("-", "_"), exc_type=ImportError)
    run(test)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    text = re.sub(r"(?m)^```.*$", "", page.read_text())  # a fence would count as output
    parsed = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    if parsed.examples:
        run(parsed)


def exported(module):
    return importlib.import_module(module).__all__


@pytest.mark.parametrize("stem", STEMS)
def test_the_page_of_a_family_names_all_of_it(stem):
    text = (ROOT / "docs" / f"{stem}.md").read_text()
    missing = [name for name in exported(f"pyperf_dl.{stem}") if not re.search(rf"\b{name}\b", text)]
    assert not missing


def test_some_page_names_every_export():
    text = "\n".join(page.read_text() for page in PAGES)
    names = [name for name in pyperf_dl.__all__ if name != "__version__"]
    for module in INTEGRATIONS:
        names += exported(f"pyperf_dl.integrations.{module}")
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


def test_every_export_has_a_docstring_and_functions_have_an_example():
    modules = [f"pyperf_dl.{stem}" for stem in STEMS] + [f"pyperf_dl.integrations.{m}" for m in INTEGRATIONS]
    objects = {name: getattr(importlib.import_module(m), name) for m in modules for name in exported(m)}
    assert not [name for name, thing in objects.items() if not inspect.getdoc(thing)]
    functions = {name: thing for name, thing in objects.items() if inspect.isfunction(thing)}
    assert not [name for name, function in functions.items() if ">>> " not in function.__doc__]


def test_functions_and_modules_have_type_hints():
    for stem in STEMS:
        module = importlib.import_module(f"pyperf_dl.{stem}")
        for name in module.__all__:
            thing = getattr(module, name)
            signature = inspect.signature(thing)
            untyped = [
                p.name
                for p in signature.parameters.values()
                if p.name != "self" and p.annotation is inspect.Parameter.empty
            ]
            assert not untyped, (name, untyped)


# ---- links ----


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^```.*?^```", "", text))


def anchors(page):
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED_PAGES, ids=lambda page: page.name)
def test_links(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or not there.is_relative_to(ROOT) or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken
