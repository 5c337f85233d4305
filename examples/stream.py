"""Progress as it happens, several images of one request, weighted prompts."""

from sdclient import Client, Finished, Image, Progress, Prompt

prompts = [Prompt("a sea at sunset, boats", 2), Prompt("clouds", 0.5), Prompt("trees", -1)]

with Client("localhost:50051") as client, client.stream(prompts, steps=20, image_count=2, seed=1) as events:
    for event in events:  # leaving the block, by break or by an error, cancels the work on the server
        match event:
            case Progress(step=step, steps=steps):
                print(f"{step}/{steps}")
            case Image():
                print(event.save(f"sea-{event.index}.png"), "seed", event.seed)
            case Finished():
                print(f"{event.timings.total:.2f} s for {event.usage.unet_rows} UNet rows")
