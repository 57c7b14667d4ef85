"""Licences of the sources as the hub takes them: its list of identifiers, and the file with the others.

The hub answers 400 to a card whose `license` is not in its list (huggingface.co/docs/hub/repositories-licenses, read in November 2026):
another licence is `other`, with `license_name`, an identifier, and `license_link`, an address or the file LICENSE or LICENSE.md.
"""

import re
from collections.abc import Iterable

from megatron_ledom.corpus.recipe import Recipe

LICENCE_FILE = "LICENSE.md"
HUB_LICENCES = frozenset(
    " ".join(
        (
            "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-",
            "openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-",
            "by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-",
            "nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-",
            "permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0",
            "gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1",
            "ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown",
        )
    ).split(" ")
)
"""Identifiers that the hub knows, without `other`."""
OTHER_NAMES = {"odc-by-1.0": "odc-by", "odbl-1.0": "odbl", "pddl-1.0": "pddl", "c-uda-1.0": "c-uda"}
"""SPDX names, in small letters, that the hub has under another name."""
SUFFIXES = re.compile(r"-(only|or-later)$")


def hub_licence(licence: str) -> str | None:
    """Return the hub's identifier of a licence, or None if it has none."""
    name = SUFFIXES.sub("", licence.strip().lower())
    name = OTHER_NAMES.get(name, name)
    return name if name in HUB_LICENCES else None


def licence_metadata(licences: Iterable[str]) -> dict[str, str]:
    """Return the keys of a card about the licences of its sources."""
    different = sorted(set(licences))
    if len(different) == 1:
        if (known := hub_licence(different[0])) is not None:
            return {"license": known}
        name = re.sub(r"[^a-z0-9.]+", "-", different[0].lower()).strip("-.") or "unnamed"
    else:
        name = "licences-of-the-sources"
    return {"license": "other", "license_name": name, "license_link": LICENCE_FILE}


def licence_text(recipe: Recipe) -> str:
    """Return the file that `license_link` names: licence and terms of every source."""
    parts = [f"# Licences of the sources of {recipe.name}\n"]
    for name, source in recipe.sources.items():
        more = f" {source.homepage}" if source.homepage else ""
        parts.append(f"- **{name}** ({source.address}): {source.licence}. {source.terms}{more}")
    return "\n".join(parts) + "\n"
