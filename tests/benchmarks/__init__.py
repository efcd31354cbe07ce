"""What this SDK costs beside the official one: `make bench`."""
