"""The section of the part `teacher` in the report."""

from collections.abc import Iterator

from plan_tasks import SIBLINGS, STAR
from sections import Results, Rows, Section, interval, not_run, percent
from teacher import ARMS, MEASURES, MULTI, PLAIN, RANDOM, TAUGHT

TITLE = "A reverse model as a teacher"
NAMES = {STAR: "path-star", SIBLINGS: "sibling discovery"}
PAPER = "Mahajan et al., arXiv 2510.14751"


def teacher_section(results: Results | None) -> Section:
    """Return the section of the part."""
    if results is None:
        return not_run(TITLE, "teacher")
    tables = [
        _comparison_rows(results["comparisons"]),
        *(_measure_rows(results, task) for task in results["tokens"]),
        _budget_rows(results),
    ]
    return Section(title=TITLE, paragraphs=[*teacher_sentences(results), _about(results)], tables=tables)


def teacher_sentences(results: Results) -> Iterator[str]:
    """Yield a sentence about each task: what the plain model reaches, and whether the teacher helps, and because it was trained."""
    for task in results["tokens"]:
        name, first = NAMES[task], MEASURES[task][0]
        plain, taught = (results["measures"][f"{task}|{arm}"][first] for arm in (PLAIN, TAUGHT))
        rows = {other: results["comparisons"][f"{task}|{TAUGHT} - {other}"] for other in (PLAIN, MULTI, RANDOM)}
        each = "; ".join(f"{_points(row)} against {other}" for other, row in rows.items())
        yield (
            f"{name[0].upper()}{name[1:]}, {first}: {percent(plain['mean'])} % plain, {percent(taught['mean'])} % with the reverse teacher"
            f" ({each}). {_verdict(rows)}"
        )
    if len(results["seeds"]) < 5:
        yield "With so few seeds the intervals say little about other seeds, and a difference can hardly be significant."


def _verdict(rows: Results) -> str:
    signs = {other: (1 if row["mean"] > 0 else -1) if row["is_significant"] else 0 for other, row in rows.items()}
    if signs[PLAIN] < 0:
        return "The teacher harms here."
    if signs[PLAIN] == 0:
        return "No effect of the teacher is shown (Holm)."
    if signs[RANDOM] <= 0:
        return "The teacher helps, but no more than one of random weights is shown to: what it learned is not shown to matter."
    return f"The teacher helps, and more than one of random weights; against multi-token prediction {_side(signs[MULTI])}."


def _side(sign: int) -> str:
    return {1: "it helps more", 0: "no difference is shown", -1: "it helps less"}[sign]


def _about(results: Results) -> str:
    one, shape = results["settings"], results["settings"]["shape"]
    read = " and ".join(f"{number:,} tokens of {NAMES[task]}" for task, number in results["tokens"].items())
    return (
        f"Seeds {results['seeds']}, all reported; a seed decides weights, the order of the samples and the teacher. {shape['num_layers']} layers of"
        f" width {shape['hidden_size']}, {one['train_iters']:,} steps of {one['batch_texts']} texts: {read} for each arm, all in the loss."
        f" {' '.join(_about_task(one, task) for task in results['tokens'])}"
        " Multi-token: one module after DeepSeek-V3, which reads the next token to predict the one after it. Teachers: reverse models of the"
        f" same shape; the head predicts the state that has read the text from its end to the token after next ({PAPER}). Weight of either"
        f" further loss: {one['weight']:g}. Intervals: bootstrap over seeds and prompts (crossed). p: at least that of Student's t over"
        " seeds, adjusted by Holm over the table."
    )


def _about_task(one: Results, task: str) -> str:
    star, siblings, test = one["star"], one["siblings"], one["num"]["test"]
    if task == STAR:
        return (
            f"Path-star: {star['degree']} arms of {star['length']} nodes with {star['nodes']} names, {test} stars that were not trained on, the"
            f" likeliest answer; a guess of the second node is right in {100 / star['degree']:.0f} %."
        )
    return (
        f"Siblings: {siblings['parents']} parents of {siblings['children']} children, half of the ordered pairs in the training part, {test}"
        " samples at temperature 1; new and right: coherent, not in the training part and not written before."
    )


def _comparison_rows(family: Results) -> Rows:
    rows = [["task", "difference", "points", "95 % interval", "each seed", "Holm p"]]
    for name, row in family.items():
        task, pair = name.split("|")
        seeds = " ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        cells = [NAMES[task], pair, f"{100 * row['mean']:+.1f}", interval(row["interval"], 100, "+.1f"), seeds]
        rows.append([*cells, f"{row['holm_p']:.4f}{' *' * row['is_significant']}"])
    return rows


def _measure_rows(results: Results, task: str) -> Rows:
    rows = [[NAMES[task], *(part for name in MEASURES[task] for part in (f"{name} %", "95 % interval", "each seed"))]]
    for arm in ARMS:
        cells = [arm]
        for row in results["measures"][f"{task}|{arm}"].values():
            cells += [percent(row["mean"]), interval(row["interval"], 100, ".1f"), " ".join(map(percent, row["by_seed"]))]
        rows.append(cells)
    return rows


def _budget_rows(results: Results) -> Rows:
    rows = [["task", "arm", "training FLOPs", "FLOPs of its teacher", "all, relative to plain", "tokens/s of one run"]]
    for name, row in results["budget"].items():
        task, arm = name.split("|")
        base = results["budget"][f"{task}|{PLAIN}"]["own"]
        cells = [NAMES[task], arm, f"{row['own']:.3g}", f"{row['teacher']:.3g}", f"{(row['own'] + row['teacher']) / base:.2f}"]
        rows.append([*cells, f"{row['speed']:,.0f}"])
    return rows


def _points(row: Results) -> str:
    return f"{100 * row['mean']:+.1f} points ({interval(row['interval'], 100, '+.1f')})"
