"""Caption metrics: BLEU, METEOR, ROUGE-L and CIDEr-D, by the official scorers. No models, files or Ray here."""

from raycap.evaluate.scores import ALL_METRICS, Scores, score_captions

__all__ = ["ALL_METRICS", "Scores", "score_captions"]
