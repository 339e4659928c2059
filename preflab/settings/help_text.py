"""The text of `--help`: every key, its default, what it accepts and what it means."""

import dataclasses
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from preflab.settings.keys import CONFIG_DIR, GROUPS, is_global, load_yaml, option_file, options
from preflab.settings.overrides import Sources, chosen_options
from preflab.settings.schema import RULES, TOPICS, Settings
from preflab.settings.value_types import shown

WIDTH = 100

HEADER = """\
python {program} [KEY=VALUE ...]

  python train.py loss=odpo loss.alpha=0.5                        one run
  python train.py -m loss=dpo,odpo seed=0,1                       a sweep
  python train.py function=eval model.archive=RUN                 samples and losses of a run

Options of hydra: --cfg job prints the composed config and runs nothing; -m sweeps over a,b,c;
--config-dir DIR adds a folder with loss/, model/, reward/ or experiment/ files of your own;
-sc install=bash sets up completion in the shell; --hydra-help lists the rest.

Defaults below are those of config/config.yaml. The options of a group set others: the default
model=tiny has a larger lr. --cfg job shows what a command line amounts to."""


def help_text(program: str, words: Sequence[str], sources: Sources) -> str:
    """The help of an entry point, at most 100 columns wide.

    words: the overrides beside `--help`; with loss=NAME the settings of that loss are shown.
    """
    comments = comments_above(CONFIG_DIR / "config.yaml")
    defaults = load_yaml(CONFIG_DIR / "config.yaml")
    parts = [HEADER.format(program=program), _group_options(sources)]

    def section(title: str, keys: Sequence[str]) -> str:
        entries = (
            _entry(key, OmegaConf.to_container(defaults), comments.get(key, "")) for key in keys
        )
        return "\n".join([title, *entries])

    for topic in TOPICS:
        keys = [field.name for field in dataclasses.fields(topic)]
        parts.append(section(topic.__doc__.splitlines()[0].rstrip("."), keys))
    topics = {field.name for topic in TOPICS for field in dataclasses.fields(topic)}
    for field in dataclasses.fields(Settings):
        if field.name not in topics and field.name not in ("loss", "reward"):
            keys = [key for key in RULES if key.startswith(f"{field.name}.")]
            keys = [key for key in keys if RULES[key].accepts is not None]
            parts.append(section(_wrapped(f"{field.name}: {comments[field.name]}", 0), keys))
    for group, names in chosen_options(words, sources).items():
        common = [key for key in comments if key.startswith(f"{group}.")]
        parts.append(section(_wrapped(f"{group}: {comments[group]}", 0), common))
        parts += [_option_section(group, name, sources) for name in names]
    return "\n\n".join(parts)


def comments_above(path: Path) -> dict[str, str]:
    """The comment above each key of a yaml file, in one line, by the key's dotted name."""
    comments, above, parents = {}, [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        key = re.match(r"(\s*)([\w-]+):", line)
        if line.lstrip().startswith("#"):
            above.append(line.lstrip().removeprefix("#").strip())
        elif key:
            depth = len(key[1])
            parents = [(d, name) for d, name in parents if d < depth] + [(depth, key[2])]
            comments[".".join(name for _, name in parents)] = " ".join(above)
            above = []
        else:
            above = []
    return comments


def _group_options(sources: Sources) -> str:
    lines = ["Files of config/ that set several keys at once"]
    defaults = sources.defaults()
    for group in GROUPS:
        names = ", ".join(
            f"{name} (default)" if name in defaults.get(group, ()) else name
            for name in sorted(options(group, sources.folders))
        )
        lines.append(
            textwrap.fill(
                f"  {group + '=':13}{names}",
                WIDTH,
                subsequent_indent=" " * 15,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )
    return "\n".join(lines)


def _option_section(group: str, name: str, sources: Sources) -> str:
    """The settings that an option of `loss` or `reward` adds."""
    path = option_file(group, name, sources.folders)
    if path is None:
        return f"{group}={name}: no such file in config/{group}/"
    values, comments = OmegaConf.to_container(load_yaml(path)), comments_above(path)
    prefix = f"{group}." if is_global(path) else ""
    entries = [f"{group}={name}: {comments.get(f'{prefix}name') or 'its settings'}"]
    for key, comment in comments.items():
        setting = key.removeprefix(prefix)
        if setting not in ("name", "defaults", group):
            entries.append(_entry(f"{group}.{setting}", {group: values}, comment))
    return "\n".join([_wrapped(entries[0], 0), *entries[1:]])


def _entry(key: str, values: dict, comment: str) -> str:
    """KEY=DEFAULT, what is accepted, and below it the meaning."""
    value = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    default = re.sub(r"\$\{here:(.*?)\}", r"\1", shown(value))
    line = f"  {key}={default}"
    if key in RULES:
        line = f"{line:34}  {RULES[key].accepts}"
    meaning = [_wrapped(comment, 6)] if comment else []
    return "\n".join([_wrapped(line, 0, further=36), *meaning])


def _wrapped(text: str, indent: int, further: int | None = None) -> str:
    """Lines of at most WIDTH columns. further: indent of all lines but the first."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if further is None else further),
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
