"""Secrets of the environment stay out of a config: the resolved one is kept in many files."""

import os
import re
from typing import Any

from megatron_ledom.errors import ConfigError

FROM_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([^'\",}\s]+)")
SECRET_NAME = re.compile(
    r"PASS|PWD|PSWD|SECRET|KEY|CRED|COOKIE|JWT|BEARER|PRIVATE|WEBHOOK|SIGNATURE|CERT|DSN|PROXY"
    r"|TOKEN(?!I[SZ])"  # not TOKENIZER
    r"|AUTH(?!ORS?(?:_|$))"  # not GIT_AUTHOR_NAME
    r"|(?:^|_|GITHUB|GITLAB|GH)PAT\d*(?:_|$)|(?:^|_)(?:PW|OTP|PIN|SAS)\d*(?:_|$)"
    r"|CONN(?:ECTION)?_?STR|(?:DATABASE|DB|SQL|PG|POSTGRES|MONGO|REDIS|AMQP|BROKER|CELERY|JDBC)\w*_?UR[IL]"
)
"""Found anywhere in the upper-case name of a variable that is a secret, or holds one as the address of a database does."""
FOLDERS = {"PWD", "OLDPWD"}
"""The shell's own, which only look like a secret by their names."""
SECRET_VALUE = re.compile(
    r"://[^/\s@]+@|^(?:sk-|hf_\w{20}|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA\w{16}|eyJ[\w-]+\.)|BEGIN [A-Z ]*PRIVATE KEY"
)
"""What secrets begin with or hold: a user in an address, keys of well-known services, a signed token, a private key."""


def refuse_secrets(values: Any, path: str, key: str = "") -> None:
    """Raise ConfigError, with the variable's name and never its value, for an unresolved value that takes a secret."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            refuse_secrets(value, path, f"{key}.{name}" if key else str(name))
    for name in FROM_ENVIRONMENT.findall(values) if isinstance(values, str) else ():
        if "$" in name:
            raise ConfigError(
                f"{path}: {key} takes a variable of the environment whose name is put together, {values}; write the name itself"
            )
        by = "name" if _is_secret(name) else "content" if SECRET_VALUE.search(os.environ.get(name, "")) else None
        if by is not None:
            raise ConfigError(
                f"{path}: {key} takes ${{oc.env:{name}}}, which by its {by} is a secret; the resolved config is written into the run"
                " folder, every checkpoint and the log: no key needs one, the libraries that do (wandb, object stores) read the"
                " environment themselves; leave it out, or give a variable that is none another name"
            )


def _is_secret(name: str) -> bool:
    return name not in FOLDERS and SECRET_NAME.search(name.upper()) is not None
