"""What holds for the arguments of every script."""

import engine

import ast
import dataclasses
import inspect
import pkgutil
import re
from functools import cache
from importlib import import_module
from itertools import pairwise
from textwrap import dedent

getsource = cache(inspect.getsource)  # it parses a whole file for each class


def groups(command):
    """{name: dataclass} of a script's argument groups."""
    return {group.name: group.default_factory for group in dataclasses.fields(command)}


def flags_of(group):
    """The fields of a group that are flags."""
    return [field for field in dataclasses.fields(group) if field.init]


def flags(command):
    """Names of all flags."""
    return {field.name for group in groups(command).values() for field in flags_of(group)}


def assert_used(commands, script, elsewhere=()):
    """A flag that nobody reads is a lie: each field is read, by the script or in engine/, outside the classes that
    define it."""
    modules = [import_module(f"engine.{module.name}") for module in pkgutil.iter_modules(engine.__path__)]
    source = "".join(getsource(module) for module in [script, *modules])
    kinds = {kind for command in commands for group in groups(command).values() for kind in group.__mro__[:-1]}
    for kind in kinds:
        source = source.replace(getsource(kind), "")
    names = "args|asked|data|model|target|recipe|run|choice|probe|head_args|labels|encoder"
    for command in commands:
        for group in groups(command).values():
            for field in flags_of(group):
                read = re.search(rf"\b({names})\.{field.name}\b", source)
                assert read or field.name in elsewhere, field.name


def assert_documented(command, help_text):
    """Each field has a docstring of its own and a place in its group of --help, which says what None stands for."""
    for name, group in groups(command).items():
        assert f"{name} options" in help_text
        documented = set()
        for kind in group.__mro__[:-1]:
            (body,) = (node.body for node in ast.parse(dedent(getsource(kind))).body)  # of a class within another, too
            pairs = pairwise(body)
            documented |= {a.target.id for a, b in pairs if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
        for field in flags_of(group):
            positional = f"{field.name.removesuffix('s').upper()} ["  # RUN [RUN ...]
            assert f"--{field.name.replace('_', '-')}" in help_text or positional in help_text
            assert field.name in documented, field.name
    assert "None" not in help_text, "what None stands for is said in words"
