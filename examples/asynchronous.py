"""Many requests at a time: the server runs all of them in one UNet batch."""

import asyncio

from sdclient import AsyncClient


async def main() -> None:
    async with AsyncClient("localhost:50051") as client:
        times = ("at noon", "at sunset", "at night")
        results = await asyncio.gather(*(client.generate(f"a forest {time}", seed=3) for time in times))
        for time, [image] in zip(times, results, strict=True):
            image.save(f"forest {time}.png")


asyncio.run(main())
