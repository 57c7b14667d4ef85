"""Describe the problems of a configuration file: the dotted key, what was found, what was expected.

Secrets from environment variables are refused as well, because the resolved config is written to many files.
"""

import os
import re
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_ledom.config.schema import RunConfig
from megatron_ledom.errors import ConfigError

_KINDS = {bool: "a truth value", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a section"}


def config_keys(of: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of RunConfig, or of one section, with its type, in the order of the classes."""
    keys: dict[str, Any] = {}
    hints = get_type_hints(of, include_extras=True)
    sections = [name for name, hint in hints.items() if is_dataclass(hint)]
    for name in [entry.name for entry in fields(of)]:  # type: ignore[arg-type]
        keys |= config_keys(hints[name], f"{prefix}{name}.") if name in sections else {f"{prefix}{name}": hints[name]}
    return keys


def describe_problems(error: ValidationError, values: dict[str, Any], where: str) -> str:
    """Return all problems that pydantic found in `values`, one per line; `where` names the file."""
    lines: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        key, line = _explain(problem["type"], problem["loc"], values)
        lines.setdefault(key, line)
    found = list(lines.values())
    return f"{where}: {found[0]}" if len(found) == 1 else "\n  ".join([f"{where} has {len(found)} problems:", *found])


def _explain(kind: str, location: Sequence[int | str], values: dict[str, Any]) -> tuple[str, str]:
    """Return the dotted key of a problem and its line of the message."""
    known = config_keys()
    parts = [str(part) for part in location]
    if kind == "unexpected_keyword_argument":
        return ".".join(parts), _explain_unknown(parts, known)
    while ".".join(parts) not in known and len(parts) > 1 and not _names_below(parts, known):
        parts.pop()  # a place inside the value
    key = ".".join(parts)
    if kind.startswith("missing") and key in known:
        return key, f"{key} is missing; expected {describe_type(known[key])}; set it in the file or as {key}=VALUE"
    found = values
    for part in parts:
        found = found[part]
    if key not in known:
        return key, f"{key}={_shown(found)} is {_kind(found)}; expected a section with keys below it"
    is_text = known[key] in (str, str | None) and isinstance(found, int | float)
    quoted = f'; quote it: {key}="{_shown(found)}"' if is_text else ""
    wrong = _kind(found) if _is_wrong_kind(kind) and len(location) <= len(parts) else "not possible"
    return key, f"{key}={_shown(found)} is {wrong}; expected {describe_type(known[key])}{quoted}"


def _names_below(section: Sequence[str], known: dict[str, Any]) -> list[str]:
    """Return the keys and sections of a section; none for a name that is not a section."""
    prefix = "".join(f"{part}." for part in section)
    return list(dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in known if name.startswith(prefix)))


def _is_wrong_kind(kind: str) -> bool:
    return kind.endswith(("_type", "_parsing")) or kind == "int_from_float"


def _explain_unknown(parts: list[str], known: dict[str, Any]) -> str:
    key, section = ".".join(parts), parts[:-1]
    near = _nearest(parts, list(known))
    if near:
        return f"{key} is not a key; did you mean {near}?"
    if section and (names := _names_below(section, known)):
        return f"{key} is not a key; {'.'.join(section)} has {', '.join(names)}"
    return f"{key} is not a key or section; expected one of {', '.join(_names_below([], known))}"


def _nearest(parts: list[str], known: list[str]) -> str | None:
    """Return the key that was probably meant: same name elsewhere, similar in this section, similar section, similar anywhere."""
    *section, name = parts
    by_name = {full.split(".")[-1]: full for full in reversed(known)}
    if name in by_name:
        return by_name[name]
    here = _names_below(section, dict.fromkeys(known)) if section else []
    if close := get_close_matches(name, here, n=1, cutoff=0.6):
        return ".".join([*section, *close])
    sections = {full.split(".")[0] for full in known}
    if not section and (close := get_close_matches(name, sections, n=1, cutoff=0.7)):
        return close[0]
    if close := get_close_matches(name, by_name, n=1, cutoff=0.6):
        return by_name[close[0]]
    return None


ONE_OF = "one of "


def describe_type(hint: Any) -> str:
    """Return the type of a field in words, such as `a whole number above 0`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [describe_type(argument) for argument in arguments if argument is not type(None)]
        if all(option.startswith(ONE_OF) for option in options):
            options = [ONE_OF + ", ".join(option.removeprefix(ONE_OF) for option in options)]
        return " or ".join([*options, "null"] if type(None) in arguments else options)
    if origin is Annotated:
        return _KINDS[arguments[0]] + _describe_range(arguments[1:])
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is list and get_origin(arguments[0]) is Literal:
        return f"a list of some of {', '.join(get_args(arguments[0]))}"
    if origin is list:
        return (
            "a list of [weight, prefix] or [weight, prefix, direction], each weight a number above 0, as in"
            " [[0.7, data/a], [0.3, data/b]]"
        )
    if origin is dict:
        return "names, each with a list of [weight, prefix], as in {web: [[1, data/web_valid]]}"
    if origin is tuple:
        return "three numbers [train, valid, test], the first above 0, as in [0.98, 0.01, 0.01]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    return "true or false" if hint is bool else _KINDS[hint]


def _describe_range(extras: tuple[Any, ...]) -> str:
    limits = [limit for extra in extras for limit in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
    words = [f"above {limit.gt}" for limit in limits if isinstance(limit, Gt)]
    words += [f"{limit.ge} or more" for limit in limits if isinstance(limit, Ge)]
    words += [f"below {limit.lt}" for limit in limits if isinstance(limit, Lt)]
    return " " + " and ".join(words) if words else ""


def first_line(error: Exception) -> str:
    """Return the first line of a library's message, without a final full stop."""
    return str(error).splitlines()[0].rstrip(".")


def _kind(value: Any) -> str:
    return "empty" if value is None else _KINDS.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    plain = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = plain or (f"'{value}'" if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else text[:77] + "..."


FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^'\",}\s]+)")
SECRET_NAME = re.compile(
    r"PASS|PWD|PSWD|SECRET|KEY|CRED|COOKIE|JWT|BEARER|PRIVATE|WEBHOOK|SIGNATURE|CERT|DSN|PROXY"
    r"|TOKEN(?!I[SZ])"  # not TOKENIZER
    r"|AUTH(?!ORS?(?:_|$))"  # not GIT_AUTHOR_NAME
    r"|(?:^|_|GITHUB|GITLAB|GH)PAT\d*(?:_|$)|(?:^|_)(?:PW|OTP|PIN|SAS)\d*(?:_|$)"
    r"|CONN(?:ECTION)?_?STR|(?:DATABASE|DB|SQL|PG|POSTGRES|MONGO|REDIS|AMQP|BROKER|CELERY|JDBC)\w*_?UR[IL]"
)
"""Matches the upper-case name of a variable that is a secret or contains one, as the address of a database does."""
FOLDERS = {"PWD", "OLDPWD"}
"""Variables of the shell whose names only look like secrets."""
SECRET_VALUE = re.compile(
    r"://[^/\s@]+@|^(?:sk-|hf_\w{20}|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA\w{16}|eyJ[\w-]+\.)|BEGIN [A-Z ]*PRIVATE KEY"
)
"""Matches the value of a secret: a user in an address, keys of well-known services, a signed token, a private key."""


def refuse_secrets(values: Any, path: str, key: str = "") -> None:
    """Raise ConfigError if an unresolved value refers to a variable with a secret; the message has its name, not its value."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            refuse_secrets(value, path, f"{key}.{name}" if key else str(name))
    for name in FROM_ENVIRONMENT.findall(values) if isinstance(values, str) else ():
        if "$" in name:
            raise ConfigError(
                f"{path}: {key} uses an environment variable whose name is composed of parts, {values}; write the whole name"
            )
        by = "name" if _is_secret(name) else "content" if SECRET_VALUE.search(os.environ.get(name, "")) else None
        if by is not None:
            raise ConfigError(
                f"{path}: {key} uses ${{oc.env:{name}}}, which looks like a secret by its {by}. The resolved config is written into"
                " the run folder, every checkpoint and the log. No key needs a secret: libraries that do (wandb, object stores)"
                " read the environment themselves. Remove it, or rename the variable if it is not a secret"
            )


def _is_secret(name: str) -> bool:
    return name not in FOLDERS and SECRET_NAME.search(name.upper()) is not None
