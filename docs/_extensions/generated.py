"""Pages that are written from the code before the site is built: API, command line, configuration, compatibility.

They lie in ``docs/generated`` and are not kept in git.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.directives.other import TocTree

from compatibility import page as compatibility_page

ROOT = Path(__file__).parents[2]

#: Public modules, in the order of the navigation, with a title each.
MODULES = {
    "lowrank_dist": "Strategy, module, data, exports",
    "lowrank_dist.methods": "Methods",
    "lowrank_dist.quantization": "Residual formats",
    "lowrank_dist.callbacks": "Callbacks",
    "lowrank_dist.export": "Exports",
    "lowrank_dist.storage": "Files and weight sources",
    "lowrank_dist.linalg": "Linear algebra",
    "lowrank_dist.errors": "Errors",
}
RESULTS = {
    "init": "Initialisation on a CPU",
    "init-avx512": "Initialisation on a CPU with AVX-512",
    "gpu": "Initialisation and layers on an H200",
    "host": "CPU time of a step on the host",
    "tuners": "CPU time of PEFT's tuners on the host",
    "step": "A training step on a CPU",
    "checkpoint": "Checkpoints",
    "data": "Preparing data",
    "dora": "DoRA",
    "startup": "Start-up of commands",
    "quantized_starts": "Starts on a quantized base",
    "formats": "Residual formats",
}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the writer of the pages."""
    app.add_directive("present-toctree", PresentToctree)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}


class PresentToctree(TocTree):
    """A table of contents without the pages that are not there (yet)."""

    def run(self) -> list[nodes.Node]:
        """Leave them out, and go on as ever."""
        self.env.note_reread()  # pages may come and go while this one stays
        directory = Path(self.env.doc2path(self.env.docname)).parent
        there = [index for index, name in enumerate(self.content) if (directory / f"{name}.md").exists()]
        self.content = StringList([self.content[i] for i in there], items=[self.content.items[i] for i in there])
        return super().run()


def write_pages(app: Sphinx) -> None:
    """Write all pages; a page whose text is the same keeps its time, so that it is not built again."""
    directory = Path(app.srcdir) / "generated"
    directory.mkdir(exist_ok=True)
    pages = dict(api_pages())
    pages["command-line"] = command_line()
    pages["configuration"] = configuration()
    pages["compatibility"] = compatibility_page(ROOT)
    pages |= {f"results-{name}": results(name, title) for name, title in RESULTS.items()}
    pages |= {f"example-{file.stem}": example(file) for file in sorted((ROOT / "examples").glob("*.py"))}
    pages |= {f"example-{file.stem}": notebook(file) for file in sorted((ROOT / "examples").glob("*.ipynb"))}
    for old in directory.glob("*.md"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        file = directory / f"{name}.md"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


# -- API ---------------------------------------------------------------------------------------------------------------


def api_pages() -> Iterator[tuple[str, str]]:
    """A page for each public module; a name that two modules export is documented by the narrower one."""
    narrow = {
        id(getattr(importlib.import_module(module), name)): f"{module}.{name}"
        for module in list(MODULES)[1:]
        for name in importlib.import_module(module).__all__
    }
    for module, title in MODULES.items():
        found = importlib.import_module(module)
        lines = [f"# {title}", "", f"```{{module}} {module}", "```", "", first_paragraph(found.__doc__), ""]
        own, elsewhere = [], []
        for name in sorted(found.__all__, key=str.lower):
            value = getattr(found, name)
            if not callable(value):
                continue
            home = narrow.get(id(value), f"{module}.{name}")
            (own if home == f"{module}.{name}" else elsewhere).append((name, home, value))
        if elsewhere:
            lines += ["## Also here", "", "| name | what |", "|---|---|"]
            lines += [f"| {{py:obj}}`{name} <{home}>` | {summary(value)} |" for name, home, value in elsewhere]
            lines += [""]
        for name, home, value in own:
            kind = "autoclass" if inspect.isclass(value) else "autofunction"
            # the members of a module of Lightning or of a strategy are hooks; those of small classes are their use
            members = ["   :members:"] if inspect.isclass(value) and shows_members(value) else []
            lines += [f"## {name}", "", "```{eval-rst}", f".. {kind}:: {home}", *members, "```", ""]
        yield "api-" + (module.partition(".")[2] or "root"), "\n".join(lines)


def shows_members(cls: type) -> bool:
    """Whether the methods of `cls` are documented: not those that Lightning calls."""
    return not any(base.__module__.startswith("lightning.") for base in cls.__mro__)


def first_paragraph(text: str | None) -> str:
    """The first paragraph of a docstring as Markdown."""
    return markdown((inspect.cleandoc(text or "")).split("\n\n")[0])


def summary(value: Any) -> str:
    """The first line of a docstring as a cell of a table."""
    return cell(first_paragraph(value.__doc__))


def markdown(text: str) -> str:
    """Inline literals of reStructuredText as those of Markdown; roles become literals."""
    text = re.sub(r":[\w:]+:`~?(?:[\w.]*\.)?([^`<]+)(?: ?<[^>]*>)?`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def cell(text: str) -> str:
    """Text that stands in one cell."""
    return " ".join(markdown(text).split()).replace("|", "\\|")


# -- the command line --------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with what ``--help`` prints."""
    from lowrank_dist.cli.commands import COMMANDS
    from lowrank_dist.training.fit_cli import TRAINER_COMMANDS

    os.environ["COLUMNS"] = "100"
    lines = [
        "# Command line",
        "",
        "`lowrank-dist COMMAND --help` prints the same. Exit status: 0, or 1 with one line that says what is wrong;",
        "2 for arguments that are not understood. {doc}`Keys of configurations <configuration>` are listed apart.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {cell(command.help)} |" for name, command in COMMANDS.items()),
        "",
    ]
    for name, command in COMMANDS.items():
        lines += [f"## {name}", ""]
        if name in TRAINER_COMMANDS:
            lines += [
                f"{command.help[0].upper()}{command.help[1:]}. It is Lightning's command line: `--config FILE`, any",
                "number of times, later files over earlier ones, and `--KEY VALUE` for any key. `--print_config`",
                "prints the configuration that results. See {doc}`configuration`.",
                "",
            ]
            continue
        module = importlib.import_module(command.run.partition(":")[0])
        parser = module.parser("pissa") if name == "decompose" else module.parser()
        lines += ["```text", parser.format_help().rstrip().replace(str(ROOT) + "/", ""), "```", ""]
    return "\n".join(lines)


# -- keys of a configuration -------------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of a YAML file with its type, default and meaning."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DeepSpeedStrategy

    import lowrank_dist
    from lowrank_dist.methods import METHODS
    from lowrank_dist.quantization.registry import FORMATS

    lines = [
        "# Keys of a configuration",
        "",
        "A configuration is a YAML file of `lowrank-dist fit`. Classes are given as `class_path` and `init_args`; the",
        "tables below list the keys of each. Unknown keys and values of a wrong type are refused by name.",
        "",
        "| key | what |",
        "|---|---|",
        "| `seed_everything` | seed of all random numbers; true takes a random one |",
        "| `trainer` | [flags of the Trainer](#trainer) |",
        "| `trainer.strategy` | [`lowrank_dist.PiSSAStrategy`](#trainer-strategy), or any strategy of Lightning |",
        "| `trainer.callbacks` | a list of [callbacks](#trainer-callbacks) |",
        "| `model` | [keys of `CausalLMModule`](#model), or a `class_path` with the `init_args` of another module |",
        "| `data` | [keys of `SFTDataModule`](#data) |",
        "| `ckpt_path` | checkpoint to resume from: a directory, or `last` for the newest complete one |",
        "| `weights_only` | no effect: reading a checkpoint never runs code |",
        "",
        "## trainer",
        "",
        *key_table(L.Trainer, ("strategy", "callbacks")),
        "## trainer.strategy",
        "",
        "`class_path: lowrank_dist.PiSSAStrategy`, with these `init_args`:",
        "",
        *key_table(lowrank_dist.PiSSAStrategy),
        "### Keys of DeepSpeed",
        "",
        "These stand among the same `init_args`; Lightning's `DeepSpeedStrategy` documents them.",
        "",
        *key_table(DeepSpeedStrategy, ("stage", "accelerator", "precision_plugin", "parallel_devices")),
        "### init",
        "",
        "The method: `class_path: lowrank_dist.PiSSA`, or another of these.",
        "",
    ]
    for name, method in METHODS.items():
        lines += [f"#### {method.__name__}", "", f"`--method {name}` of `decompose`. {summary(method)}", ""]
        lines += key_table(method)
    lines += [
        "### quantization",
        "",
        "`class_path: lowrank_dist.NF4`, or another of these; null: dense; `as stored`: {doc}`../guides/quantized`.",
        "",
    ]
    for name, residual in FORMATS.items():
        lines += [f"#### {residual.__name__}", "", f"`--quantization {name}` of `decompose`. {summary(residual)}", ""]
        lines += key_table(residual)
    lines += [
        "### calibration",
        "",
        "`class_path: lowrank_dist.Calibration`.",
        "",
        *key_table(lowrank_dist.Calibration),
    ]
    lines += ["## trainer.callbacks", "", "Any callback of Lightning that {doc}`../lightning` allows, and these.", ""]
    for name in importlib.import_module("lowrank_dist.callbacks").__all__:
        found = getattr(lowrank_dist, name)
        lines += [f"### {name}", "", f"`class_path: lowrank_dist.{name}`. {summary(found)}", "", *key_table(found)]
        if issubclass(found, ModelCheckpoint):
            lines += ["Further keys are those of Lightning's `ModelCheckpoint`:", "", *key_table(ModelCheckpoint)]
    lines += ["## model", "", *key_table(lowrank_dist.CausalLMModule)]
    for found in (lowrank_dist.PreferenceModule, lowrank_dist.SequenceClassificationModule):
        lines += [f"### {found.__name__}", "", f"`class_path: lowrank_dist.{found.__name__}`. {summary(found)}", ""]
        lines += [*key_table(found), "Further keys are those of `CausalLMModule` up to `gradient_checkpointing`.", ""]
    lines += ["## data", "", *key_table(lowrank_dist.SFTDataModule)]
    return "\n".join(lines)


def key_table(cls: type, left_out: Sequence[str] = ()) -> list[str]:
    """The arguments of `cls` with type, default and what the docstring says."""
    told = described(cls)
    rows = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in left_out:
            continue
        kind = "" if parameter.annotation is parameter.empty else short_type(parameter.annotation)
        default = "required" if parameter.default is parameter.empty else default_of(cls, name, parameter.default)
        rows.append(f"| `{name}` | {', '.join(filter(None, (kind, default)))} | {cell(told.get(name, ''))} |")
    if not rows:
        return ["No keys.", ""]
    return ["| key | type, default | |", "|---|---|---|", *rows, ""]


def described(cls: type) -> dict[str, str]:
    """What the docstrings of `cls` and of its bases say about each argument."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        for text in (base.__dict__.get("__init__", None) and base.__init__.__doc__, base.__doc__):
            for parameter in docstring_parser.parse(text or "").params:
                for name in parameter.arg_name.split(", "):
                    found[name] = first_block(parameter.description or "")
    return found


def first_block(text: str) -> str:
    """Text up to the first list, example or directive."""
    return re.split(r"\n\s*\n|\n\s*(?:[-*]|\.\.)\s|::\n", text)[0]


def short_type(annotation: Any) -> str:
    """A type as code, without the names of modules."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)
    for long, short in (("str | PathLike[str]", "path"), ("str | PathLike", "path"), ("Union[str, PathLike]", "path")):
        text = text.replace(long, short)
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text)
    return f"`{text}`".replace("|", "\\|") if text else ""


def default_of(cls: type, name: str, value: Any) -> str:
    """A default as code; that of a dataclass may be made by a factory."""
    if dataclasses.is_dataclass(cls) and "factory" in repr(value):
        value = next(field for field in dataclasses.fields(cls) if field.name == name).default_factory()  # type: ignore
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value).strip("'")
    return f"`{text}`".replace("|", "\\|") if text else "`''`"


# -- examples ----------------------------------------------------------------------------------------------------------


def example(file: Path) -> str:
    """A program of ``examples``: its first line is the title, the rest of its docstring the text."""
    text = file.read_text(encoding="utf-8")
    told = ast.get_docstring(ast.parse(text)) or ""
    title, _, rest = told.partition("\n\n")
    code = text[text.index('"""', 3) + 3 :].strip()
    return f"# {title.rstrip('.')}\n\n{markdown(rest)}\n\n`examples/{file.name}`:\n\n```python\n{code}\n```\n"


def notebook(file: Path) -> str:
    """The cells of a notebook, without output."""
    found = [f"`examples/{file.name}`:"]
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        found.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    found[:2] = [found[1], found[0]]  # the title comes first
    return "\n\n".join(found) + "\n"


# -- results -----------------------------------------------------------------------------------------------------------


def results(name: str, title: str) -> str:
    """A report of ``benchmarks/results`` under a title of the site."""
    text = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text(encoding="utf-8")
    return re.sub(r"\A# .*\n", f"# {title}\n", text)
