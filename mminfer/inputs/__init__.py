"""From what a user writes to model inputs: parts, media, embeddings, templates, pieces."""
