"""Storage formats: one file each."""
