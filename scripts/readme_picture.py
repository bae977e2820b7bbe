"""The README's picture, from what `make demo` left: python scripts/readme_picture.py [DEMO]."""

import base64
import io
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from roadfuse_core.report import overview_pictures
from roadfuse_core.settings import load_city

OUT = Path(__file__).parents[1] / "docs/demo.webp"
TITLES = {"Image": "aerial image", "Vehicles": "vehicle positions", "Probability": "the map", "Errors": "errors"}
EDGE_PX, TITLE_PX = 420, 30


def main() -> None:
    """The same corner of the city, four times."""
    city = load_city(Path(sys.argv[1] if len(sys.argv) > 1 else "demo") / "city.yaml")
    found = {p.title: p.source for p in overview_pictures(city)}
    sheet = Image.new("RGB", (len(TITLES) * (EDGE_PX + 8) - 8, EDGE_PX + TITLE_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (title, words) in enumerate(TITLES.items()):
        whole = Image.open(io.BytesIO(base64.b64decode(found[title].split(",")[1])))
        corner = whole.crop((150, 150, 150 + EDGE_PX, 150 + EDGE_PX))
        sheet.paste(corner, (k * (EDGE_PX + 8), TITLE_PX))
        pen.text((k * (EDGE_PX + 8) + 2, 4), words, "black", ImageFont.load_default(18))
    sheet.save(OUT, "WEBP", quality=80)


if __name__ == "__main__":
    main()
