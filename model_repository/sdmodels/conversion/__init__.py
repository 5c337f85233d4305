"""Published checkpoints to the files of an engine.

`python -m sdmodels.conversion '<options as JSON>'` writes `unet/`, `vae/` and `clip/` below a folder and says on
standard output, one JSON object a line, how far it is and at last what the checkpoint is (`convert.Options`).
`sdserver engine add` runs it as a process of its own, because the server brings in no torch.
"""
