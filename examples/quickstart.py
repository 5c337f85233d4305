"""The shortest program: one prompt, one picture."""

from sdclient import Client

with Client("localhost:50051") as client:
    [image] = client.generate("a lake at dusk, mountains", width=256, height=128, seed=7)
    image.save("lake.png")
