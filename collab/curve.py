"""The loss curve as a picture for places that show no SVG, such as a model card on the Hub."""

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from collab.page import _thinned, _ticks
from collab.view import LossAt

WIDTH, HEIGHT = 1440, 540  # shown at half that size and less, so that it is sharp on phones as well
FINER = 2  # drawn so many times larger, because Pillow's lines have no smooth edges
# Half dark, on nothing: the card's own background, white or almost black, is seen through it.
LINE, INK, RULE, AXIS = (46, 134, 193, 255), (125, 121, 113, 255), (128, 128, 128, 60), (128, 128, 128, 150)


def curve_png(history: Sequence[LossAt]) -> bytes | None:
    """The loss over the global steps as a PNG file that can be read in light and dark; None if there is no loss yet.

    :param history: rounds in the order of their steps; those without a finite loss are left out.
    """
    points = [(p.step, p.loss) for p in _thinned(history) if p.loss is not None and math.isfinite(p.loss)]
    if not points:
        return None
    image = Image.new("RGBA", (WIDTH * FINER, HEIGHT * FINER), (*LINE[:3], 0))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26 * FINER)
    left, right, top, bottom = (edge * FINER for edge in (100, WIDTH - 120, 30, HEIGHT - 84))
    first, last = points[0][0], points[-1][0]
    losses = [loss for _, loss in points]
    rows = _ticks(min(losses), max(losses), 5)
    low, high = min(rows[0], min(losses)), max(rows[-1], max(losses))

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / max(last - first, 1)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / ((high - low) or 1)

    for value in rows:
        draw.line([(left, y(value)), (right, y(value))], RULE, 2 * FINER)
        draw.text((left - 18 * FINER, y(value)), f"{value:g}", INK, font, "rm")
    draw.line([(left, bottom), (right, bottom)], AXIS, 2 * FINER)
    for step in _ticks(first, last, 8):
        if first <= step <= last and step == int(step):
            draw.line([(x(step), bottom), (x(step), bottom + 10 * FINER)], AXIS, 2 * FINER)
            draw.text((x(step), bottom + 16 * FINER), f"{step:,.0f}", INK, font, "ma")
    draw.text((right, (HEIGHT - 2) * FINER), "global step", INK, font, "rd")
    line = [(x(step), y(loss)) for step, loss in points]
    draw.line(line, LINE, 4 * FINER, "curve")
    (end_x, end_y), radius = line[-1], 8 * FINER
    draw.ellipse([end_x - radius, end_y - radius, end_x + radius, end_y + radius], LINE)
    draw.text((end_x + 18 * FINER, end_y), f"{losses[-1]:.3f}", LINE, font, "lm")
    file = io.BytesIO()
    image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return file.getvalue()
