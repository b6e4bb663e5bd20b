"""Draw docs/images/shift.svg: advantages against ρ for each λ, the closed form beside 10,000 sampled groups.

    python tools/draw_shift.py

Curves are Appendix A of FAPO (`algorithm.theory`) with a quarter of the rollouts flawed; dots are means over sampled
groups of 16 with the same chances, by `algorithm.advantages.grpo`, the function that trains.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_fapo.algorithm import theory
from megatron_fapo.algorithm.advantages import grpo
from megatron_fapo.records import floats

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "shift.svg"
GROUPS, SIZE, GAMMA = 10_000, 16, 0.25
PENALTIES = {"2/3": 2 / 3, "1": 1.0, "4/3": 4 / 3}
RHO = (0.2, 6.0)
BINS = np.geomspace(*RHO, 13)
CLASSES = {"clean": "#1b7837", "flawed": "#d9480f", "wrong": "#555555"}
WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 230, 44, 40, 22
RANGE = (-3.0, 2.6)


def composition(rho: float) -> tuple[float, float, float]:
    """(α, γ, β) at this ρ, a quarter flawed."""
    beta = (1 - GAMMA) / (1 + rho)
    return rho * beta, GAMMA, beta


def sampled(flaw_penalty: float, groups: int = GROUPS) -> dict[str, list[tuple[float, float]]]:
    """{class: (ρ, mean advantage) of each bin} over groups that have all three classes; ρ is the group's own."""
    rng = np.random.default_rng(0)
    found: dict[str, list[list[float]]] = {name: [[] for _ in BINS[1:]] for name in CLASSES}
    rhos: list[list[float]] = [[] for _ in BINS[1:]]
    for rho in np.exp(rng.uniform(*np.log(RHO), groups)):
        clean, flawed, wrong = rng.multinomial(SIZE, composition(rho))
        if min(clean, flawed, wrong) == 0 or not RHO[0] <= clean / wrong < RHO[1]:
            continue
        rewards = floats([1.0] * clean + [1.0 - flaw_penalty] * flawed + [-1.0] * wrong)
        advantages = grpo(rewards, 1e-6).of(rewards)
        place = int(np.searchsorted(BINS, clean / wrong, side="right")) - 1
        rhos[place].append(clean / wrong)
        for name, value in zip(CLASSES, (advantages[0], advantages[clean], advantages[-1]), strict=True):
            found[name][place].append(value)
    return {
        name: [(float(np.mean(at)), float(np.mean(row))) for at, row in zip(rhos, rows, strict=True) if len(at) > 20]
        for name, rows in found.items()
    }


def curve(flaw_penalty: float) -> Iterator[tuple[float, tuple[float, float, float]]]:
    """(ρ, advantages of clean, flawed, wrong) of an infinite group."""
    for rho in np.geomspace(*RHO, 60):
        alpha, gamma, beta = composition(float(rho))
        assert abs(alpha + gamma + beta - 1) < 1e-9
        yield float(rho), theory.advantages(beta, gamma, flaw_penalty)


def across(rho: float) -> float:
    """Points from the left, ρ on a logarithmic scale."""
    low, high = np.log(RHO)
    return float((np.log(rho) - low) / (high - low) * WIDTH)


def down(advantage: float) -> float:
    """Points from the top."""
    return (RANGE[1] - advantage) / (RANGE[1] - RANGE[0]) * HEIGHT


def panel(label: str, flaw_penalty: float, place: int) -> list[str]:
    """One λ."""
    parts = [f'<g transform="translate({LEFT + place * (WIDTH + GAP)},{TOP})">']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="-8" text-anchor="middle" font-weight="bold">λ = {label}</text>')
    parts.append(f'<line x2="{WIDTH}" y1="{down(0):.1f}" y2="{down(0):.1f}" stroke="#bbb"/>')
    at = across(theory.shift(flaw_penalty))
    parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y2="{HEIGHT}" stroke="#d9480f" stroke-dasharray="3 3"/>')
    rho = f"{theory.shift(flaw_penalty):g}"
    parts.append(f'<text x="{at + 4:.1f}" y="12" fill="#d9480f">shift at ρ = {rho}</text>')
    for tick in (0.25, 0.5, 1, 2, 4):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT + 15}" text-anchor="middle">{tick:g}</text>')
    if place == 0:
        for tick in (-2, -1, 0, 1, 2):
            parts.append(f'<text x="-6" y="{down(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    points = list(curve(flaw_penalty))
    means = sampled(flaw_penalty)
    for number, (name, colour) in enumerate(CLASSES.items()):
        line = " ".join(f"{across(rho):.1f},{down(values[number]):.1f}" for rho, values in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        for rho, value in means[name]:
            parts.append(f'<circle cx="{across(rho):.1f}" cy="{down(value):.1f}" r="2.6" fill="{colour}"/>')
    return [*parts, "</g>"]


def picture() -> str:
    """The SVG."""
    width, height = LEFT + 3 * WIDTH + 2 * GAP + 10, TOP + HEIGHT + 58
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11" fill="#333">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for place, (label, penalty) in enumerate(PENALTIES.items()):
        parts += panel(label, penalty, place)
    middle = LEFT + 1.5 * WIDTH + GAP
    parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 30}" text-anchor="middle">ρ = α/β of the group</text>')
    parts.append(
        f'<text transform="translate(12,{TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">advantage</text>'
    )
    for number, (name, colour) in enumerate(CLASSES.items()):
        at = LEFT + number * 90
        parts.append(f'<circle cx="{at + 4}" cy="{TOP + HEIGHT + 46}" r="3" fill="{colour}"/>')
        parts.append(f'<text x="{at + 12}" y="{TOP + HEIGHT + 50}">{name}</text>')
    note = f"lines: closed form; dots: means over {GROUPS:,} sampled groups of {SIZE}"
    parts.append(f'<text x="{width - 12}" y="{TOP + HEIGHT + 50}" text-anchor="end">{note}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(picture())
