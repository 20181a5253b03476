"""What the configuration folder offers: the settings and choices of each verb, with their meaning.

Read as text, without Hydra, so that `--help` is instant. A root file has its summary in the first
line, `GROUP: CHOICE` lines under `defaults:`, and `key: default   # meaning` lines at the margin. A
line with the name of another root file takes that file's settings and choices first.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

_DEFAULT = re.compile(r"^  - (?P<path>[\w/]+)(?:@(?P<package>\w+))?: (?P<choice>\S+)$")
_INCLUDED = re.compile(r"^  - (?P<root>[a-z]+_\w+)$")
_SETTING = re.compile(r"^(?P<key>\w+): (?P<value>.*?)(?:\s+# (?P<meaning>.*))?$")
_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a root file."""

    key: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Group:
    """A folder of choices; `name` is what the user writes, `target` what Hydra calls it."""

    name: str
    target: str
    default: str | None
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Root:
    """A verb's configuration file."""

    summary: str
    settings: tuple[Setting, ...]
    groups: tuple[Group, ...]


def conf_folder() -> Path:
    """Return the configuration folder: in an installed package, or in a checkout."""
    packages = Path(__file__).resolve().parents[1]
    installed = packages / "conf"
    return installed if installed.is_dir() else packages.parent / "conf"


def read_root(name: str, folder: Path | None = None) -> Root:
    """Read the root file `name`, those that it includes, and the folders of its choices."""
    folder = folder or conf_folder()
    lines = (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    included = [read_root(m["root"], folder) for line in lines if (m := _INCLUDED.match(line))]
    settings = {item.key: item for root in included for item in root.settings}
    groups = {group.name: group for root in included for group in root.groups}
    for match in (found for line in lines if (found := _SETTING.match(line))):
        if match["key"] != "defaults":
            setting = Setting(match["key"], match["value"], match["meaning"] or "")
            settings[setting.key] = setting
    for match in (found for line in lines if (found := _DEFAULT.match(line))):
        group = _group(match, folder)
        groups[group.name] = group
    return Root(_summary(lines), tuple(settings.values()), tuple(groups.values()))


def format_settings(root: Root, keys: Sequence[str] | None = None) -> str:
    """Return a line per setting, and per choice of each group."""
    shown = [item for item in root.settings if keys is None or item.key in keys]
    rows = [(f"{item.key}={_short(item.default)}", item.meaning) for item in shown]
    text = "Settings, with their defaults\n" + _columns(rows)
    for group in root.groups:
        text += f"\n\n{group.name}={group.default or 'null'}\n" + _columns(
            list(group.options.items())
        )
    return text


def closest(word: str, known: Sequence[str]) -> str:
    """Return `; did you mean ...?` when some known word is near."""
    near = get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _group(match: re.Match[str], folder: Path) -> Group:
    path, package = match["path"], match["package"]
    files = sorted((folder / path).glob("*.yaml"))
    return Group(
        name=path.split("/")[0],
        target=f"{path}@{package}" if package else path,
        default=None if match["choice"] == "null" else match["choice"],
        options={file.stem: _summary(file.read_text("utf-8").splitlines()) for file in files},
    )


def _summary(lines: Sequence[str]) -> str:
    comments = (line[2:] for line in lines if line.startswith("# ") and "@package" not in line)
    return next(comments, "")


def _short(default: str) -> str:
    """Name the group that a default comes from instead of the interpolation."""
    found = re.fullmatch(r"\$\{(\w+)\.\w+\}", default)
    return f"(by {found[1]}=)" if found else default


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    width = max((len(left) for left, _ in rows), default=0) + 4
    return "\n".join(
        textwrap.fill(
            right or "-",
            width=_WIDTH,
            initial_indent=f"  {left}".ljust(width),
            subsequent_indent=" " * width,
        )
        for left, right in rows
    )
