"""Rule-based rewards: a completion's answer is extracted, judged, and mixed with its format and
the language of its thought into one score.
"""
