"""The drawing of the walk: ``python docs/_extensions/walk_figure.py`` writes it for light and for dark pages."""

from __future__ import annotations

from pathlib import Path

TARGET = Path(__file__).parents[1] / "_static"
WIDTH, HEIGHT = 1240, 462
TOP, LANE, GAP = 96, 74, 18  # lanes of the ranks
P = '<tspan baseline-shift="sub" font-size="10">p</tspan>'
RANKS = ("rank 0", "rank 1", "rank P−1")

THEMES = {
    "light": {
        "text": "#1b1f24",
        "soft": "#57606a",
        "line": "#57606a",
        "box": "#f6f8fa",
        "edge": "#afb8c1",
        "ranks": ("#2f6fab", "#3d8361", "#b35900"),
        "shared": "#f3ecfb",
        "shared_edge": "#8250df",
    },
    "dark": {
        "text": "#e6edf3",
        "soft": "#9da7b3",
        "line": "#9da7b3",
        "box": "#161b22",
        "edge": "#444c56",
        "ranks": ("#6cb0f5", "#6fc29a", "#f0a35c"),
        "shared": "#221a33",
        "shared_edge": "#b694f6",
    },
}


def drawing(theme: dict) -> str:
    """The figure as SVG."""
    out: list[str] = []

    def text(x: float, y: float, words: str, size: int = 14, color: str = "text", weight: int = 400, anchor="middle"):
        out.append(
            f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{theme[color]}" '
            f'text-anchor="{anchor}">{words}</text>'
        )

    def box(x: float, y: float, w: float, h: float, fill: str, edge: str) -> None:
        out.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
        )

    def arrow(x1: float, y1: float, x2: float, y2: float) -> None:
        out.append(
            f'<path d="M{x1} {y1} L{x2} {y2}" stroke="{theme["line"]}" stroke-width="1.6" fill="none" '
            'marker-end="url(#tip)"/>'
        )

    lanes = [TOP + i * (LANE + GAP) for i in range(len(RANKS))]
    bottom = lanes[-1] + LANE

    def head(x: float, w: float, title: str, below: str) -> None:
        text(x + w / 2, 44, title, 15, weight=600)
        text(x + w / 2, 66, below, 12.5, "soft")

    def column(x: float, w: float, lines: list[str]) -> None:
        for y, color in zip(lanes, theme["ranks"], strict=True):
            box(x, y, w, LANE, theme["box"], color)
            for i, line in enumerate(lines):
                text(x + w / 2, y + LANE / 2 + 5 + 19 * (i - (len(lines) - 1) / 2), line, 14 if i == 0 else 12.5)

    def shared(x: float, w: float, lines: list[tuple[str, int, str]]) -> None:
        box(x, TOP, w, bottom - TOP, theme["shared"], theme["shared_edge"])
        for i, (line, size, color) in enumerate(lines):
            text(x + w / 2, (TOP + bottom) / 2 + 5 + 21 * (i - (len(lines) - 1) / 2), line, size, color)

    # the file, cut into blocks of rows
    head(88, 96, "1 read", "each byte once")
    for y, color, name in zip(lanes, theme["ranks"], RANKS, strict=True):
        text(76, y + LANE / 2 + 5, name, 13, "soft", anchor="end")
        out.append(
            f'<rect x="88" y="{y - GAP / 2}" width="96" height="{LANE + GAP}" fill="{color}" fill-opacity="0.22" '
            f'stroke="{color}" stroke-width="1.5"/>'
        )
        text(136, y + LANE / 2 - 3, f"W{P}", 15)
        text(136, y + LANE / 2 + 17, "m/P × n", 12.5, "soft")
        arrow(187, y + LANE / 2, 210, y + LANE / 2)

    head(214, 188, "2 decompose together", "sums over ranks: thin blocks")
    shared(
        214,
        188,
        [
            ("randomized SVD of", 14, "text"),
            ("the row-sharded matrix", 14, "text"),
            ("", 12, "soft"),
            ("A = V√S,  B = U√S", 15, "text"),
            ("", 12, "soft"),
            ("only n × k and k × k", 12.5, "soft"),
            ("cross the network", 12.5, "soft"),
        ],
    )
    head(430, 150, "3 subtract", "local, fp32")
    column(
        430,
        150,
        [f"W{P} − s·B{P}A"],
    )
    head(608, 128, "4 quantize", "local")
    column(608, 128, ["NF4 codes", "block maxima"])
    head(764, 150, "5 place", "no broadcast")
    column(764, 150, ["ZeRO-3 partition", "of this rank"])
    head(942, 148, "6 train", "A and B only")
    shared(
        942,
        148,
        [
            ("for each layer:", 12.5, "soft"),
            ("gather codes", 14, "text"),
            ("decode", 14, "text"),
            ("multiply", 14, "text"),
            ("drop", 14, "text"),
        ],
    )
    head(1118, 108, "7 write", "safetensors")
    box(1118, TOP + 62, 108, bottom - TOP - 124, theme["box"], theme["edge"])
    middle = (TOP + bottom) / 2
    text(1172, middle - 32, "LoRA", 16, weight=600)
    text(1172, middle - 9, "of rank 2r", 13)
    text(1172, middle + 10, "for W itself", 13)
    text(1172, middle + 36, "[A; A₀]", 12.5, "soft")
    text(1172, middle + 54, "[B | −B₀]", 12.5, "soft")

    for y in (lane + LANE / 2 for lane in lanes):
        for x1, x2 in ((403, 427), (581, 605), (737, 761), (915, 939)):
            arrow(x1, y, x2, y)
    arrow(1091, middle, 1115, middle)

    # the rounds of QPiSSA
    low = bottom + 34
    out.append(
        f'<path d="M672 {bottom + 3} L672 {low} L308 {low} L308 {bottom + 6}" stroke="{theme["line"]}" '
        'stroke-width="1.6" fill="none" stroke-dasharray="5 4" marker-end="url(#tip)"/>'
    )
    text(490, low + 22, "QPiSSA: T rounds, each the SVD of W minus what was quantized", 13.5, "text")
    text(
        WIDTH / 2,
        HEIGHT - 18,
        "Here all P ranks share the matrix W. Fewer ranks decompose a small one; "
        "its rows are dealt out to all afterwards.",
        14,
        "soft",
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        "font-family=\"-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif\" "
        'role="img" aria-label="How a matrix is read by rows, decomposed by all ranks together, quantized, sharded, '
        'trained and written as a LoRA">\n'
        f'<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="{theme["line"]}"/></marker></defs>\n'
        + "\n".join(out)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    for name, theme in THEMES.items():
        (TARGET / f"walk-{name}.svg").write_text(drawing(theme), encoding="utf-8")
