"""Messages of preprocessing in the words of a recipe, which has keys where preprocessing has options."""

import re

OPTION = re.compile(r"--[a-z]+(?:-[a-z]+)*")
OF_SOURCE = ("text_key", "text_template", "tasks")
OF_FILTERS = ("on_error", "max_record_bytes", "min_tokens", "max_tokens", "filter", "deduplicate", "decontaminate")
OF_RECIPE = ("tokenizer", "direction", "eod_token", "bos_token", "dtype", "shuffle_seed")


def with_keys(name: str, text: str) -> str:
    """Return a message about a source with the keys of its recipe in place of the options of `ledom preprocess-data`."""
    source = f"sources.{name}"
    keys = {
        "--input": f"{source}.address and {source}.files, from the folder of the command",
        "--output-prefix": "output",
        "--num-tasks": f"{source}.tasks",
        **{_option(key): f"{source}.{key}" for key in OF_SOURCE},
        **{_option(key): f"{source}.filters.{key}" for key in OF_FILTERS},
        **{_option(key): key for key in OF_RECIPE},
    }
    translated = OPTION.sub(lambda found: keys.get(found[0], found[0]), text)
    return translated if translated.startswith(source) else f"{source}: {translated}"


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
