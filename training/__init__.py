"""How the embedded engine `tiny-landscape` was made, so that anyone can make it again: `python -m training`."""
