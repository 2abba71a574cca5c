"""`umed demo`: both stages from end to end, on generated studies and a small checkpoint made on the spot."""
