"""The command line of a pipeline: `python -m pipelines.NAME VERB [KEY=VALUE ...]`.

Settings are composed by Hydra's compose API: `sys.argv` stays as it is, since Lightning's launcher
runs it again in each process, and no output folder appears. Paths never meet Hydra's grammar.
"""

import contextlib
import functools
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.shared.conf_tree import Group, closest, conf_folder, format_settings, read_root
from pipelines.shared.errors import InputError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

Config = dict[str, Any]

# patterns are full of brackets and signs that mean something else in Hydra's grammar
TEXT_KEYS = ("pattern.expression",)

# what stands in a table may hold any sign, and rows are chosen by any column's name
TABLE_SECTIONS = ("columns", "where", "external")


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that a pipeline does.

    `function` ("package.module:name") is imported when it runs; it takes the resolved configuration
    as a plain nested dict (with `verb`, the name of the root file `config`) and returns an exit
    code. Values of `path_keys` are taken as they are, but for a leading `~`. `selects` maps a path
    key to the choice that giving it implies: `{"slides": "data=slides"}`.
    """

    summary: str
    config: str
    function: str
    path_keys: tuple[str, ...]
    required: tuple[str, ...] = ()
    selects: Mapping[str, str] = field(default_factory=dict)
    examples: tuple[str, ...] = ()


def main(pipeline: str, verbs: Mapping[str, Verb], argv: Sequence[str] | None = None) -> int:
    """Run the verb that the arguments name and return the exit code.

    0: all well, 2: wrong input (one message on stderr), 3: some items failed, 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(pipeline, verbs, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


@dataclass(frozen=True, slots=True)
class _Request:
    """Arguments, sorted."""

    paths: dict[str, str]
    overrides: list[str]
    show_config: bool
    multirun: bool


def _dispatch(pipeline: str, verbs: Mapping[str, Verb], arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_pipeline_help(pipeline, verbs))
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in verbs:
        raise InputError(
            f"unknown verb {name!r}: use {' or '.join(verbs)}{closest(name, list(verbs))}"
        )
    verb = verbs[name]
    if any(argument in ("-h", "--help") for argument in rest):
        print(_verb_help(pipeline, name, verb))
        return 0
    request = _parse(verb, rest)
    if request.multirun:
        return _run_all(verb, request)
    config = _compose(verb, request.overrides, request.paths)
    if request.show_config:
        print(_to_yaml(config), end="")
        return 0
    return _run(verb, config)


def _parse(verb: Verb, arguments: Sequence[str]) -> _Request:
    root = read_root(verb.config)
    groups = {group.name: group for group in root.groups}
    sections = {item.key for item in root.settings}.intersection(TABLE_SECTIONS)
    paths: dict[str, str] = {}
    overrides: list[str] = []
    flags: set[str] = set()
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if argument in _FLAGS:
            flags.add(_FLAGS[argument])
        elif argument.startswith("-"):
            raise InputError(f"unknown option {argument}: the options are {', '.join(_FLAGS)}")
        elif not sign or argument.startswith("~"):
            raise InputError(
                f"{argument!r} is not a setting: write KEY=VALUE (quote values with spaces)"
            )
        elif key in verb.path_keys:
            paths[key] = _path(key, value)
        elif key.partition(".")[0] in sections and "." in key:
            overrides.append(_quote_table_text(key, value))
        else:
            overrides.append(_to_hydra(key, value, groups))
    overrides = _implied(verb, paths, overrides, groups) + overrides
    return _Request(paths, overrides, "cfg" in flags, "multirun" in flags)


def _path(key: str, value: str) -> str:
    if not value:
        raise InputError(f"{key}= is empty: give a path")
    return os.path.expanduser(value)


def _to_hydra(key: str, value: str, groups: Mapping[str, Group]) -> str:
    if key in groups:
        return f"{groups[key].target}={value}"
    if key in TEXT_KEYS and value[:1] not in ("[", "'", '"'):
        escaped = value.replace('"', '\\"')
        return f'{key}="{escaped}"'
    return f"{key}={value}"


def _quote_table_text(key: str, value: str) -> str:
    """Quote what stands in a table; of its columns the configuration knows those of `columns`."""
    if value[:1] not in ("'", '"'):
        value = '"' + value.replace('"', '\\"') + '"'
    return f"{key}={value}" if key.startswith("columns.") else f"++{key}={value}"


def _implied(
    verb: Verb, paths: Mapping[str, str], overrides: Sequence[str], groups: Mapping[str, Group]
) -> list[str]:
    """Return the choices that the given paths make, unless the user made them."""
    implied = []
    for key, choice in verb.selects.items():
        name, _, option = choice.partition("=")
        given = [text for text in overrides if text.startswith(f"{groups[name].target}=")]
        if key in paths and any(not text.endswith(f"={option}") for text in given):
            raise InputError(f"{key}= goes with {choice}, not with {name}={given[0].split('=')[1]}")
        if key in paths and not given:
            implied.append(_to_hydra(name, option, groups))
    return implied


def _compose(verb: Verb, overrides: Sequence[str], paths: Mapping[str, str]) -> Config:
    """Compose the configuration, and say which setting is wrong if one is."""
    parsed = [_parse_override(text) for text in overrides]
    root = read_root(verb.config)
    groups = {group.target: group for group in root.groups}
    for override in parsed:
        _check_choice(override, groups)
    chosen = [item.input_line for item in parsed if item.get_key_element() in groups]
    defaults = _resolve(verb, chosen, partial=True)
    known = list(_flatten(defaults))
    names = [group.name for group in root.groups]
    for override in parsed:
        key = override.get_key_element()
        if key not in groups and not key.startswith("+") and key not in known:
            raise InputError(_unknown_key(key, known, names))
    config = _resolve(verb, overrides, partial=False)
    for override in parsed:
        _check_kind(override.key_or_group, _flatten(defaults), _flatten(config))
    for key, value in paths.items():
        _set_path(config, key, value)
    for key in verb.required:
        if config[key] is None:
            needed = " ".join(f"{name}=..." for name in verb.required)
            raise InputError(f"{key}= is missing: {verb.config.split('_')[1]} needs {needed}")
    config["verb"] = verb.config
    return config


def _parse_override(text: str) -> "Override":
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override: Override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        key, _, value = text.partition("=")
        raise InputError(
            f"{key}={value} cannot be read ({str(error).splitlines()[0]}); put a value with signs "
            f"in quotes twice, as {key}='\"{value}\"'"
        ) from error
    return override


def _check_choice(override: "Override", groups: Mapping[str, Group]) -> None:
    if override.is_sweep_override():
        raise InputError(f"{override.input_line}: several values at once need --multirun")
    group = groups.get(override.get_key_element())
    if group is None:
        return
    value = override.get_value_element_as_str()
    if value in group.options or (value == "null" and group.default is None):
        return
    raise InputError(
        f"unknown {group.name} {value!r}{closest(value, list(group.options))}\n"
        f"{group.name} is one of: {', '.join(group.options)}"
    )


def _unknown_key(key: str, known: Sequence[str], groups: Sequence[str]) -> str:
    settings = [name for name in known if "." not in name and name not in groups]
    message = f"unknown setting {key!r}{closest(key, list(dict.fromkeys([*known, *groups])))}\n"
    prefix = key.rpartition(".")[0]
    below = [name for name in known if prefix and name.startswith(f"{prefix}.")]
    if below:
        return message + f"{prefix} has: {', '.join(below)}"
    choices = f"\nchoices: {', '.join(groups)}" if groups else ""
    return message + f"settings: {', '.join(settings)}{choices}"


def _check_kind(key: str, defaults: Mapping[str, object], config: Mapping[str, object]) -> None:
    default, value = defaults.get(key), config.get(key)
    if default is None or key in TEXT_KEYS:
        return
    for kind, (allowed, title) in _KINDS.items():
        if type(default) is kind and type(value) not in allowed:
            raise InputError(f"{key} takes {title}, such as {default}; got {value!r}")


def _set_path(config: Config, key: str, value: str) -> None:
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node.get(parent, {})
    if last not in node:
        raise InputError(f"{key}= has no meaning here; see --cfg for the settings there are")
    node[last] = value


def _resolve(verb: Verb, overrides: Sequence[str], *, partial: bool) -> Config:
    """Compose with Hydra into plain values; `partial` leaves missing values as they are."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        composed = _compose_with_hydra(verb.config, tuple(overrides))
        config = OmegaConf.to_container(composed, resolve=True, throw_on_missing=not partial)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is missing: give {error.full_key}=...") from error
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{' '.join(overrides)}: {reason}") from error
    assert isinstance(config, dict), "a root file holds keys"
    return {str(key): value for key, value in config.items()}


@functools.lru_cache(maxsize=64)
def _compose_with_hydra(root: str, overrides: tuple[str, ...]) -> "DictConfig":
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(conf_folder()), version_base="1.3"):
        composed: DictConfig = compose(config_name=root, overrides=list(overrides))
    return composed


def _run(verb: Verb, config: Config) -> int:
    module, _, name = verb.function.partition(":")
    function: Callable[[Config], int] = getattr(importlib.import_module(module), name)
    with contextlib.ExitStack() as stack:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        return function(config)


def _run_all(verb: Verb, request: _Request) -> int:
    """Run every combination of the swept values, each in its own folder below `out`."""
    jobs = _expand(request.overrides)
    configs: dict[str, Config] = {}
    for swept, overrides in jobs:
        config = _compose(verb, overrides, request.paths)
        if "out" not in config:
            raise InputError("--multirun needs a folder for each run: this verb has no out=")
        if config.get("trainer", {}).get("devices", 1) not in (1, "1"):
            raise InputError("--multirun runs on one device; use trainer=cpu or trainer=gpu")
        name = _job_name(swept)
        name = f"{name}_{len(configs)}" if name in configs else name
        config["out"] = str(Path(config["out"]) / name)
        configs[name] = config
    if request.show_config:
        print("---\n".join(_to_yaml(config) for config in configs.values()), end="")
        return 0
    codes = {}
    for number, (name, config) in enumerate(configs.items(), start=1):
        print(f"\n[{number}/{len(configs)}] {name} -> {config['out']}", flush=True)
        codes[name] = _run_job(verb, config)
    print(f"\n{_summary_table(configs, codes)}")
    if not any(codes.values()):
        return 0
    return 2 if all(code == 2 for code in codes.values()) else 3


def _run_job(verb: Verb, config: Config) -> int:
    try:
        return _run(verb, config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _expand(overrides: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Return (swept overrides, all overrides) of each combination."""
    choices: dict[str, list[tuple[str, bool]]] = {}
    for text in overrides:
        override = _parse_override(text)
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values = [str(value) for value in override.sweep_string_iterator()]
            choices[key] = [(f"{key}={value}", True) for value in values]
        else:
            choices[key] = [(text, False)]
    return [
        ([text for text, swept in job if swept], [text for text, _ in job])
        for job in itertools.product(*choices.values())
    ]


def _job_name(swept: Sequence[str]) -> str:
    """Name a folder after its values, without signs that shells or Hydra trip over."""
    parts = [re.sub(r"^([\w.]+)[/@\w]*=", r"\1-", text) for text in swept]
    return re.sub(r"[^\w.-]+", "-", "_".join(parts)).strip("-")[:120] or "single"


def _summary_table(configs: Mapping[str, Config], codes: Mapping[str, int]) -> str:
    from pipelines.shared.record import read_metrics
    from pipelines.shared.tables import align

    results: dict[str, Mapping[str, object]] = {}
    for name, config in configs.items():
        finished = (Path(config["out"]) / "metrics.json").exists()
        summary = read_metrics(Path(config["out"])).get("summary", {}) if finished else {}
        results[name] = summary if isinstance(summary, dict) else {}
    columns = list(dict.fromkeys(key for summary in results.values() for key in summary))
    rows = [
        [name, str(codes[name]), *(_cell(summary.get(column)) for column in columns)]
        for name, summary in results.items()
    ]
    return align([["run", "exit", *columns], *rows])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return every key with its dots, folders of keys included."""
    flat: dict[str, object] = {}
    for key, value in config.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _to_yaml(config: Config) -> str:
    import yaml

    text: str = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return text


def _pipeline_help(pipeline: str, verbs: Mapping[str, Verb]) -> str:
    program = f"python -m pipelines.{pipeline}"
    width = max(map(len, verbs)) + 2
    lines = [f"{program} VERB [KEY=VALUE ...]", ""]
    lines += [f"  {name.ljust(width)}{verb.summary}" for name, verb in verbs.items()]
    lines += ["", f"{program} VERB --help   settings and choices of a verb", "", "Examples"]
    lines += [
        f"  {program} {name} {example}".rstrip()
        for name, verb in verbs.items()
        for example in verb.examples[:2]
    ]
    return "\n".join(lines)


def _verb_help(pipeline: str, name: str, verb: Verb) -> str:
    program = f"python -m pipelines.{pipeline} {name}"
    lines = [f"{program} [KEY=VALUE ...] [--multirun] [--cfg]", "", verb.summary, ""]
    root = read_root(verb.config)
    has_choices = bool(root.groups)
    lines += [format_settings(root), ""]
    lines += [
        "Options",
        "  --cfg             print the resolved configuration and stop",
        "  --multirun, -m    run every combination of values given with commas, and compare",
        "",
        "Any sign may stand in a path (KEY=PATH); quote it for your shell only.",
        *(["Settings below a choice are written with a dot: --cfg shows them all."] * has_choices),
        "",
        "Examples",
    ]
    lines += [f"  {program} {example}".rstrip() for example in verb.examples]
    return "\n".join(lines)


_FLAGS = {
    "--help": "help",
    "-h": "help",
    "--cfg": "cfg",
    "--multirun": "multirun",
    "-m": "multirun",
}

# kind of a default -> the kinds that may replace it, and how to say so
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str, int, float), "a word"),
    list: ((list,), "a list [a, b]"),
    dict: ((dict,), "several keys"),
}
