"""Options made from the settings, so that flag, help, heading, default and bounds have one source."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any

import typer

from ropeway.config import Setting, settings
from ropeway.errors import ConfigError

ENVIRONMENT_NOTE = (
    "Each option is also a variable (--max-num-seqs is ROPEWAY_MAX_NUM_SEQS) and a line of a --config file "
    "(max-num-seqs: 64). Order: flag, variable, file, preset, default. Whole numbers may end in k, K, m or M (2K is "
    "2048)."
)

_OFF = "no_"
_FAR = 10**6
"""Upper bounds from here on are there against slips of the hand, and nobody wants to read them."""

_OTHER_VARIABLES = {"ROPEWAY_CACHE_DIR", "ROPEWAY_FAILPOINT"}


def limits(setting: Setting) -> str:
    """The bounds of a setting in words; empty if it has none."""
    if setting.choices or setting.low is None:
        return ""
    low = f"{setting.low:g}"
    return f"at least {low}" if setting.high is None or setting.high >= _FAR else f"{low} to {setting.high:g}"


def value_name(setting: Setting) -> str:
    """What stands for the value in the help."""
    if setting.choices:
        return "|".join(map(str, setting.choices))
    return {int: "<int>", float: "<float>"}.get(setting.kind, "<str>")  # as typer calls them


def default_text(setting: Setting) -> str:
    """The default as one would type it; empty if the help has to explain it."""
    if setting.default is None:
        return ""
    if setting.kind is bool:
        return "on" if setting.default else "off"
    return f"{setting.default:g}" if setting.kind is float else str(setting.default)


def flags_of(setting: Setting) -> str:
    """`--name`, or both forms of a switch, the default one first."""
    if setting.kind is not bool:
        return setting.flag
    return f"{setting.flag}/{_off_flag(setting)}"


def _off_flag(setting: Setting) -> str:
    return "--no-" + setting.flag.removeprefix("--")


def with_settings(
    *classes: type, only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each setting of `classes`.

    The command receives those that were on the command line as a mapping `flags`, as `config.load` takes it. Values
    stay text here, so that a wrong one gets the same message whether it came from a flag, a variable or a file. One
    that several classes have is said as in the first of them, and is for all of them.
    """
    wanted = [s for s in settings(*classes) if s.name not in without and (only is None or s.name in only)]
    first = {s.name: s for s in reversed(wanted)}
    chosen = [s for s in wanted if first[s.name] is s]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            flags = {s.name: given.pop(s.name) for s in chosen}
            for s in chosen:
                if s.kind is bool and given.pop(_OFF + s.name):
                    if flags[s.name]:
                        raise ConfigError(f"{s.flag} and {_off_flag(s)} contradict each other. Give one.", param=s.name)
                    flags[s.name] = False
            function(**given, flags={name: value for name, value in flags.items() if value is not None})

        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "flags"]
        parameters = [*own, *(parameter for s in chosen for parameter in _parameters(s))]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameters(setting: Setting) -> list[inspect.Parameter]:
    """The option of a setting. A switch also gets its opposite, named in the help rather than in a column of its own,
    which would leave no room for either on a terminal of 80 columns."""
    words = list(map(str, setting.choices))
    notes = [" or ".join(words)] if words else []
    if default_text(setting):
        notes.append(f"default: {default_text(setting)}")
    if limits(setting):
        notes.append(limits(setting))
    if setting.kind is bool:
        notes.append(f"opposite: {_off_flag(setting)}")
    tail = rf" [dim]\[{'; '.join(notes)}][/dim]" if notes else ""
    option = typer.Option(
        setting.flag,
        help=setting.help.replace("[", r"\[") + tail,
        metavar=None if setting.kind is bool else "NAME" if words else value_name(setting),
        rich_help_panel=setting.group,
        show_default=False,
        autocompletion=(lambda: words) if words else None,
    )
    kind = bool | None if setting.kind is bool else str | None
    own = [(setting.name, option)]
    if setting.kind is bool:
        own.append((_OFF + setting.name, typer.Option(_off_flag(setting), hidden=True)))
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, made])
        for name, made in own
    ]


def unknown_variables(environ: Mapping[str, str], *classes: type) -> Iterator[str]:
    """One warning for each `ROPEWAY_*` variable that nothing reads: a misspelt one would else be silently ignored."""
    known = {setting.variable for setting in settings(*classes)} | _OTHER_VARIABLES
    for name in environ:
        if name.startswith("ROPEWAY_") and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield f"{name} is set, but there is no such setting." + (f" Did you mean {close[0]}?" if close else "")


def show_settings(word: str, *classes: type) -> str:
    """`--help=WORD` in plain text: `listgroup` lists the headings; a heading shows its options; any other word, the
    options that mention it. Raises ConfigError if nothing does."""
    known = settings(*classes)
    groups = list(dict.fromkeys(s.group for s in known))
    wanted = word.lower()
    if wanted == "listgroup":
        return "\n".join(f"{group:<12} {sum(s.group == group for s in known)} options" for group in groups)
    found = [s for s in known if s.group.lower() == wanted]
    needle = wanted.lstrip("-").replace("-", "_")
    found = found or [s for s in known if needle in s.name or wanted in s.help.lower()]
    if not found:
        raise ConfigError(f"No option mentions {word!r}. The groups are {', '.join(groups)}; --help shows everything.")
    lines = []
    for s in found:
        facts = [s.variable, *(["default " + default_text(s)] if default_text(s) else []), limits(s)]
        value = "" if s.kind is bool else " " + value_name(s)
        lines.append(f"{flags_of(s)}{value}\n    {s.help}\n    {', '.join(f for f in facts if f)}")
    return "\n".join(lines)
