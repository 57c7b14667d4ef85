"""The corpora of the twins: text of this machine, synthetic word problems, and word problems written by people."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from commands import tool
from lines import read_lines, write_lines
from problems import parts
from settings import Settings
from steps import Step
from twins import DIRECTIONS
from word_problems import generator_version, gsm8k, gsm_symbolic

from megatron_ledom.errors import DataError
from megatron_ledom.storage.files import write_file


class Corpora:
    """The files of the corpora, their tokenizers and shards, and the steps that write them."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        written = ("gsm_symbolic",) if settings.gsm8k is None else ("gsm8k", "gsm_symbolic")
        self.domains: Mapping[str, tuple[str, ...]] = {"text": ("prose", "code"), "maths": ("problems",), "gsm": written}
        """Held-out sets of each corpus."""

    def stages(self) -> Iterator[list[Step]]:
        """Yield lists of steps, in order. The steps of one list are independent."""
        yield [self._collect(), self._problems(), self._word_problems()]
        yield [self._split()]
        yield [self.tokenizer_step(corpus) for corpus in self.domains] + [self._held_out(corpus) for corpus in self.domains]
        yield [self._shards(corpus, direction) for corpus, direction in product(self.domains, DIRECTIONS)]

    def _collect(self) -> Step:
        collected = self.folder / "text/collected"
        limits = ["--most-megabytes", 40, "--least-megabytes", 20, "--held-out-percent", 5]
        command = tool("examples/quickstart/collect.py", "--output", collected, *limits)
        return Step(name="collect", outputs=[collected], commands=[command])

    def _problems(self) -> Step:
        maths, settings = self.folder / "maths", self.settings
        outputs = [maths / f"{part}.jsonl" for part in settings.num_problems]
        shape = [[asdict(level) for level in settings.levels], settings.num_problems, settings.problems_seed]

        def _write() -> None:
            generated = parts(settings.levels, settings.num_problems, settings.problems_seed)
            for part, problems in generated.items():
                write_lines(maths / f"{part}.jsonl", [problem.as_fields() for problem in problems])

        return Step(name="problems", outputs=outputs, work=_write, settings=shape)

    def _word_problems(self) -> Step:
        """Return the step that holds out `num_gsm_held_out` random problems of each source and trains on the rest."""
        settings, folder = self.settings, self.folder / "gsm"
        inputs = [] if settings.gsm8k is None else [Path(settings.gsm8k)]
        outputs = [folder / "train.jsonl", *(self.held_out_file("gsm", domain) for domain in self.domains["gsm"])]

        def _write() -> None:
            given = {} if settings.gsm8k is None else {"gsm8k": gsm8k(Path(settings.gsm8k))}
            found = {**given, "gsm_symbolic": gsm_symbolic(settings.num_gsm_symbolic, settings.problems_seed)}
            train, counts = [], {}
            for domain, source in found.items():
                if len(source.problems) <= settings.num_gsm_held_out:
                    found_num, refused = len(source.problems), source.num_refused
                    raise DataError(
                        f"{domain} has {found_num} problems with correct solutions ({refused} rejected), so all would be held out; give"
                        f" more problems, or lower num_gsm_held_out={settings.num_gsm_held_out}"
                    )
                problems = Random(settings.problems_seed).sample(source.problems, len(source.problems))
                held_out, rest = problems[: settings.num_gsm_held_out], problems[settings.num_gsm_held_out :]
                write_lines(self.held_out_file("gsm", domain), held_out)
                train += rest
                counts[domain] = {"train": len(rest), "held_out": len(held_out), "refused": source.num_refused}
            write_lines(folder / "train.jsonl", train)
            write_file(folder / "counts.json", json.dumps(counts))

        sizes = [settings.num_gsm_symbolic, settings.num_gsm_held_out, settings.problems_seed, generator_version()]
        return Step(
            name="word_problems", inputs=inputs, outputs=[*outputs, folder / "counts.json"], work=_write, settings=sizes
        )

    def _split(self) -> Step:
        text = self.folder / "text"
        outputs = [text / f"{name}.jsonl" for name in ("train", *self.domains["text"])]
        files = [text / "collected" / f"{split}.jsonl" for split in ("train", "valid")]
        sizes = self.settings.text_kilobytes
        return Step(name="split", inputs=files, outputs=outputs, work=self._write_domains, settings=sizes)

    def _write_domains(self) -> None:
        """Write equal amounts of prose and code.

        The collected files have most of their prose first and most of their code last.
        """
        text, sizes = self.folder / "text", self.settings.text_kilobytes
        train = self._some_of_each(text / "collected/train.jsonl", 1000 * sizes["train"])
        write_lines(text / "train.jsonl", [record for domain in train.values() for record in domain])
        for domain, records in self._some_of_each(text / "collected/valid.jsonl", 1000 * sizes["held_out"]).items():
            write_lines(text / f"{domain}.jsonl", records)

    def _some_of_each(self, path: Path, most_bytes: int) -> dict[str, list[dict[str, str]]]:
        """Return the first records of each domain: up to `most_bytes` of text, and at least one record."""
        chosen: dict[str, list[dict[str, str]]] = {domain: [] for domain in self.domains["text"]}
        left = dict.fromkeys(chosen, most_bytes)
        for record in read_lines(path):
            domain = "code" if record["source"].endswith(".py") else "prose"
            num_bytes = len(record["text"].encode())
            if num_bytes <= left[domain] or not chosen[domain]:
                chosen[domain].append(record)
                left[domain] -= num_bytes
        return chosen

    def held_out_file(self, corpus: str, domain: str) -> Path:
        """Return the JSON lines file of a held-out set."""
        return self.folder / corpus / ("valid.jsonl" if corpus == "maths" else f"{domain}.jsonl")

    def held_out(self, corpus: str) -> Path:
        """Return the file of all held-out sets of a corpus, in which each document has its domain."""
        return self.folder / corpus / "held_out.jsonl"

    def _held_out(self, corpus: str) -> Step:
        files = {domain: self.held_out_file(corpus, domain) for domain in self.domains[corpus]}

        def _write() -> None:
            documents = [{"text": r["text"], "domain": d} for d, path in files.items() for r in read_lines(path)]
            write_lines(self.held_out(corpus), documents)

        return Step(name=f"held_out_{corpus}", inputs=[*files.values()], outputs=[self.held_out(corpus)], work=_write)

    def tokenizer(self, corpus: str) -> Path:
        """Return the folder of the tokenizer that is trained on the corpus."""
        return self.folder / corpus / "tokenizer"

    def tokenizer_step(self, corpus: str, train: Path | None = None, vocab_size: int | None = None) -> Step:
        """Return the step that trains a tokenizer on the training text of a corpus, or on another file."""
        train, output = train or self.folder / corpus / "train.jsonl", self.tokenizer(corpus)
        options = ["--vocab-size", vocab_size or self.settings.vocab_size[corpus], "--max-sentences", 100_000]
        command = tool("tools/train_tokenizer.py", "--input", train, "--output", output, *options)
        return Step(name=f"tokenizer_{corpus}", inputs=[train], outputs=[output], commands=[command])

    def shards(self, corpus: str, direction: str) -> Path:
        """Return the folder of the shards of the training part and of each held-out set."""
        return self.folder / corpus / direction

    def _shards(self, corpus: str, direction: str) -> Step:
        files = {"train": self.folder / corpus / "train.jsonl"}
        files |= {domain: self.held_out_file(corpus, domain) for domain in self.domains[corpus]}
        return self.shards_step(f"{corpus}_{direction}", files, corpus, direction, self.shards(corpus, direction))

    def shards_step(
        self, name: str, files: dict[str, Path], corpus: str, direction: str, output: Path, options: Sequence[str] = ()
    ) -> Step:
        """Return the step that writes the shards of files, by name, with the tokenizer of a corpus. options: further ones of the tool."""
        tokenizer, commands = self.tokenizer(corpus), []
        for shard, file in files.items():
            names = ["--input", file, "--tokenizer", tokenizer, "--output-prefix", output / shard, "--direction", direction]
            commands.append(tool("tools/preprocess_data.py", *names, "--workers", 1, "--overwrite", *options))
        return Step(name=f"shards_{name}", inputs=[*files.values(), tokenizer], outputs=[output], commands=commands)

    def counts(self) -> dict[str, Any]:
        """Return the numbers of word problems by source: trained, held out, and rejected by the calculator."""
        counts: dict[str, Any] = json.loads((self.folder / "gsm/counts.json").read_text(encoding="utf-8"))
        return counts
