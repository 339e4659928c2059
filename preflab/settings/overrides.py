"""The overrides of a command line: KEY=VALUE words, checked before torch is imported."""

import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Transformer
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError

from preflab.settings.keys import (
    CONFIG_DIR,
    GROUPS,
    ROOT,
    flat_keys,
    load_yaml,
    option_file,
    option_keys,
    options,
)
from preflab.settings.other_words import translate
from preflab.settings.schema import RULES, open_parent, parse_value
from preflab.settings.value_types import Mapping, shown
from utils import ConfigError, nearest

SWEPT = 1000  # values of a sweep over one key that are checked


def model_overrides(name: str) -> list[str]:
    """The settings of config/model/ for a model that has some, by its name there or on the hub;
    else the model as it is."""
    for path in sorted((CONFIG_DIR / "model").glob("*.yaml")):
        settings = load_yaml(path)
        known = OmegaConf.select(settings, "model.name_or_path") or settings.get("name_or_path")
        if name in (path.stem, known) or (
            known and Path(known).is_dir() and Path(name).resolve() == Path(known).resolve()
        ):
            return [f"model={path.stem}"]
    return ["model=blank_model", f"model.name_or_path={quoted(name)}"]


def quoted(value: str) -> str:
    """A value as hydra reads it back, whatever it holds."""
    if re.fullmatch(r"[\w./+-]+", value, re.ASCII):
        return value
    return (
        "'"
        + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
        + "'"
    )


@dataclass(frozen=True)
class Sources:
    """Where hydra looks for yaml files: the folders, in its order, and the name of the config that
    it starts from."""

    folders: tuple[Path, ...] = (CONFIG_DIR,)
    config_name: str = "config"

    def groups(self) -> set[str]:
        """The groups of all folders; users' folders may have more than ours."""
        subfolders = {
            path.parent.relative_to(folder).as_posix()
            for folder in self.folders
            for path in folder.rglob("*.yaml")
        }
        return {*GROUPS, *subfolders} - {"."}

    def defaults(self) -> dict[str, list[str]]:
        """The options that the config takes for each group."""
        path = option_file("", self.config_name.removesuffix(".yaml"), self.folders)
        return self._defaults_of(path or CONFIG_DIR / "config.yaml")

    def recipe(self, name: str) -> dict[str, list[str]]:
        """The options that a recipe takes, those of the recipes it builds on included."""
        path = option_file("experiment", name, self.folders)
        return self._defaults_of(path) if path else {}

    def _defaults_of(self, path: Path) -> dict[str, list[str]]:
        chosen = {}
        config = load_yaml(path)
        for entry in config.get("defaults", ()) if OmegaConf.is_dict(config) else ():
            if isinstance(entry, str) and path.parent.name == "experiment":
                chosen |= self.recipe(entry) if entry not in ("_self_", path.stem) else {}
            elif OmegaConf.is_dict(entry):
                for word, value in entry.items():
                    group = str(word).removeprefix("override ").lstrip("/").split("@")[0]
                    chosen[group] = _named(value)
        return chosen


def _named(value: Any, accepted: Iterable[str] = ()) -> list[str]:
    """The options in the value of a group: one, several together (`[a,b]`), or those of a sweep.

    accepted: what there is, for a pattern such as glob(*).
    """
    if isinstance(value, Glob):
        return list(value.filter(sorted(accepted)))
    value = value.list if isinstance(value, ChoiceSweep) else value
    if isinstance(value, list) or OmegaConf.is_list(value):
        return [option for entry in value for option in _named(entry, accepted)]
    return [] if value is None else [str(value)]


def check_overrides(words: Sequence[str], sources: Sources = Sources()) -> None:
    """Refuse words that hydra cannot read, unknown keys and options, and values of another type.

    words: KEY=VALUE, as hydra takes them. Raises ConfigError, which names what is nearest.
    """
    overrides = _parse(words)
    searched = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    more = tuple(Path(str(entry).removeprefix("file://")) for given in searched for entry in given)
    sources = Sources(sources.folders + more, sources.config_name)
    groups = sources.groups()
    given = {}
    for override in overrides:
        if (group := override.key_or_group) in groups and not override.is_delete():
            accepted = options(group, sources.folders)
            value = override.value()
            if isinstance(value, list) and None in value:
                raise ConfigError(f"{group}={shown(value)}: null names no file in config/{group}/")
            named = _named(value, accepted)
            given[group] = given.get(group, []) + named
            for name in named:
                if name not in accepted:
                    raise ConfigError(
                        f"{group}={shown(name)}: no such file in config/{group}/;"
                        f" {nearest(name, accepted)}"
                    )
    chosen = _chosen(given, sources)
    keys = _known_keys(chosen, sources)
    for override in overrides:
        key = override.key_or_group
        if key in groups or re.match(r"hydra($|[./])", key):
            continue
        if key not in keys:
            raise ConfigError(_unknown(key, keys, chosen))
        _check_form(override)
        _check_interpolations(key, override.value())
        if key in RULES and not override.is_delete():
            for value in islice(_values(override), SWEPT):
                _check_value(key, value)


def chosen_options(words: Sequence[str], sources: Sources) -> dict[str, list[str]]:
    """The options of `loss` and `reward` that a command line takes."""
    given = {
        override.key_or_group: _named(override.value(), options(override.key_or_group))
        for override in _parse(words)
        if override.key_or_group in GROUPS
    }
    return _chosen(given, sources)


def _chosen(given: dict[str, list[str]], sources: Sources) -> dict[str, list[str]]:
    """The options of `loss` and `reward`: those of the command line, else of its recipes, else of
    the config."""
    recipes = [sources.recipe(name) for name in given.get("experiment", ())]
    defaults = sources.defaults()
    return {
        group: given.get(group)
        or [name for recipe in recipes for name in recipe.get(group, ())]
        or defaults.get(group, [])
        for group in ("loss", "reward")
    }


def _known_keys(chosen: dict[str, list[str]], sources: Sources) -> set[str]:
    """The keys of config.yaml, and those that the chosen options add."""
    keys = set(RULES)
    keys |= flat_keys(load_yaml(CONFIG_DIR / "config.yaml")) - {"defaults"}
    for group, names in chosen.items():
        for name in names or options(group, sources.folders):
            keys |= option_keys(group, name, sources.folders)
    return {key for key in keys if not key.startswith("hydra")}


def _check_value(key: str, value: Any) -> None:
    """A value, or each of those in `group={key: value}`, has the type of its setting."""
    if key not in RULES:
        raise ConfigError(_unknown(key, set(RULES), {}))
    if RULES[key].accepts is None and isinstance(value, dict):
        for name, entry in value.items():
            _check_value(f"{key}.{name}", entry)
    elif "${" not in str(value):  # others are checked once they are resolved
        parse_value(key, value)


def _check_form(override: Override) -> None:
    """Refuse what hydra would refuse later, with a message that says more."""
    key, word = override.key_or_group, _in_a_line(override.input_line or "")
    if isinstance(override.value(), Glob):
        raise ConfigError(f"{word}: patterns are for groups such as loss; give the values")
    if override.is_delete() and (key in RULES or override.value() is not None):
        raise ConfigError(
            f"{word}: only entries of a loss or a reward can be left out, as ~{key}, for their"
            f" default; type {key}=VALUE"
        )
    if override.is_add() and not override.is_force_add():
        raise ConfigError(f"{word}: {key} is in the config already; type it without the +")


def _check_interpolations(key: str, value: Any) -> None:
    """Refuse a `${` that does not begin a complete `${...}`."""
    try:
        if "${" in str(value):
            OmegaConf.create({"value": value})
    except GrammarParseError as error:
        raise ConfigError(
            f"{key}={shown(value)}: {str(error).splitlines()[0]}; a reference to another key is"
            " ${KEY}, and \\${ stands for the characters themselves"
        ) from error


def _values(override: Override) -> Iterator[Any]:
    if override.is_choice_sweep() or override.is_range_sweep():
        return override.sweep_iterator(transformer=_unquoted)
    return iter(() if override.is_sweep_override() else (override.value(),))


def _unquoted(value: Any) -> Any:
    return Override._convert_value(Transformer.identity(value))


# ------------------------------------------------------------------------------------ unknown keys


def _unknown(key: str, keys: set[str], chosen: dict[str, list[str]]) -> str:
    """The message for an unknown key, with a few keys that may be meant."""
    if (parent := open_parent(key)) not in (None, "loss", "reward"):
        setting = key.removeprefix(f"{parent}.")
        entries = (
            f"{setting}: VALUE" if isinstance(RULES[parent].accepts, Mapping) else "name: NAME, ..."
        )
        return f'unknown key {key}; {parent} is set as a whole: "{parent}={{{entries}}}"'
    if advice := translate(key, keys):
        return f"unknown key {key}; {advice}"
    group = key.split(".")[0]
    if group in chosen and "." in key:
        common = set(load_yaml(CONFIG_DIR / "config.yaml")[group])  # to every option; said last
        own = [name.removeprefix(f"{group}.") for name in keys if name.startswith(f"{group}.")]
        own.sort(key=lambda name: (name in common, name))
        close = difflib.get_close_matches(key.removeprefix(f"{group}."), own, n=3)
        guess = f"did you mean {', '.join(f'{group}.{name}' for name in close)}? " if close else ""
        option = f"{group}={','.join(chosen[group])}"
        return f"unknown key {key}; {guess}settings of {option}: {', '.join(own)}"
    inner = sorted(name for name in keys if name.endswith(f".{key}"))
    close = difflib.get_close_matches(key, sorted(keys), n=3)
    if close or inner:
        return f"unknown key {key}; did you mean {', '.join([*inner, *close][:3])}?"
    if advice := translate(key, keys, cutoff=0.85):
        return f"unknown key {key}; {advice}"
    near = difflib.get_close_matches(key, sorted(keys), n=3, cutoff=0.0)
    return (
        f"unknown key {key}; the nearest are {', '.join(near)}, and python train.py --help lists"
        " all"
    )


def check_keys(config: DictConfig) -> None:
    """Raise ConfigError for a key of a composed config that the schema does not know.

    Entries of `loss` and `reward` are matched with their functions' signatures elsewhere.
    """
    for key in sorted(flat_keys(config)):
        if key not in RULES and open_parent(key) is None:
            raise ConfigError(_unknown(key, set(RULES), {}))


# ------------------------------------------------------------------- words that hydra cannot read


def _parse(words: Sequence[str]) -> list[Override]:
    """The overrides of the words of a command line."""
    words = list(words)
    for word in words:
        if word == "=" or ("=" not in word and not word.startswith("~")):
            raise ConfigError(_without_key(word, words))
    for word, following in pairwise(words):
        key = word.split("=")[0]
        if following.split("=")[0] == key and _was_expanded(key, word, following):
            joined = ",".join(w.split("=", 1)[1] for w in words if w.split("=")[0] == key)
            raise ConfigError(
                f"{key} is given twice, as the shell does it with braces; put the word in quotes:"
                f' "{key}={{{joined}}}"'
            )
    parser = OverridesParser.create()
    overrides = []
    for word in words:
        try:
            overrides += parser.parse_overrides([word])
        except (OverrideParseException, ValueError) as error:  # or a number of 5000 digits
            raise ConfigError(
                f"{_in_a_line(word)}: hydra cannot read this ({str(error).splitlines()[0]}); type"
                f" {_in_a_line(_quoted_form(word))}"
            ) from error
    return overrides


def _in_a_line(word: str) -> str:
    word = word.replace("\n", "\\n")
    return word if len(word) <= 1000 else f"{word[:1000]}..."


def _was_expanded(key: str, *words: str) -> bool:
    """Whether a shell made these words of `key={a: 1,b: 2}`."""
    name = key.lstrip("+")
    accepts_entries = name in RULES and "{" in str(RULES[name].accepts)
    return accepts_entries and all(re.match(r"\w+:", w.split("=", 1)[1]) for w in words)


def _quoted_form(word: str) -> str:
    """A word with quotes around what hydra cannot read, and for the shell."""
    key, value = word.split("=", 1)
    if re.fullmatch(r"\[[^\[\]{}'\"]*\]", value):
        entries = [entry.strip() for entry in value[1:-1].split(",")]
        value = "[" + ",".join(quoted(entry) for entry in entries if entry) + "]"
    else:
        value = quoted(value)
    return _for_shell(f"{key}={value}")


def _for_shell(word: str) -> str:
    return shlex.quote(word) if re.search(r'[$`"\\!]', word) else f'"{word}"'


def _without_key(word: str, words: list[str]) -> str:
    """The message for a word without `=`."""
    at = words.index(word)
    before = words[at - 1] if at else ""
    if before.count("{") > before.count("}") or before.count("[") > before.count("]"):
        end = next((i for i in range(at, len(words)) if words[i][-1:] in "]}"), len(words) - 1)
        whole = " ".join(words[at - 1 : end + 1])
        return (
            f"{before}: the shell ends the word at a space; put it in quotes: {_for_shell(whole)}"
        )
    if before.rstrip("=") in RULES and (before.endswith("=") or word == "="):
        value = next((w for w in words[at:] if w != "="), "VALUE")
        return f"{before}: the shell ends the word at a space; type {before.rstrip('=')}={value}"
    if word in RULES:
        value = next((w for w in words[at + 1 :] if w.strip("=") and "=" not in w), "VALUE")
        return f"{word} has no value; type {word}={value}"
    if meant := _meant_by(word):
        return f"{word} has no key; did you mean {meant}?"
    return f"{word} has no key; settings are typed KEY=VALUE, and python train.py --help lists them"


def _meant_by(word: str) -> str | None:
    """The override that a value on its own may stand for."""
    values: dict[str, Iterable[str]] = {
        "loss": options("loss"),
        "function": ("train", "eval", "online", "plan"),
        "model": options("model"),
        "reward": options("reward"),
        "experiment": options("experiment"),
        "trainer": _trainers(),
    }
    for cutoff in (1.0, 0.8):
        for key, names in values.items():
            if close := difflib.get_close_matches(word, list(names), n=1, cutoff=cutoff):
                return f"{key}={close[0]}"
    return None


def _trainers() -> list[str]:
    """The classes of trainers.py, which imports torch and is therefore read and not imported."""
    source = (ROOT / "trainers.py").read_text(encoding="utf-8")
    return re.findall(r"^class (\w+)", source, flags=re.MULTILINE)


def fail(error: Exception) -> None:
    """Print what is wrong, without a traceback, and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
