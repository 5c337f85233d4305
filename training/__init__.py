"""Makes an engine like the embedded `tiny-landscape` from a procedural world: `python -m training`. See README.md."""
