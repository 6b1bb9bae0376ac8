"""Images, captions, the order in which they are visited, and the randomness of each visit."""
