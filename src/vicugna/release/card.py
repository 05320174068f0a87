"""The model card: every number on it is computed from the release's evidence, none is typed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vicugna.evals import Results
from vicugna.release.contents import Contents
from vicugna.release.ledger import Attempt, lineage

WEAK = 0.5  # rows below this accuracy are listed as weaknesses


def render(release: Contents) -> str:
    """README.md of a release. Pure: verification renders it again and compares the bytes."""
    about, model = release.about, release.model
    sections = [
        f"---\nlicense: {about.licence.lower()}\nlibrary_name: vicugna\n"
        f"pipeline_tag: text-generation\n---\n\n# {about.name}",
        about.summary,
        "## What it is\n\n" + _what(release),
        "## How it was trained\n\n" + _training(lineage(release.attempts, model.digest)),
        "The recipe, data included:\n\n```yaml\n" + release.recipe.strip() + "\n```",
        "## Scores\n\nEvery planned question is counted: errors and replies cut at their limit are "
        "in *n* and are never right.\n\n"
        + "\n\n".join(_scores(results) for results, _ in release.evaluations),
        "## Limits and known weaknesses\n\n" + _bullets(_limits(release)),
        "## How to run it\n\n```\nvicugna verify PATH    # check that these weights have these "
        "scores\nvicugna chat PATH\nvicugna serve PATH     # OpenAI-compatible, on 127.0.0.1\n```",
        f"## Licence\n\n{about.licence}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _what(release: Contents) -> str:
    model, config = release.model, release.model.config
    parameters = sum(p.numel() for p in model.network.parameters())
    digests = [f"| results | `{results.digest}` |" for results, _ in release.evaluations]
    return "\n".join([
        f"A `{config['model_type']}` network with {parameters:,} parameters: "
        f"{config['num_hidden_layers']} layers, width {config['hidden_size']}, vocabulary "
        f"{config['vocab_size']:,}, context {config['max_position_embeddings']:,} tokens.",
        "", "| what | SHA-256 |", "|---|---|",
        f"| model ({release.evaluations[0][0].precision}) | `{model.digest}` |", *digests])


def _training(attempts: Iterable[Attempt]) -> str:
    lines = ["| stage | tokens | FLOPs | device-seconds | peak memory | resumed | attempt |",
             "|---|---|---|---|---|---|---|"]
    for attempt in attempts:
        cost = attempt.cost
        lines.append(
            f"| {attempt.kind} | {_number(cost.get('tokens'), ',.0f')} "
            f"| {_number(cost.get('flops'), '.3g')} | {_number(cost.get('device_seconds'), ',.0f')}"
            f" | {_number(cost.get('peak_memory_bytes'), ',.0f')} bytes | {attempt.resumed} "
            f"| {attempt.id} |")
    return "\n".join(lines)


def _number(value: Any, form: str) -> str:
    return "not recorded" if value is None else format(float(value), form)


def _scores(results: Results) -> str:
    lines = ["| group | task | difficulty | n | accuracy | 95% interval | if errors were "
             "right | wrong | error | truncated |", "|---|---|---|---|---|---|---|---|---|---|"]
    for row in results.rows:
        lines.append(
            f"| {row.group} | {row.task} | {row.difficulty} | {row.n} | {row.accuracy:.1%} "
            f"| {row.low:.1%} to {row.high:.1%} ({row.method}) | {row.if_errors_right:.1%} "
            f"| {row.wrong} | {row.error} | {row.truncated} |")
    return "\n".join(lines)


def _limits(release: Contents) -> Iterator[str]:
    yield from release.about.limits
    for results, _ in release.evaluations:
        for row in results.rows:
            if row.accuracy < WEAK:
                yield (f"{row.group}, {row.task} ({row.difficulty}): only {row.accuracy:.1%} right "
                       f"of {row.n}.")
    made = "; ".join(f"{kind}: {count}" for kind, count in sorted(release.about.attempts.items()))
    yield (f"Attempts in the workspace's ledger when this was made: {made}. Work done outside that "
           "ledger cannot be seen from here.")
    yield "Nothing outside the table above was measured; it can state falsehoods with confidence."


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines) or "- none stated"
