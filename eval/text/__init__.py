"""What `python -m eval.text_scores` is made of."""
