"""Makes the pictures of docs/panoramas.md: a panorama of any size, and one that goes on at its other border."""

from sdclient import Client

with Client("localhost:50051") as client:
    [valley] = client.generate("a valley in the Alps at sunset, epic vista", width=1024, height=128, seed=1)
    valley.save("panorama.png")

    [forest] = client.generate("a green forest, day", width=256, height=128, seed=2, tile_x=True)
    forest.save("forest.png")  # beside itself, without a seam
