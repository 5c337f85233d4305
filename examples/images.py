"""Pictures from pictures: writes `images.png`, a sheet of what docs/images.md tells of."""

from PIL import Image as Pillow
from PIL import ImageDraw
from sdclient import Client, Image, InitImage, Mask, Outpaint, TwoPass, Variation

DAY, SUNSET = "a lake in the mountains, sunny day", "a lake in the mountains at sunset"

with Client("localhost:50051") as client:

    def generate(prompt: str, **options: object) -> Image:
        chosen = {"seed": 3, "sampler": "dpmpp_2m", "steps": 12, **options}
        [image] = client.generate(prompt, **chosen)  # type: ignore[arg-type]
        return image

    lake = generate(DAY)
    width, height = lake.width, lake.height
    drawing = Pillow.new("L", (width, height))
    ImageDraw.Draw(drawing).ellipse((width // 3, height // 2, width, height), fill=255)
    start, mask = InitImage.of(lake), Mask.of(drawing)
    margins = Outpaint(left=width // 2, right=width // 2)

    rows: dict[str, list[Image | Pillow.Image]] = {
        "image to image, strength 0.4, 0.6 and 0.8": [
            lake,
            *(generate(SUNSET, seed=5, init_image=InitImage.of(lake, strength=each)) for each in (0.4, 0.6, 0.8)),
        ],
        "mask; a meadow, trees, the sea where it is white": [
            drawing,
            *(
                generate(f"{prompt}, sunny day", init_image=start, mask=mask)
                for prompt in ("a green meadow", "trees, forest", "the sea")
            ),
        ],
        "outpainting, to both sides": [generate(DAY, seed=seed, init_image=start, outpaint=margins) for seed in (1, 4)],
        "variations, strength 0, 0.2, 0.4 and 1": [
            generate(DAY, variation=Variation(strength, seed=8)) for strength in (0, 0.2, 0.4, 1)
        ],
        "twice the size: in one pass, in two passes": [
            generate(DAY, width=2 * width, height=2 * height, two_pass=two_pass) for two_pass in (None, TwoPass())
        ],
    }

pictures = [[each.to_pil() if isinstance(each, Image) else each for each in row] for row in rows.values()]
sheet = Pillow.new("RGB", (4 * width + 12, sum(row[0].height + 18 for row in pictures)), "white")
y = 0
for title, row in zip(rows, pictures, strict=True):
    ImageDraw.Draw(sheet).text((2, y + 3), title, fill="black")
    for column, picture in enumerate(row):
        sheet.paste(picture, (column * (picture.width + 4), y + 16))
    y += row[0].height + 18
sheet.save("images.png", optimize=True)
